"""Plans against truth: memory, disk and time of real trainings, one of each activation.

    python benchmarks/plans.py --d-in 256 --d-sae 12288 --batch 1024 --steps 40

A store of made-up rows is written, and on a Ray of its own every training runs twice: with two thirds of the features,
from which the rate is learned, and then as planned. Truth is the most memory that the rank's process ever held, the
bytes of files, and the tokens a second of the steps. On a busy machine rates of two runs differ by themselves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.resources import TrainedOn, TrainResult
from gnomon.specs import HarvestSpec, Mesh, TrainSpec
from gnomon_service.planning.rates import TrainingRates, finished_training
from gnomon_storage.activations import ActivationStore
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.writing import SegmentWriter, seal
from gnomon_workers.harvest.room import store_size
from gnomon_workers.runtime.protocol import Assignment
from gnomon_workers.runtime.reporting import Reporter
from gnomon_workers.sae.costs import TrainJob, checkpoint_bytes, dictionary_bytes, kept_checkpoints
from gnomon_workers.sae.memory import Rows
from gnomon_workers.train.job import run_train

STORE_ID = "act_" + "1" * 32
HOOK = "model.layers.0"
CONTEXT_LENGTH = 128
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "k": 32},
    "batchtopk": {"kind": "batchtopk", "k": 32},
    "matryoshka": {"kind": "matryoshka", "k": 32},
    "relu": {"kind": "relu"},
    "jumprelu": {"kind": "jumprelu"},
    "gated": {"kind": "gated"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a training took."""

    ran: TrainedOn
    checkpoints_bytes: int
    dictionary_bytes: int


def main() -> None:
    """Run, and print a row for each activation."""
    options = _options()
    root = Path(tempfile.mkdtemp(prefix="gnomon-plans-", dir=options.folder))
    try:
        store = make_store(root, options)
        print(f"store: plan / truth {planned_store(options) / store.manifest.n_bytes:.3f}", flush=True)
        with local_ray():
            print("| activation | memory, MiB | plan | / | checkpoints, MiB | / | dictionary / | tokens/s | plan | / |")
            print("|---|---|---|---|---|---|---|---|---|---|")
            for name in options.activations:
                print(row(name, root, store, options), flush=True)
    finally:
        shutil.rmtree(root)


