"""The collector: deletes what `garbage` finds, in the background of the dispatcher that leads.

A deletion is a state first, in a transaction that looks again whether anything needs it; then the bytes go; then comes
the next state. One that was cut off, by whatever it was, is found in its state, and gone on with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import select

from gnomon.errors import GnomonError, Unavailable
from gnomon.specs import TrainSpec
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import activation_stores, dictionaries, jobs
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.garbage import Garbage, Rules, find_garbage, has_begun
from gnomon_service.jobs import deletions
from gnomon_storage.activations import ActivationStore
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_storage.writing import leftovers
from gnomon_workers.dictionaries.folder import is_published, unpublished
from gnomon_workers.runtime.protocol import dictionary_ids

logger = logging.getLogger(__name__)

LOOK_S: Final = 5.0
"""Between two looks for deletions that somebody waits for."""
SWEEP_S: Final = 300.0
"""Between two looks for everything that may go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """Something that was deleted."""

    garbage: Garbage
    n_bytes: int

    def as_row(self) -> dict[str, Any]:
        """For people and the database: project, kind, id, why and n_bytes."""
        garbage = self.garbage
        known = {"project": garbage.project, "kind": garbage.kind, "id": garbage.id, "why": garbage.why}
        return known | {"n_bytes": self.n_bytes}


