"""A database, a cluster that works, and processes that come and go."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Select, func, select

from gnomon.errors import Unavailable
from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import job_events, jobs
from tests.chaos.history import check, check_reports
from tests.chaos.reading import HELD, History, read_history
from tests.support.api_process import ApiProcess
from tests.support.chaos_children import (
    Child,
    Diary,
    collect_for_ever,
    dispatch,
    in_other_times,
    post_for_ever,
    submit_for_ever,
    submit_one,
)
from tests.support.service_jobs import Bench
from tests.support.waiting import LIMIT_S, wait_until
from tests.support.working_cluster import DIED, Habits, WorkingCluster, serving_cluster

T = TypeVar("T")
LEASE_S = 1.0
N_STORES = 40
N_BETWEEN_DRAINS = 50
"""Faults after which a queue that only grows is drained: deciding about it takes ever longer."""


@dataclass(slots=True, kw_only=True)
class Scene:
    """What one fault happens to."""

    url: str
    """Where this test reaches the database."""
    their_url: str
    """Where the children do."""
    home: Path
    cluster: WorkingCluster
    port: int
    bench: Bench
    diary: Diary
    children: list[Child] = field(default_factory=list)
    n_dispatchers: int = 0

    def new_dispatcher(self, lease_s: float = LEASE_S, *, off_h: tuple[float, ...] = ()) -> Child:
        """Begin a dispatcher under an owner of its own; off_h: by how many hours its clock is off, in turn."""
        self.n_dispatchers += 1
        owner = f"dispatcher-{self.n_dispatchers}"
        return self._begin(owner, off_h, dispatch, self.their_url, self.port, self.home, owner, lease_s)

    def new_client(self, pause_s: float = 0.01, *, off_h: tuple[float, ...] = ()) -> Child:
        """Begin a client that goes on where the last one was cut off."""
        return self._begin("client", off_h, submit_for_ever, self.their_url, self.diary.path, N_STORES, pause_s)

    def new_api_client(self, api: ApiProcess, pause_s: float = 0.01) -> Child:
        """Begin a client of an API."""
        return self._begin("client", (), post_for_ever, api.url, api.key, api.inputs, self.diary.path, pause_s)

    def submit(self, n_jobs: int) -> None:
        """Send so many requests, which must be answered."""
        first = len(self.diary.sent().keys)
        for key in (f"key-{first + n}" for n in range(n_jobs)):
            assert submit_one(self.bench, self.diary, key, N_STORES), self.diary.lines()[-1]

    def wait_for_work(self, look: Callable[[], T | None]) -> T:
        """Wait until a look finds what it looks for, and send more while nothing is to do: some of it ends at once."""

        def look_or_send() -> T | None:
            if not (found := look()) and not self.n_in("queued", *HELD):
                self.submit(4)
            return found

        return wait_until(look_or_send, "a job that is held", every_s=0.01)

    def n_in(self, *states: str) -> int:
        """Jobs that are in one of these states."""
        return self._count(select(func.count()).select_from(jobs).where(jobs.c.state.in_(states)))

    def n_submitted(self) -> int:
        """Jobs that were asked for."""
        return self._count(select(func.count()).select_from(jobs).where(jobs.c.made_for.is_(None)))

    def n_written(self, keys: Collection[str]) -> int:
        """Jobs that came with one of these keys."""
        return self._count(select(func.count()).select_from(jobs).where(jobs.c.idempotency_key.in_(keys)))

    def n_ended(self) -> int:
        """Jobs that have ended."""
        return self.n_in(*TERMINAL_STATES)

    def n_held(self) -> int:
        """Jobs that a dispatcher holds."""
        return self.n_in(*HELD)

    def held_by(self, owner: str) -> set[str]:
        """Jobs that a dispatcher holds, as the database has it."""
        mine = select(jobs.c.id).where(jobs.c.lease_owner == owner, jobs.c.state.in_(HELD))
        with self.bench.database.read() as connection:
            return set(connection.execute(mine).scalars())

    def n_adopted(self) -> int:
        """How often a job was taken over."""
        taken = job_events.c.data["message"].as_string().startswith("taken over")
        return self._count(select(func.count()).select_from(job_events).where(job_events.c.kind == "log", taken))

    def n_refused(self) -> int:
        """How often a dispatcher found that a job was no longer its own."""
        return sum(path.read_text().count("lease lost") for path in self.home.glob("dispatcher-*.log"))

    def drain(self, *, may_lose: Set[str] = frozenset({DIED})) -> History:
        """Let a dispatcher finish all that there is, then check everything that can be seen.

        may_lose: why attempts may have been lost.
        """
        dispatcher = self.new_dispatcher()
        while n_open := self.n_in("queued", *HELD):
            wait_until(lambda n=n_open: self.n_in("queued", *HELD) < n, f"the end of one of {n_open} jobs")  # type: ignore[misc]
        wait_until(lambda: not self.bench.leases.unreleased(), "what has ended is not released")
        dispatcher.stop()
        history = read_history(self.bench.database, self.diary.sent())
        check(history)
        check_reports(history)
        assert self.cluster.attempts == {}, "something was left running"
        lost = {row["message"] for tries in history.attempts.values() for row in tries if row["state"] == "lost"}
        assert lost <= may_lose, f"a fault of the service's cost jobs an attempt: {lost}"
        return history

    def new_collector(self, kept_s: float) -> Child:
        """Begin a process that deletes what ended so many seconds ago."""
        return self._begin("collector", (), collect_for_ever, self.their_url, self.bench.projects, kept_s)

    def _begin(self, name: str, off_h: tuple[float, ...], target: Callable[..., None], *args: object) -> Child:
        child = Child.begin(name, in_other_times, off_h, target, *args) if off_h else Child.begin(name, target, *args)
        self.children.append(child)
        return child

    def _count(self, statement: Select[int]) -> int:
        """A number, waited for while the database is away."""

        def look() -> tuple[int] | None:
            with suppress(Unavailable), self.bench.database.read() as connection:
                return (connection.execute(statement).scalar_one(),)
            return None

        return wait_until(look, "the database")[0]


@contextmanager
def scene_of(
    url: str,
    home: Path,
    *,
    their_url: str | None = None,
    habits: Habits | None = None,
    cluster: WorkingCluster | None = None,
) -> Iterator[Scene]:
    """A scene on a database that has its schema; no child outlives it."""
    cluster = cluster or WorkingCluster(habits or Habits())
    database = Database(url, busy_timeout_s=LIMIT_S)
    with serving_cluster(cluster) as port:
        scene = Scene(
            url=url,
            their_url=their_url or url,
            home=home,
            cluster=cluster,
            port=port,
            bench=Bench(database, projects=f"file://{home}/projects"),
            diary=Diary(home / "diary"),
        )
        try:
            yield scene
        finally:
            for child in scene.children:
                with suppress(AssertionError):  # most have ended
                    child.send(signal.SIGKILL)
                child.process.join(LIMIT_S)
            database.close()


def counts_of(scene: Scene, history: History) -> dict[str, int]:
    """What every fault's line ends with; the checker has failed before anything but 0 is lost or phantom."""
    sent = scene.diary.sent()
    answered = {job_id for _, job_id in sent.answers}
    asked_for = {job_id for job_id, job in history.jobs.items() if job["made_for"] is None}
    return {
        "submitted": len(sent.keys),
        "acknowledged": len(answered),
        "jobs": len(asked_for),
        "attempts": sum(map(len, history.attempts.values())),
        "lost": len(answered - asked_for),
        "phantom": sum(history.jobs[job_id]["idempotency_key"] not in sent.keys for job_id in asked_for),
    }
