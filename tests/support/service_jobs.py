"""Requests, plans and a bench for tests of the queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update

from gnomon.resources import Event, Job
from gnomon.specs import HarvestSpec, JobRequest, ModelSource, StoredActivations, TextSource, TrainSpec
from gnomon.specs.request import CLASSES
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import list_events, read_job
from gnomon_service.db.tables import activation_stores, jobs
from gnomon_service.dispatch.order import Ask, in_order
from gnomon_service.dispatch.reasons import hindrance
from gnomon_service.dispatch.room import Shape
from gnomon_service.jobs.held import HeldJob, Placement, RetryPolicy
from gnomon_service.jobs.leases import Leases
from gnomon_service.jobs.submission import Plan, Queue
from gnomon_service.jobs.waiting import read_waiting

PROJECT = "default"
STORE_RECORD = {"n_rows": 900, "n_held_out_rows": 60, "n_bytes": 12_345, "hooks": {"model.layers.1": 16}}
STORE_RESULT: dict[str, Any] = {
    "store_id": "act_" + "1" * 32,
    "n_rows": 900,
    "n_held_out_rows": 60,
    "n_tokens": 1024,
    "record": STORE_RECORD,
}
DICTIONARY_RECORD: dict[str, Any] = {
    "hook_name": "model.layers.1",
    "d_in": 16,
    "d_sae": 48,
    "activation": "topk",
    "alignment": "orth",
    "location": "file:///store/dictionaries/x",
    "files": {"cfg.json": 12},
    "metrics": {"fvu": 0.2},
}


def harvest_spec(**changes: Any) -> HarvestSpec:
    """A small harvest."""
    fields: dict[str, Any] = {
        "model": ModelSource(source="/models/tiny"),
        "text": (TextSource(url="/texts/a.txt"),),
        "hooks": ("model.layers.1",),
        "token_budget": 1024,
    }
    return HarvestSpec(**(fields | changes))


def train_spec(**changes: Any) -> TrainSpec:
    """A small training run with its harvest inline."""
    fields: dict[str, Any] = {"activations": harvest_spec(), "d_sae": 48, "token_budget": 8192}
    return TrainSpec(**(fields | changes))


def store_id(number: int = 1) -> str:
    """The id of a store."""
    return f"act_{number:032x}"


@dataclass
class Bench:
    """Both sides of the queue, and a look at what is in it."""

    database: Database
    lease_s: float = 30.0
    projects: str = "file:///store/projects"
    """Where the bytes of all projects are."""

    def __post_init__(self) -> None:
        self.queue = Queue(self.database, project_root=self.projects)
        self.leases = Leases(self.database, lease_s=self.lease_s, retry=RetryPolicy(base_s=0.0))

    def submit(
        self,
        spec: HarvestSpec | TrainSpec | None = None,
        *,
        store: int = 1,
        project: str = PROJECT,
        key: str | None = None,
        **fields: Any,
    ) -> Job:
        """Queue a job on a store; a harvest by default."""
        request = JobRequest(spec=spec or harvest_spec(), **fields)
        plan = Plan(spec=request.spec, store_id=store_id(store))
        return self.queue.submit(project, request, plan, idempotency_key=key)

    def claim_next(self, owner: str = "a") -> HeldJob | None:
        """Claim the first job that is ready, in the scheduler's order; None where none is."""
        with self.database.read() as connection:
            waiting = [job for job in read_waiting(connection) if hindrance(job) is None]
        asks = [
            Ask(
                job_id=job.id,
                project=job.project,
                tier=CLASSES.index(job.job_class),
                priority=job.priority,
                waited_s=job.waited_s,
                shapes=(Shape(1),),
            )
            for job in waiting
        ]
        claims = (self.leases.claim(owner, ask.job_id, Placement(places=("n",))) for ask in in_order(asks, {}, {}))
        return next(filter(None, claims), None)

    def claim(self, owner: str = "a") -> HeldJob:
        """Claim a job that must be there, and start it."""
        held = self.claim_next(owner)
        assert held is not None
        self.leases.mark_running(held.lease)
        return held

    def seal(self, store: int = 1) -> Job:
        """Harvest a store to its end."""
        job = self.submit(store=store)
        self.leases.succeed(self.claim().lease, STORE_RESULT)
        self.release()
        return self.job(job.id)

    def release(self) -> None:
        """Do as if nothing were left of ended attempts."""
        self.leases.mark_released(self.leases.unreleased())

    def let_lease_pass(self, job_id: str) -> None:
        """Move a lease into the past."""
        with self.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(lease_until=1.0))

    def job(self, job_id: str, project: str = PROJECT) -> Job:
        """A job as it is now."""
        with self.database.read() as connection:
            return read_job(connection, project, job_id)

    def states(self, job_id: str) -> list[str]:
        """The states a job went through, from its events."""
        return [event.data["to"] for event in self.events(job_id) if event.kind == "state"]

    def events(self, job_id: str) -> list[Event]:
        """All events of a job."""
        with self.database.read() as connection:
            return list_events(connection, PROJECT, job_id, after=0, limit=10_000)[0]

    def store_row(self, store: int = 1) -> Any:
        """The row of a store."""
        with self.database.read() as connection:
            statement = select(activation_stores).where(activation_stores.c.id == store_id(store))
            return connection.execute(statement).one()


def stored(number: int = 1) -> StoredActivations:
    """A store by id."""
    return StoredActivations(id=store_id(number))
