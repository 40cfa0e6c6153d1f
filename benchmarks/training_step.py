"""One training step against the encoder product it contains, and against other trainers' steps.

    python benchmarks/training_step.py --config S
    python benchmarks/training_step.py --config M --runs topk,sparsify,saelens --peers-python PEERS/bin/python

Every run is a process of its own, with one thread. In it each step is paired with the bare float32 product
[batch, d_in] x [d_in, d_sae], and both are measured in CPU time of the process, so that what else the machine does
cancels: quote step / GEMM. A step is the whole of it: loss, gradients, clipping, alignment, Adam, counters of dead
features.

The peers' own steps run with --peers-python, an environment with torch, sae-lens==6.54.12 and eai-sparsify==1.3.3.
Functions named make* take a configuration with d, n, k, batch and seed, and return step(x): another harness can load
them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Step = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Sizes of a benchmark."""

    name: str
    d: int
    n: int
    k: int = 32
    batch: int = 2048
    steps: int = 5
    seed: int = 0
    lr: float = 3e-4


CONFIGS = {
    "XS": Config(name="XS", d=64, n=1024, k=8, batch=256),
    "S": Config(name="S", d=512, n=16_384),
    "M": Config(name="M", d=768, n=65_536, steps=3),
    "GPU": Config(name="GPU", d=4096, n=131_072, k=64, batch=8192, steps=20),
}


def make_step(config: Any, *, device: str = "cpu", **fields: Any) -> Step:
    """This project's step for sizes config.d, config.n, config.k and config.batch."""
    from gnomon.specs import Mesh, StoredActivations, TopK, TrainSpec
    from gnomon_workers.parallel.mesh import ProcessMesh
    from gnomon_workers.sae.parameters import make_parameters
    from gnomon_workers.sae.plan import make_plan
    from gnomon_workers.sae.variants import make_variant
    from gnomon_workers.train.step import TrainStep

    spec = TrainSpec(
        activations=StoredActivations(id="act_" + "0" * 32),
        d_sae=config.n,
        batch_size=config.batch,
        token_budget=config.batch * 10_000,
        mesh=Mesh(),
        **{"activation": TopK(k=config.k), **fields},
    )
    plan = make_plan(spec, d_in=config.d, mesh=Mesh(), mean_squared_norm=float(config.d))
    b_dec = torch.zeros(config.d, device=device)
    step = TrainStep(
        plan,
        make_parameters(
            seed=config.seed,
            d_in=config.d,
            start=0,
            stop=config.n,
            b_dec=b_dec,
            tied=plan.spec.alignment == "tied",
            vectors=make_variant(plan.spec.activation, plan.setting).initial_vectors(),
        ),
        ProcessMesh.single(),
    )
    number = iter(range(10_000))
    return lambda x: step(next(number), x)


def make(config: Any, **fields: Any) -> Step:
    """Aligned TopK, the encoder's arithmetic chosen by the hardware."""
    return make_step(config, **fields)


def make_float32(config: Any, **fields: Any) -> Step:
    """Aligned TopK in float32 throughout."""
    return make_step(config, encoder_dtype="float32", **fields)


def make_unaligned(config: Any, **fields: Any) -> Step:
    """TopK with a unit-norm decoder and nothing else."""
    return make_step(config, alignment="none", **fields)


def make_batchtopk(config: Any, **fields: Any) -> Step:
    """Aligned BatchTopK."""
    from gnomon.specs import BatchTopK

    return make_step(config, activation=BatchTopK(k=config.k), **fields)


def make_matryoshka(config: Any, **fields: Any) -> Step:
    """Aligned Matryoshka-BatchTopK."""
    from gnomon.specs import Matryoshka

    return make_step(config, activation=Matryoshka(k=config.k), **fields)


def make_dense_phase(kind: str) -> Callable[..., Step]:
    """A variant without a fixed number of active features, while half of all are active: its first steps."""

    def make_variant(config: Any, **fields: Any) -> Step:
        from gnomon.specs import Gated, JumpReLU, PAnneal, ReLU

        activation = {
            "relu": ReLU(l1_coefficient=0.01),
            "jumprelu": JumpReLU(l0_coefficient=0.001),
            "gated": Gated(l1_coefficient=0.01),
            "p_anneal": PAnneal(l1_coefficient=0.01),
        }[kind]
        return make_step(config, activation=activation, **fields)

    return make_variant


RUNS = {
    "topk": make,
    "topk-float32": make_float32,
    "topk-unaligned": make_unaligned,
    "batchtopk": make_batchtopk,
    "matryoshka": make_matryoshka,
    **{kind: make_dense_phase(kind) for kind in ("relu", "jumprelu", "gated", "p_anneal")},
}
PEERS = ("sparsify", "saelens", "saelens-batchtopk")


