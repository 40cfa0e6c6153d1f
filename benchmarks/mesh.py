"""The same steps on one process and on meshes of several: time, what it is spent on, and bytes sent.

    python benchmarks/mesh.py --meshes 1x1,1x2,1x4,2x1,2x2

Ranks are processes on this machine with one thread each, joined by gloo. Where there are fewer cores than ranks they
take turns, so look at the CPU time of all ranks together, which says what sharding costs, and at the bytes, which say
what a network would have to carry.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from training_step import CONFIGS, Config, activations

from gnomon.specs import BatchTopK, Mesh, StoredActivations, TopK, TrainSpec
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.runtime.ports import free_port
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.sae.plan import make_plan
from gnomon_workers.train.step import TrainStep

TIMEOUT_S = 600.0


def make_step(config: Config, mesh: ProcessMesh, activation: str, exchange: str) -> TrainStep:
    """A step of one rank at its beginning."""
    shape = Mesh(dp=mesh.dp, features=mesh.features)
    spec = TrainSpec.model_validate(
        {
            "activations": StoredActivations(id="act_" + "0" * 32),
            "d_sae": config.n,
            "batch_size": config.batch,
            "token_budget": config.batch * 10_000,
            "mesh": shape,
            "activation": BatchTopK(k=config.k) if activation == "batchtopk" else TopK(k=config.k),
            "gradient_exchange": exchange,
        }
    )
    plan = make_plan(spec, d_in=config.d, mesh=shape, mean_squared_norm=float(config.d))
    start, stop = mesh.feature_range(config.n)
    parameters = make_parameters(seed=0, d_in=config.d, start=start, stop=stop, b_dec=torch.zeros(config.d), tied=False)
    return TrainStep(plan, parameters, mesh)


def run_rank(rank: int, port: int, dp: int, features: int, config: Config, options: dict[str, str]) -> dict[str, Any]:
    """Medians are left to the caller: totals over config.steps after two steps of warm-up."""
    torch.set_num_threads(1)
    mesh = ProcessMesh.single()
    if dp * features > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=dp * features,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        mesh = ProcessMesh.create(dp=dp, features=features, timeout_s=TIMEOUT_S)
    step = make_step(config, mesh, **options)
    first, last = mesh.token_range(config.batch)
    x = activations(config)
    batches = [batch[first:last] for batch in x.split(config.batch) if len(batch) == config.batch]
    for t in range(2):
        step(t, batches[t % len(batches)])
    mesh.clock.lap()
    mesh.sent_bytes.clear()
    mesh.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    losses = [step(t, batches[t % len(batches)]).loss for t in range(2, 2 + config.steps)]
    result = {
        "wall_s": (time.perf_counter() - wall) / config.steps,
        "cpu_s": (time.process_time() - cpu) / config.steps,
        "sent_bytes": {axis: n / config.steps for axis, n in mesh.sent_bytes.items()},
        "times_s": {work: s / config.steps for work, s in mesh.clock.lap().items()},
        "loss": losses[-1],
    }
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def run_mesh(dp: int, features: int, config: Config, options: dict[str, str]) -> list[dict[str, Any]]:
    """Results of all ranks."""
    port = free_port()
    with multiprocessing.get_context("spawn").Pool(dp * features) as pool:
        tasks = [(rank, port, dp, features, config, options) for rank in range(dp * features)]
        return pool.starmap(run_rank, tasks, chunksize=1)


def rows(meshes: str, config: Config, options: dict[str, str]) -> Iterator[str]:
    """A line of the table for each mesh."""
    base: float | None = None
    for text in meshes.split(","):
        dp, features = (int(n) for n in text.split("x"))
        ranks = run_mesh(dp, features, config, options)
        total = sum(rank["cpu_s"] for rank in ranks)
        base = base or total
        sent = {axis: max(r["sent_bytes"].get(axis, 0) for r in ranks) / 2**20 for axis in ("features", "dp")}
        times = ", ".join(f"{work} {1000 * seconds:.0f}" for work, seconds in ranks[0]["times_s"].items())
        yield (
            f"| {dp} x {features} | {ranks[0]['wall_s']:.3f} | {total:.3f} ({total / base:.2f}x) "
            f"| {sent['features']:.2f} | {sent['dp']:.2f} | {times} | {ranks[0]['loss']:.7f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="S", help="sizes")
    parser.add_argument("--meshes", default="1x1,1x2,1x4,2x1,2x2", help="dp x features, separated by commas")
    parser.add_argument("--activation", choices=["topk", "batchtopk"], default="topk")
    parser.add_argument("--exchange", choices=["auto", "batch", "dense"], default="auto", help="gradient_exchange")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    config = replace(CONFIGS[arguments.config], steps=arguments.steps)
    options = {"activation": arguments.activation, "exchange": arguments.exchange}
    print(f"{config}, {json.dumps(options)}\n")
    print("| mesh | step, s | CPU of all ranks, s | MiB sent over features | MiB sent over dp | rank 0, ms | loss |")
    print("|---" * 7 + "|")
    for line in rows(arguments.meshes, config, options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
