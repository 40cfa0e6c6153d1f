"""How long does a lost machine cost? Kills ranks and supervisors of a training, and waits for the next attempt's steps.

    python benchmarks/losses.py --kills 40

A service with default settings, its own Ray on this machine, and a training on two ranks. Time runs from the kill until
the dispatcher has told of a step that the next attempt made; it holds the loss being noticed, the pause before another
attempt, the start of new processes and the way back from the checkpoint. Ends with 1 where the job is lost, or goes
back by more than two checkpoints.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.outages import harvest_of, until
from tests.support.glass import make_corpus
from tests.support.models import make_glassllm
from tests.support.own_processes import own_pids

from gnomon import Client, Mesh, TopK, TrainSpec
from gnomon.resources import Job
from gnomon_service.local.embedded import Embedded
from gnomon_service.settings import load_settings

BATCH, EVERY = 64, 200
VICTIMS = ("TrainRank", "Supervisor")


def main() -> int:
    """Run, and print one line for each kind of process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gnomon-losses-") as folder:
        home = Path(folder)
        (home / "inputs").mkdir()
        make_glassllm(home / "inputs/model")
        make_corpus(home / "inputs/corpus.jsonl")
        settings = load_settings(home=home, port=0, n_cpus=4, input_roots=(str(home / "inputs"),))
        with Embedded(settings) as service, Client(service.url, service.key) as client:
            return _kill_again_and_again(Watch(client, client.submit(spec_of(home / "inputs")).id), options.kills)


def spec_of(inputs: Path) -> TrainSpec:
    """A training that does not end while this runs."""
    return TrainSpec(
        activations=harvest_of(inputs), d_sae=512, activation=TopK(k=16), batch_size=BATCH,
        token_budget=BATCH * 5_000_000, mesh=Mesh(features=2), checkpoint_every=EVERY,
    )  # fmt: skip


class Watch:
    """What a job's events told so far."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.client = client
        self.job_id = job_id
        self.attempt = 0
        """The last one that made a step of its own."""
        self._last = 0

    def job(self) -> Job:
        """As it is now."""
        return self.client.job(self.job_id).job

    def next_attempt(self) -> int:
        """The first attempt after the one seen last to make a step, once it has made it."""
        before = self.attempt

        def has_worked() -> bool:
            for event in self.client.events(self.job_id, after=self._last):
                self._last = event.id
                if event.kind == "metrics":
                    self.attempt = max(self.attempt, event.attempt)
            return self.attempt > before

        until(has_worked)
        return self.attempt


def _kill_again_and_again(watch: Watch, n_kills: int) -> int:
    waits: dict[str, list[float]] = {victim: [] for victim in VICTIMS}
    n_wrong = 0
    attempt = watch.next_attempt()
    for number in range(n_kills):
        time.sleep(random.uniform(0.5, 3.0))
        done, victim = _done(watch.job()), VICTIMS[number % len(VICTIMS)]
        began = time.monotonic()
        os.kill(random.choice(own_pids(f"ray::{victim}")), signal.SIGKILL)
        after = watch.next_attempt()
        waits[victim].append(time.monotonic() - began)
        n_wrong += after != attempt + 1 or done - _done(watch.job()) > 2 * EVERY * BATCH
        attempt = after
    for victim, took in waits.items():
        ordered = sorted(took)
        p99 = ordered[-1 - len(ordered) // 100]
        print(f"{victim}: {len(took)} killed, next step after {ordered[len(took) // 2]:.1f} s, p99 {p99:.1f} s")
    job = watch.job()
    print(f"attempts {job.attempt}, job {job.state}, attempts or checkpoints lost for nothing: {n_wrong}")
    watch.client.cancel(job.id)
    return int(n_wrong > 0 or job.state != "running")


def _done(job: Job) -> int:
    return int(job.progress.done) if job.progress is not None else 0


if __name__ == "__main__":
    sys.exit(main())