def activations(config: Config, n_tokens: int = 16_384) -> Tensor:
    """Made-up activations (n_tokens, d): some strong directions, sparse features of unequal frequency, E|x|^2 = d."""
    rng = np.random.default_rng(config.seed)
    low_rank = rng.standard_normal((n_tokens, 64), np.float32) * (1 + np.arange(64, dtype=np.float32)) ** -0.7
    x = 1.5 * low_rank @ rng.standard_normal((64, config.d), np.float32) / np.float32(np.sqrt(config.d / 64))
    features = rng.standard_normal((8192, config.d), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    frequency = (10.0 + np.arange(8192)) ** -0.8
    for _ in range(24):
        which = rng.choice(8192, n_tokens, p=frequency / frequency.sum())
        x += features[which] * rng.exponential(size=(n_tokens, 1)).astype(np.float32)
    return torch.from_numpy(x * np.float32(np.sqrt(config.d / np.square(x).sum(1).mean())))


def batches(config: Config, device: str) -> Iterator[Tensor]:
    """Batches without end."""
    x = activations(config).to(device)
    while True:
        yield from (batch for batch in x.split(config.batch) if len(batch) == config.batch)


def measure(config: Config, run: str, device: str) -> dict[str, float]:
    """Medians over config.steps of one run in this process."""
    if run in PEERS:
        from peers import MAKERS

        maker: Callable[[Any], Step] = MAKERS[run]
    else:
        maker = lambda sizes: RUNS[run](sizes, device=device)  # noqa: E731
    torch.set_num_threads(1)
    # a first step of a small one, so that memory does not count the code that is loaded
    maker(replace(config, d=32, n=64, k=2, batch=32))(torch.randn(32, 32, device=device))
    source = batches(config, device)
    x = next(source)
    base = _resident_bytes(device)
    step = maker(config)
    for _ in range(2):
        step(next(source))
    clock = _clock(device)
    peak = _peak_bytes(device) - base
    W_enc, out = torch.randn(config.n, config.d, device=device), torch.empty(config.batch, config.n, device=device)
    half = (x.bfloat16(), W_enc.bfloat16(), out.bfloat16()) if device == "cuda" else None
    unit = (lambda: torch.mm(half[0], half[1].t(), out=half[2])) if half else lambda: torch.mm(x, W_enc.t(), out=out)
    unit()
    units, steps = [], []
    for _ in range(config.steps):
        units.append(_time(clock, unit))
        batch = next(source)
        steps.append(_time(clock, lambda batch=batch: step(batch)))
    return {
        "ratio": statistics.median(s / u for s, u in zip(steps, units, strict=True)),
        "tokens_per_s": config.batch / statistics.median(steps),
        "memory": peak / (2 * config.n * config.d * 4),
    }


def _time(clock: Callable[[], float], work: Callable[[], Any]) -> float:
    began = clock()
    work()
    return clock() - began


def _clock(device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def _resident_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: dict[str, dict[str, float]]) -> str:
    """The results as Markdown; speeds are ratios of step / GEMM."""
    peers = [name for name in PEERS if name in rows]
    lines = [
        "| step | tokens/s | step / GEMM | "
        + "".join(f"speed against {peer} | " for peer in peers)
        + "memory / params |",
        "|---" * (4 + len(peers)) + "|",
    ]
    for name, row in rows.items():
        speeds = "".join(f"{rows[peer]['ratio'] / row['ratio']:.1f}x | " for peer in peers)
        memory = f"{row['memory']:.1f}x"
        lines.append(f"| {name} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} | {speeds}{memory} |")
    return "\n".join(lines)


def main() -> None:
    """Run every step in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="S", help="sizes")
    parser.add_argument("--runs", default=",".join(RUNS), help=f"of {', '.join([*RUNS, *PEERS])}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where; on cuda GEMM is bfloat16")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("RESULT", json.dumps(measure(CONFIGS[arguments.config], arguments.worker, arguments.device)))
        return
    rows = {}
    for run in arguments.runs.split(","):
        python = arguments.peers_python if run in PEERS else sys.executable
        command = [python, __file__, "--config", arguments.config, "--device", arguments.device, "--worker", run]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[run] = json.loads(done.stdout.split("RESULT ", 1)[1])
        print(f"{run}: {rows[run]}", file=sys.stderr, flush=True)
    print(f"\n{CONFIGS[arguments.config]}, {arguments.device}, one thread\n\n{table(rows)}")


if __name__ == "__main__":
    main()