def row(name: str, root: Path, store: ActivationStore, options: argparse.Namespace) -> str:
    """Plan and truth of one training, learned from a smaller one."""
    mesh = Mesh()
    near = spec_of(name, options, d_sae=options.d_sae * 2 // 3)
    ran = run(f"{name}-near", near, root).ran
    rates = TrainingRates({"cpu": [finished_training(TrainJob.of(near, options.d_in), ran)]})
    spec = spec_of(name, options, d_sae=options.d_sae)
    job = TrainJob.of(spec, options.d_in, rows=Rows(n_rows=store.manifest.n_rows))
    truth = run(name, spec, root)
    (shape,) = job.shapes(mesh)
    memory, peak = job.memory(mesh), truth.ran.peak_memory_bytes or 0
    kept = kept_checkpoints(spec)[0] * checkpoint_bytes(shape)
    rate = rates.of(job, mesh).tokens_per_s
    if options.parts:
        print({part: round(n_bytes / 2**20) for part, n_bytes in memory.parts.items()}, flush=True)
    cells = [
        f"{name} ({memory.phase})",
        f"{peak / 2**20:,.0f} | {memory.n_bytes / 2**20:,.0f} | {memory.n_bytes / peak:.2f}",
        f"{truth.checkpoints_bytes / 2**20:,.1f} | {kept / truth.checkpoints_bytes:.3f}",
        f"{dictionary_bytes(shape) / truth.dictionary_bytes:.3f}",
        f"{truth.ran.tokens_per_s:,.0f} | {rate:,.0f} | {rate / truth.ran.tokens_per_s:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def spec_of(name: str, options: argparse.Namespace, *, d_sae: int) -> TrainSpec:
    """A training of some steps, with two checkpoints."""
    return TrainSpec.model_validate(
        {
            "activations": {"kind": "store", "id": STORE_ID},
            "d_sae": d_sae,
            "activation": ACTIVATIONS[name],
            "batch_size": options.batch,
            "token_budget": options.batch * options.steps,
            "mesh": {"dp": 1, "features": 1},
            "log_every": 5,
            "checkpoint_every": -(-options.steps // 2),
            "evaluation": None,
        }
    )


def run(job_id: str, spec: TrainSpec, root: Path) -> Truth:
    """Run a training to its end, as its supervisor does."""
    assignment = Assignment(
        job_id=job_id,
        attempt=1,
        project="p",
        kind="train",
        spec=spec.model_dump(mode="json"),
        storage_root=f"file://{root}",
        input_roots=(),
        store_id=STORE_ID,
        dictionary_id=f"dict_{job_id}",
    )
    result = TrainResult.read({k: v for k, v in run_train(assignment, Reporter()).items() if k != "records"})
    assert result.run is not None
    return Truth(
        ran=result.run,
        checkpoints_bytes=_bytes_of(root / "checkpoints" / job_id),
        dictionary_bytes=_bytes_of(root / "dictionaries" / f"dict_{job_id}"),
    )


def make_store(root: Path, options: argparse.Namespace) -> ActivationStore:
    """A sealed store of random rows, in segments as a harvest makes them."""
    harvest = harvest_of(options)
    store = ProjectLayout.open(f"file://{root}").store(STORE_ID)
    n_contexts = harvest.token_budget // CONTEXT_LENGTH
    n_held_out = (n_contexts + harvest.held_out_every - 2) // harvest.held_out_every
    commits = []
    per_segment = harvest.segment_tokens // CONTEXT_LENGTH
    for split, n in (("segments", n_contexts - n_held_out), ("held_out", n_held_out)):
        for index, first in enumerate(range(0, n, per_segment)):
            commits.append(_segment(store, split, index, min(per_segment, n - first), options.d_in))
    spec = harvest.model_dump(mode="json")
    facts: dict[str, Any] = {
        "packing": {},
        "drop": spec["drop"],
        "model": {},
        "tokenizer": {},
        "text": {},
        "versions": {},
    }
    return seal(store, commits, dtype="bfloat16", store_id=STORE_ID, spec=spec, context_length=CONTEXT_LENGTH, **facts)


def _segment(store: Any, split: Any, index: int, n_contexts: int, d_in: int) -> Any:
    """One segment of rows with a few strong directions."""
    kept = CONTEXT_LENGTH - 1
    contexts = np.zeros((n_contexts, CONTEXT_LENGTH), dtype=np.int32)
    writer = SegmentWriter(
        store,
        split=split,
        index=index,
        attempt=1,
        hooks={HOOK: d_in},
        dtype="bfloat16",
        contexts=contexts,
        tokens=np.zeros(n_contexts * kept, dtype=np.int32),
        positions=np.tile(np.arange(1, CONTEXT_LENGTH, dtype=np.int32), n_contexts),
        context_ids=np.repeat(np.arange(n_contexts, dtype=np.int32), kept),
        n_tokens=contexts.size,
    )
    generator = np.random.default_rng(index)
    directions = np.random.default_rng(0).standard_normal((4 * d_in, d_in), dtype=np.float32)
    for _ in range(n_contexts):
        rows = (generator.random((kept, 4 * d_in), dtype=np.float32) ** 12) @ directions
        writer.append({HOOK: (rows.view(np.uint32) >> 16).astype(np.uint16)})
    return writer.commit()


def harvest_of(options: argparse.Namespace) -> HarvestSpec:
    """The harvest that the store is said to be of."""
    return HarvestSpec.model_validate(
        {"model": {"source": "m"}, "text": [{"url": "/t"}], "hooks": [HOOK], "token_budget": options.tokens}
    )


def planned_store(options: argparse.Namespace) -> int:
    """Bytes of the store, told from its spec."""
    return store_size(harvest_of(options), {HOOK: options.d_in}, options.tokens, "file").n_bytes


def local_ray() -> Any:
    """A Ray of this process, which is shut down when it is left."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations on import
        import ray

        return ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
        )


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--d-sae", type=int, default=12_288)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=100_000, help="Tokens that the store is of.")
    parser.add_argument("--activations", type=lambda text: text.split(","), default=list(ACTIVATIONS))
    parser.add_argument("--parts", action="store_true", help="Print the planned memory of each part, in MiB.")
    parser.add_argument("--folder", default=None, help="Where all is written; a temporary folder else.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