@dataclass(frozen=True, slots=True)
class Collector:
    """Looks for garbage now and then, and deletes it."""

    database: Database
    projects: str
    """URL of the folder of all projects."""
    rules: Rules = field(default_factory=Rules)
    may_collect: Callable[[], bool] = lambda: True
    """Whether this is the dispatcher that leads: two would delete the same, harmlessly, and count it twice."""
    _kept: set[str] = field(default_factory=set)
    """What was said to be kept, though it is due."""

    @contextmanager
    def running(self, *, every_s: float = LOOK_S) -> Iterator[None]:
        """Collect from a thread of its own, now and then: a store may be slow, and no job should wait for that."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop, every_s), name="collector", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5.0)  # a deletion that takes longer is cut off, and gone on with at the next start

    def due(self) -> list[Garbage]:
        """What `collect` would delete now."""
        with self.database.read() as connection:
            found = find_garbage(connection, self.rules)
            now = float(connection.execute(select(database_now())).scalar_one())  # after: some of it is due since then
            return [each for each in found if each.due_at <= now]

    def count_bytes(self, garbage: Garbage) -> int:
        """Bytes that go with it, counted in the store."""
        return _bytes_of(self._places(garbage))

    def collect(self, stop: threading.Event | None = None) -> list[Removed]:
        """Delete everything that is due; returns what was deleted. Raises Unavailable where database or store are away.

        What cannot be deleted for a reason of its own is kept, and said once.
        """
        removed: list[Removed] = []
        try:
            for garbage in self.due():
                if stop is not None and stop.is_set():
                    break
                n_bytes = self._remove(garbage)
                if n_bytes is not None and (n_bytes or garbage.kind != "leftovers"):  # most jobs leave nothing
                    removed.append(Removed(garbage=garbage, n_bytes=n_bytes))
                    logger.info("deleted", extra=removed[-1].as_row())
        finally:
            self._note(removed)
        return removed

    # ------------------------------------------------------------------------------------------ thread

    def _run(self, stop: threading.Event, every_s: float) -> None:
        swept_at: float | None = None
        while True:
            try:
                is_due = swept_at is None or time.monotonic() - swept_at >= SWEEP_S
                if (is_due or self._has_begun()) and self.may_collect():
                    self.collect(stop)
                    swept_at = time.monotonic()
            except GnomonError as error:  # the store or the database is away: the next turn finds the same
                logger.warning("nothing collected", extra={"reason": error.message})
            except Exception:  # the outermost frame of the thread: the next turn is tried all the same
                logger.exception("nothing collected")
            if stop.wait(every_s):
                return

    def _has_begun(self) -> bool:
        with self.database.read() as connection:
            return has_begun(connection)

    def _note(self, removed: list[Removed]) -> None:
        Observations(self.database).note_collection([each.as_row() for each in removed])

    # ------------------------------------------------------------------------------------------ deleting

    def _remove(self, garbage: Garbage) -> int | None:
        """Delete one thing, if it is garbage still; returns its bytes, or None where it is kept."""
        try:
            match garbage.kind:
                case "leftovers":
                    return self._remove_leftovers(garbage)
                case "store":
                    return self._remove_store(garbage)
                case "dictionary":
                    return self._remove_dictionary(garbage)
        except Unavailable:
            raise  # the rest would meet it too
        except GnomonError as error:
            self._keep(garbage, error.message)
            return None

    def _remove_store(self, garbage: Garbage) -> int | None:
        asked = {"why": garbage.why, "found_in": garbage.found_in}
        with self.database.write() as connection:
            if not deletions.begin_store_deletion(connection, garbage.project, garbage.id, **asked):
                return None
        n_bytes = self._delete(garbage)
        with self.database.write() as connection:
            deletions.end_store_deletion(connection, garbage.project, garbage.id)
        return n_bytes

    def _remove_dictionary(self, garbage: Garbage) -> int | None:
        with self.database.write() as connection:
            if not deletions.may_purge(connection, garbage.project, garbage.id):
                return None
        n_bytes = self._delete(garbage)
        with self.database.write() as connection:
            deletions.end_dictionary_deletion(connection, garbage.id)
        return n_bytes

    def _remove_leftovers(self, garbage: Garbage) -> int | None:
        job, published = self._job(garbage.id), self._dictionaries(garbage.id)
        if job["kind"] == "train" and job["state"] == "succeeded":
            missing = [url for state, url in published.values() if state == "published" and not _is_there(url)]
            if missing or not published:
                self._keep(garbage, "a dictionary of the job is not in its place; its checkpoints are the last copy")
                return None
        with self.database.write() as connection:
            if not deletions.begin_leftovers(connection, garbage.id):
                return None
        n_bytes = self._delete(garbage)
        with self.database.write() as connection:
            deletions.end_leftovers(connection, garbage.id)
        return n_bytes

    def _delete(self, garbage: Garbage) -> int:
        places = self._places(garbage)
        n_bytes = _bytes_of(places)
        for place in places:
            place.delete()
        return n_bytes

    def _places(self, garbage: Garbage) -> list[Location]:
        """All that goes, and nothing else, in the order in which it goes."""
        layout = self._layout(garbage)
        if garbage.kind == "store":
            return [self._store_place(garbage)]
        if garbage.kind == "dictionary":
            return [layout.dictionary(garbage.id)]
        job = self._job(garbage.id)
        if job["kind"] == "harvest":
            # where it is not sealed, another job makes it anew, or it is deleted as a whole
            return _spare_segments(layout.store(job["store_id"])) if self._is_sealed(job) else []
        known = self._dictionaries(garbage.id)
        # a job that came to nothing may have published a dictionary: nobody ever got to know of it
        uploads = [
            place
            for folder in map(layout.dictionary, _trained_by(job))
            for place in (unpublished(folder) if folder.name in known else [folder])
        ]
        return [*uploads, layout.checkpoints(garbage.id)]  # last: their manifests say what else there is

    def _layout(self, garbage: Garbage) -> ProjectLayout:
        return ProjectLayout.of(self.projects, garbage.project)

    # ------------------------------------------------------------------------------------------ looking

    def _keep(self, garbage: Garbage, why: str) -> None:
        if garbage.id not in self._kept:
            logger.warning("kept, though it is due", extra={"kind": garbage.kind, "id": garbage.id, "reason": why})
        self._kept.add(garbage.id)

    def _job(self, job_id: str) -> Mapping[Any, Any]:
        with self.database.read() as connection:
            return dict(connection.execute(select(jobs).where(jobs.c.id == job_id)).mappings().one())

    def _store_place(self, garbage: Garbage) -> Location:
        """Where a store lies: as its row has it, which this service wrote itself."""
        mine = (activation_stores.c.project == garbage.project) & (activation_stores.c.id == garbage.id)
        with self.database.read() as connection:
            return Location.open(connection.execute(select(activation_stores.c.location).where(mine)).scalar_one())

    def _is_sealed(self, job: Mapping[Any, Any]) -> bool:
        mine = (activation_stores.c.project == job["project"]) & (activation_stores.c.id == job["store_id"])
        with self.database.read() as connection:
            return connection.execute(select(activation_stores.c.state).where(mine)).scalar() == "sealed"

    def _dictionaries(self, job_id: str) -> dict[str, tuple[str, str]]:
        """State and place of each dictionary of a job, by id."""
        columns = (dictionaries.c.id, dictionaries.c.state, dictionaries.c.location)
        with self.database.read() as connection:
            rows = connection.execute(select(*columns).where(dictionaries.c.job_id == job_id))
            return {row.id: (row.state, row.location) for row in rows}


def _bytes_of(places: Iterable[Location]) -> int:
    return sum(sum(place.walk().values()) for place in places)


def _is_there(url: str) -> bool:
    return is_published(Location.open(url))


def _trained_by(job: Mapping[Any, Any]) -> tuple[str, ...]:
    """Ids of all dictionaries that a training makes; of a spec that cannot be read, of the first."""
    try:
        n_variants = len(TrainSpec.read(job["spec"]).variant_names)
    except ValidationError:
        n_variants = 1
    return dictionary_ids(job["dictionary_id"], n_variants)


def _spare_segments(store: Location) -> list[Location]:
    """Segments that a sealed store's manifest does not name."""
    return leftovers(store, {segment.path for segment in ActivationStore.open(store).manifest.segments})
