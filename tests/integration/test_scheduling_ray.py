"""The scheduler on a real Ray of two nodes: gangs side by side, one that waits, one that is sent away and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gnomon.resources import TERMINAL_STATES, Job
from gnomon.specs import BatchTopK, Mesh, StoredActivations, TrainSpec
from gnomon_service.db.engine import Database
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.dispatch.loop import Dispatcher
from gnomon_service.settings import Settings
from gnomon_workers.attempts.cluster import RayCluster
from tests.support.rays import NAMESPACE, two_machines
from tests.support.service_jobs import Bench, store_id
from tests.support.stores import make_store
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long

N_STEPS = 600


class Cluster:
    """A queue, and a dispatcher that works on two nodes of two cores."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder / 'gnomon.db'}")
        self.database.migrate()
        self.bench = Bench(self.database)
        self.bench.seal()
        settings = Settings(home=folder, storage_root=f"file://{folder}/store", poll_s=0.1)
        make_store(folder / "store/projects/default", store_id=store_id())
        self.dispatcher = Dispatcher(
            leases=self.bench.leases,
            observations=Observations(self.database),
            scheduler=Scheduler(self.database),
            cluster=RayCluster(namespace=NAMESPACE),
            settings=settings,
            owner="d",
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.dispatcher.run, args=(self._stop,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and leave what runs to the end of Ray."""
        self._stop.set()
        self._thread.join(timeout=60.0)
        self.database.close()

    def train(self, *, dp: int = 1, features: int = 1, seed: int = 0, n_steps: int = N_STEPS, **fields: Any) -> Job:
        """Queue a training of some seconds."""
        spec = TrainSpec(
            activations=StoredActivations(id=store_id()),
            d_sae=64,
            activation=BatchTopK(k=4),
            batch_size=64,
            token_budget=64 * n_steps,
            mesh=Mesh(dp=dp, features=features),
            log_every=1,
            checkpoint_every=50,
            seed=seed,
            evaluation=None,
        )
        return self.bench.submit(spec, **fields)

    def job(self, job: Job) -> Job:
        """It as it is now."""
        return self.bench.job(job.id)

    def is_training(self, job: Job, n_steps: int = 1) -> bool:
        """Whether it runs, and has made so many steps."""
        return len(self.losses(job)) >= n_steps

    def losses(self, job: Job) -> dict[int, float]:
        """Loss by step."""
        measured = [event.data for event in self.bench.events(job.id) if event.kind == "metrics"]
        return {data["step"]: data["loss"] for data in measured}

    def finish(self, *jobs: Job) -> list[Job]:
        """Jobs once they have ended."""
        wait_until(lambda: all(self.job(job).state in TERMINAL_STATES for job in jobs), lambda: self.look(jobs))
        return [self.job(job) for job in jobs]

    def look(self, jobs: tuple[Job, ...]) -> str:
        """How they are."""
        return ", ".join(f"{self.job(job).state} ({self.job(job).queue})" for job in jobs)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_machines(n_cpus=2):
        made = Cluster(tmp_path_factory.mktemp("cluster"))
        yield made
        made.close()


def test_small_gangs_run_side_by_side_and_around_a_large_one_that_waits(cluster: Cluster) -> None:
    first, second = cluster.train(seed=1), cluster.train(seed=2, features=2)
    wait_until(lambda: cluster.job(first).n_devices + cluster.job(second).n_devices == 3, "two gangs")
    large = cluster.train(dp=2, features=2, seed=3, n_steps=100)
    wait_until(lambda: cluster.job(large).queue, "a reason")
    place = cluster.job(large).queue
    assert place is not None
    assert (place.position, place.code) == (1, "no_room")
    assert first.id in place.message or second.id in place.message
    ended = cluster.finish(first, second, large)
    assert [job.state for job in ended] == ["succeeded"] * 3
    assert [(job.attempt, job.n_losses) for job in ended] == [(1, 0)] * 3


def test_an_urgent_gang_takes_the_place_of_another_which_comes_back_to_the_same_bits(cluster: Cluster) -> None:
    (undisturbed,) = cluster.finish(cluster.train(features=2, seed=7))
    victim = cluster.train(features=2, seed=7, job_class="spare")
    wait_until(lambda: cluster.is_training(victim, 60), "sixty steps")
    urgent = cluster.train(dp=2, features=2, seed=4, n_steps=100, job_class="urgent")
    wait_until(lambda: cluster.is_training(urgent), "the urgent training")
    assert cluster.job(victim).state == "queued"
    urgent, victim = cluster.finish(urgent, victim)
    assert (urgent.state, urgent.attempt) == ("succeeded", 1)
    assert (victim.state, victim.attempt, victim.n_losses) == ("succeeded", 2, 0)
    assert cluster.losses(victim) == cluster.losses(undisturbed)
