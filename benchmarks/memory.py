"""Peak memory of training ranks, by number of feature shards.

    python benchmarks/memory.py --d-in 1024 --d-sae 65536 --shards 1,2,4

Every rank is a fresh process, which initialises its shard, makes some steps, saves a checkpoint, loads it and goes on.
Printed is the most memory that a rank held in each part, less what it held before it had a dictionary (the interpreter,
torch, the process group).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from gnomon.specs import Mesh, StoredActivations, TopK, TrainSpec
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import committed_checkpoints
from gnomon_workers.runtime.ports import free_port
from gnomon_workers.sae.plan import TrainPlan, make_plan
from gnomon_workers.train.rank import Meeting, join_mesh, make_step, n_first_samples
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.state import load_checkpoint, state_tensors

PARTS = ("initialise", "step", "save", "load")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every rank does."""

    plan: TrainPlan
    n_steps: int
    folder: str
    address: str


@dataclass(slots=True, kw_only=True)
class Usage:
    """Memory of one rank, in bytes."""

    state: int = 0
    """Parameters and optimizer state."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Most memory above the baseline, by part."""


def main() -> None:
    """Measure and print a table."""
    options = _options()
    print(f"d_in {options.d_in:,}, d_sae {options.d_sae:,}, batch {options.batch:,}, k {options.k}; MiB a rank")
    print(
        "| shards | parameters and optimizer | " + " | ".join(PARTS) + " | peak | peak / state | of one shard's peak |"
    )
    print("| --- " * (len(PARTS) + 5) + "|")
    first: int | None = None
    for n_shards in options.shards:
        usages = measure(n_shards, options)
        state, peak = usages[0].state, max(max(usage.peaks.values()) for usage in usages)
        first = first or peak
        cells = [state, *(max(usage.peaks[part] for usage in usages) for part in PARTS), peak]
        numbers = " | ".join(f"{cell / 2**20:,.0f}" for cell in cells)
        print(f"| {n_shards} | {numbers} | {peak / state:.2f} | {peak / first:.2f} |", flush=True)


def measure(n_shards: int, options: argparse.Namespace) -> list[Usage]:
    """What each of n_shards ranks holds."""
    spec = TrainSpec(
        activations=StoredActivations(id="act_" + "0" * 32),
        d_sae=options.d_sae,
        activation=TopK(k=options.k),
        batch_size=options.batch,
        token_budget=options.batch * 1000,
        mesh=Mesh(features=n_shards),
    )
    plan = make_plan(spec, d_in=options.d_in, mesh=Mesh(features=n_shards), mean_squared_norm=1.0)
    address = f"127.0.0.1:{free_port()}"
    folder = tempfile.mkdtemp(prefix="gnomon-memory-", dir=options.folder)
    work = Work(plan=plan, n_steps=options.steps, folder=folder, address=address)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(n_shards):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, work, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join()
        shutil.rmtree(folder)


def _rank(rank: int, work: Work, pipe: Connection) -> None:
    torch.set_num_threads(1)
    plan = work.plan
    meeting = Meeting.at(work.address, rank=rank, n_ranks=plan.n_ranks)
    mesh = join_mesh(plan, meeting, device=torch.device("cpu"))
    checkpoints = Location.open(f"file://{work.folder}")
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.standard_normal((plan.spec.batch_size, plan.d_in), dtype=np.float32))
    usage = Usage()
    baseline = _resident("VmRSS")

    def part(name: str, do: Callable[[], object]) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        do()
        usage.peaks[name] = _resident("VmHWM") - baseline

    step = None

    def initialise() -> None:
        nonlocal step
        sample = generator.standard_normal((n_first_samples(plan), plan.d_in), dtype=np.float32)
        step = make_step(plan, mesh, sample, torch.device("cpu"))

    part("initialise", initialise)
    assert step is not None
    made = step
    part("step", lambda: [made(t, x) for t in range(work.n_steps)])
    part("save", lambda: save_checkpoint(checkpoints, made, number=work.n_steps, attempt=1))
    part("load", lambda: load_checkpoint(checkpoints, next(committed_checkpoints(checkpoints)), made))
    usage.state = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(made).values())
    pipe.send(usage)


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=65_536)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shards", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--folder", default=None, help="Where checkpoints are written; a temporary folder else.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
