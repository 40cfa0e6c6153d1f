"""Do the tests hold on a busy machine, and do they harm nobody? Runs them beside busy loops and a second service.

    python benchmarks/busy_tests.py                          # what `make test` runs
    python benchmarks/busy_tests.py --busy 8 -- tests/unit   # what pytest is given

The service is a second one, in a home of its own, with a training under way. Ends with 1 where a test failed, or where
that training was disturbed: it must have gone on, at its first attempt.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.glass import make_corpus
from tests.support.models import make_glassllm

from gnomon import Client, Mesh, ModelSource, TextSource, TopK, TrainSpec
from gnomon.resources import TERMINAL_STATES, Job
from gnomon.specs import HarvestSpec
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings


def main() -> int:
    """Run, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=8, help="processes that do nothing but turn")
    parser.add_argument("pytest", nargs="*", default=["-m", "not long"], help="arguments of pytest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gnomon-busy-") as folder:
        return beside(Path(folder), arguments.busy, arguments.pytest)


def beside(home: Path, n_busy: int, arguments: list[str]) -> int:
    """Run pytest beside the busy loops and the service."""
    (home / "inputs").mkdir()
    make_glassllm(home / "inputs/model")
    make_corpus(home / "inputs/corpus.jsonl")
    settings = load_settings(home=home, port=0, n_cpus=2, input_roots=(str(home / "inputs"),))
    loops = [multiprocessing.Process(target=_turn, daemon=True) for _ in range(n_busy)]
    with Embedded(settings) as service, Client(service.url, service.key) as client:
        handle = client.submit(endless(home / "inputs"))
        before = trained(client, handle.id)
        for loop in loops:
            loop.start()
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], check=False).returncode
        minutes = (time.monotonic() - began) / 60
        job = client.job(handle.id).job
        for loop in loops:
            loop.kill()
        client.job(handle.id).cancel()
    done = job.progress.done if job.progress else 0
    is_undisturbed = job.state == "running" and job.attempt == 1 and done > before
    print(
        f"pytest ended with {code} after {minutes:.1f} min beside {n_busy} busy processes; the other service's job is "
        f"{job.state} at attempt {job.attempt}, and went from {before:,} to {done:,} tokens"
    )
    return int(code != 0 or not is_undisturbed)


def endless(inputs: Path) -> TrainSpec:
    """A training that does not end by itself."""
    harvest = HarvestSpec(
        model=ModelSource(source=str(inputs / "model")), text=(TextSource(url=str(inputs / "corpus.jsonl")),),
        hooks=("model.layers.1",), context_length=64, token_budget=16_384,
    )  # fmt: skip
    return TrainSpec(
        activations=harvest, d_sae=256, activation=TopK(k=8), batch_size=64, token_budget=10**12, mesh=Mesh(),
        log_every=10_000, checkpoint_every=10_000, evaluation=None,
    )  # fmt: skip


def trained(client: Client, job_id: str) -> int:
    """Tokens trained on, once there are some."""
    while True:
        job: Job = client.job(job_id).job
        if job.state in TERMINAL_STATES:
            raise SystemExit(f"the other service's job is {job.state}: {job.error}")
        if job.progress and job.progress.phase == "train" and job.progress.done:
            return job.progress.done
        time.sleep(0.5)


def _turn() -> None:
    os.setsid()  # as another user's would be: Linux shares the cores out by session, and pytest's is its own
    while True:
        pass


if __name__ == "__main__":
    sys.exit(main())
