"""Events are kept within bounds: those of long jobs are thinned, and those of jobs that ended long ago forgotten.

What goes is read off the database each time, so whatever was cut off is gone on with. Several dispatchers may do this
at once: what one has deleted, another does not find.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self

from sqlalchemy import ColumnElement, Connection, delete, or_, select
from sqlalchemy.exc import IntegrityError

from gnomon.errors import GnomonError
from gnomon.events import TrainingMeasured
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import job_events, jobs
from gnomon_service.dispatch.thinning import Bounds, Told, is_forgotten, superfluous

logger = logging.getLogger(__name__)

EVERY_S: Final = 600.0
DAY_S: Final = 86_400.0
_N_JOBS: Final = 500
"""Jobs that the database is asked for at a time."""
_N_EVENTS: Final = 500
"""Events that are deleted in one transaction: others wait for it."""
_PAUSE_S: Final = 0.05
"""Between two transactions: on SQLite others get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job, as far as its events are concerned."""

    id: str
    ended_at: float | None
    ended_s: float | None
    """Seconds since then."""


@dataclass(frozen=True, slots=True)
class EventKeeper:
    """Looks through the events of all jobs every few minutes; several may do so at once."""

    database: Database
    bounds: Bounds
    _settled: dict[str, tuple[float | None, bool]] = field(default_factory=dict)
    """Jobs of which nothing more goes, by id: as long as they ended then, and until they are forgotten."""

    @classmethod
    def of(cls, database: Database, days: float) -> Self:
        """One that forgets the events of a job so many days after it ended; 0 = never."""
        return cls(database, Bounds(forget_after_s=days * DAY_S if days > 0 else None))

    @contextmanager
    def running(self, *, every_s: float = EVERY_S) -> Iterator[None]:
        """Keep events from a thread of its own, now and then: no job should wait for that."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop, every_s), name="event-keeper", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5.0)

    def keep(self, stop: threading.Event | None = None) -> int:
        """Delete the events that may go, until `stop` is set; returns how many."""
        stop = stop or threading.Event()
        return sum(self._thin(job, stop) for job in self._jobs() if not stop.is_set())

    def _run(self, stop: threading.Event, every_s: float) -> None:
        while True:
            try:
                n_gone = self.keep(stop)
                if n_gone:
                    logger.info("events forgotten", extra={"n_events": n_gone})
            except IntegrityError:  # its schema is of an earlier release, in which they all stay
                logger.warning("the database lets no events go; bring its schema up to date")
            except GnomonError as error:  # the database is away: the next turn finds the same
                logger.warning("no events forgotten", extra={"reason": error.message})
            except Exception:  # the outermost frame of the thread: the next turn is tried all the same
                logger.exception("no events forgotten")
            if stop.wait(every_s):
                return

    # ------------------------------------------------------------------------------------------ jobs

    def _jobs(self) -> Iterator[_Job]:
        """Jobs that may have events to spare: those with many, and those that ended long ago."""
        may = jobs.c.n_events > self.bounds.n_old
        if self.bounds.forget_after_s is not None:
            may = or_(may, jobs.c.finished_at <= database_now() - self.bounds.forget_after_s)
        age = (database_now() - jobs.c.finished_at).label("ended_s")
        statement = select(jobs.c.id, jobs.c.finished_at, age).where(may).order_by(jobs.c.id).limit(_N_JOBS)
        last = ""
        while True:
            with self.database.read() as connection:
                rows = connection.execute(statement.where(jobs.c.id > last)).all()
            if not rows:
                return
            yield from (_Job(id=row.id, ended_at=row.finished_at, ended_s=row.ended_s) for row in rows)
            last = rows[-1].id

    def _thin(self, job: _Job, stop: threading.Event) -> int:
        state = (job.ended_at, is_forgotten(self.bounds, job.ended_s))
        if self._settled.get(job.id) == state:
            return 0
        with self.database.read() as connection:
            events = read_told(connection, job.id)
        n_gone = self._forget(job.id, superfluous(events, self.bounds, ended_s=job.ended_s), stop)
        is_final = job.ended_s is not None and (state[1] or job.ended_s > self.bounds.recent_s)
        if is_final and not stop.is_set():
            self._settled[job.id] = state
        return n_gone

    def _forget(self, job_id: str, gone: Sequence[int], stop: threading.Event) -> int:
        n_gone = 0
        for first in range(0, len(gone), _N_EVENTS):
            these = (job_events.c.job_id == job_id) & job_events.c.id.in_(gone[first : first + _N_EVENTS])
            with self.database.write() as connection:
                # in their order, or two that delete the same could each wait for the other
                connection.execute(select(job_events.c.id).where(these).order_by(job_events.c.id).with_for_update())
                n_gone += connection.execute(delete(job_events).where(these)).rowcount
            if stop.wait(_PAUSE_S):
                break
        return n_gone


# ---------------------------------------------------------------------------------------------- events


def read_told(connection: Connection, job_id: str) -> list[Told]:
    """What is left of a job's events, in their order."""
    names = ("step", "done", "phase", "variant")
    fields = [_field(name).label(name) for name in names]
    columns = (job_events.c.id, job_events.c.kind, (database_now() - job_events.c.created_at).label("age_s"))
    statement = select(*columns, *fields).where(job_events.c.job_id == job_id).order_by(job_events.c.id)
    return [_told(row) for row in connection.execute(statement)]


def _field(name: str) -> ColumnElement[str]:
    """A field of what events tell, as text: whole documents of many events take long to read."""
    text: ColumnElement[str] = job_events.c.data[name].as_string()
    return text


def _told(row: Any) -> Told:
    position = _number(row.step if row.kind == TrainingMeasured.kind else row.done)
    # one that does not say where it is has a line of its own, on which it is where it came
    line = (str(row.phase), str(row.variant), str(position is None))
    return Told(
        id=row.id,
        kind=row.kind,
        age_s=row.age_s,
        line=line,
        position=float(row.id) if position is None else position,
    )


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
