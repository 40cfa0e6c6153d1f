"""Does the scheduler keep its rules, and how full is the cluster? Simulates random workloads on random clusters.

    python benchmarks/scheduling.py --workloads 1000

In every decision of every workload: no node holds more than it has, a group is on one node, every job starts or is told
why not. Then: how long the whole takes against a lower bound that knows all jobs beforehand, the longest wait of any
job, what projects with work at all times get of the devices for their weights, and what deciding about 10,000 takes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.scheduling import Simulation, backlog, lower_bound_s, random_cluster, random_jobs

from gnomon_service.dispatch.decisions import Gang
from gnomon_service.dispatch.order import Ask, Share
from gnomon_service.dispatch.room import Node, Shape
from gnomon_service.dispatch.scheduling import decide


def main() -> None:
    """Run, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=int, default=1000)
    options = parser.parse_args()
    simulate(options.workloads)
    share_out()
    for is_full in (True, False):
        decide_about(10_000, is_full=is_full)


def simulate(n: int) -> None:
    """Random workloads, each to its end."""
    over_bound: list[float] = []
    waits: list[float] = []
    counts = dict.fromkeys(("jobs", "decisions", "leaves", "resizes", "guests"), 0)
    for seed in range(n):
        draw = random.Random(seed)
        nodes = random_cluster(draw)
        jobs = random_jobs(draw, nodes, draw.randint(5, 60))
        run = Simulation(nodes, jobs)
        run.run()
        bound = lower_bound_s(nodes, jobs)
        over_bound.append(max(life.done_at or 0.0 for life in run.lives.values()) / bound)
        waits.append(max((life.first_start or 0.0) - life.job.comes_at for life in run.lives.values()) / bound)
        found = (len(jobs), run.n_decisions, run.n_leaves, run.n_resizes, run.n_guests)
        counts = {name: counts[name] + more for name, more in zip(counts, found, strict=True)}
    print(f"{n} workloads: {', '.join(f'{count:,} {name}' for name, count in counts.items())}; 0 rules broken")
    print(f"time over the lower bound: mean {statistics.mean(over_bound):.3f}, worst {max(over_bound):.2f}")
    print(f"longest wait of a job over the lower bound: mean {statistics.mean(waits):.2f}, worst {max(waits):.2f}")


def share_out() -> None:
    """Projects of weights 1, 2 and 3 that always have work."""
    shares = {"a": Share(weight=1.0), "b": Share(weight=2.0), "c": Share(weight=3.0)}
    run = Simulation([Node(id=f"n{i}", n_devices=8) for i in range(4)], backlog("abc", n=600), shares, stop_at=20_000.0)
    run.run()
    total = sum(run.used_s.values())
    got = ", ".join(f"{project} {run.used_s[project] / total:.3f}" for project in "abc")
    print(f"weights 1 : 2 : 3 get {got} of the devices (owed .167, .333, .500)")


def decide_about(n: int, *, is_full: bool) -> None:
    """One decision about n jobs, on a cluster of 100 nodes that is full or empty."""
    draw = random.Random(0)
    nodes = [Node(id=f"n{i:03d}", n_devices=8) for i in range(100)]
    gangs = [
        Gang(job_id=f"r{i}", project="a", tier=1, priority=0, places=(f"n{i:03d}",) * 8, ends_in_s=60.0 * i)
        for i in range(100 if is_full else 0)
    ]
    asks = [
        Ask(
            job_id=f"j{i}",
            project=draw.choice("abcdefgh"),
            tier=draw.choices([0, 1, 2], [2, 6, 1])[0],
            priority=draw.randint(-10, 10),
            waited_s=draw.uniform(0, 100_000),
            shapes=(Shape(draw.choice([1, 2, 4]), draw.choice([1, 2, 4, 8])),),
            n_most=None,
            expected_s=draw.choice([None, 100.0, 5000.0]),
        )
        for i in range(n)
    ]
    began = time.perf_counter()
    decisions = decide(asks, gangs, nodes, {})
    took = time.perf_counter() - began
    kind = "full" if is_full else "empty"
    print(f"{n:,} jobs, {kind} cluster of 100 nodes: decided in {took:.2f} s ({len(decisions.starts)} started)")


if __name__ == "__main__":
    main()
