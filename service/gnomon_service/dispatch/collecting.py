"""What a training that succeeded has left is deleted: its checkpoints, and what lost attempts uploaded of dictionaries.

A job that failed or was cancelled keeps its checkpoints: it may be resumed. What is to be deleted is read off the store
and the database each time, so a deletion that was cut off, by whatever it was, is gone on with.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import select

from gnomon.errors import GnomonError
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import dictionaries, jobs
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import is_published, remove_unpublished

logger = logging.getLogger(__name__)

EVERY_S: Final = 300.0
_N_ASKED: Final = 500
"""Jobs that the database is asked for at a time."""
_PROJECT: Final = re.compile(r"[A-Za-z0-9-]{1,64}")
_JOB_ID: Final = re.compile(r"job_[0-9a-z]{1,40}")


@dataclass(frozen=True, slots=True)
class Collector:
    """Looks through a store every few minutes; several may do so at once."""

    database: Database
    projects: str
    """URL of the folder of all projects."""
    _kept: set[str] = field(default_factory=set)
    """Jobs of which was said that they are kept."""

    @contextmanager
    def running(self, *, every_s: float = EVERY_S) -> Iterator[None]:
        """Collect from a thread of its own, now and then: a store may be slow, and no job should wait for that."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop, every_s), name="collector", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5.0)  # a deletion that takes longer is cut off, and gone on with at the next start

    def collect(self) -> list[str]:
        """Delete what is left of jobs that succeeded; returns their ids."""
        root = Location.open(self.projects)
        return [
            job_id
            for project in filter(_PROJECT.fullmatch, root.list())
            for job_id in self._succeeded(project, ProjectLayout(root.child(project)))
            if self._forget(job_id, ProjectLayout(root.child(project)))
        ]

    def _run(self, stop: threading.Event, every_s: float) -> None:
        while True:
            try:
                for job_id in self.collect():
                    logger.info("checkpoints of a finished training deleted", extra={"job_id": job_id})
            except GnomonError as error:  # the store or the database is away: the next turn finds the same
                logger.warning("nothing collected", extra={"reason": error.message})
            except Exception:  # the outermost frame of the thread: the next turn is tried all the same
                logger.exception("nothing collected")
            if stop.wait(every_s):
                return

    def _succeeded(self, project: str, layout: ProjectLayout) -> list[str]:
        """Jobs of the project that have checkpoints, and have succeeded."""
        left = list(filter(_JOB_ID.fullmatch, layout.all_checkpoints.list()))
        found: list[str] = []
        for first in range(0, len(left), _N_ASKED):
            job_ids = left[first : first + _N_ASKED]
            mine = (jobs.c.project == project, jobs.c.state == "succeeded", jobs.c.id.in_(job_ids))
            with self.database.read() as connection:
                found += connection.execute(select(jobs.c.id).where(*mine)).scalars()
        return found

    def _forget(self, job_id: str, layout: ProjectLayout) -> bool:
        """Delete what a job left, unless a dictionary of it is not where it should be; returns whether it did."""
        published = self._dictionaries(job_id)
        if not published or not all(is_published(Location.open(url)) for url in published.values()):
            if job_id not in self._kept:
                logger.warning("a dictionary is not in its place; checkpoints are kept", extra={"job_id": job_id})
            self._kept.add(job_id)
            return False
        for dictionary_id in published:
            remove_unpublished(layout.dictionary(dictionary_id))
        layout.checkpoints(job_id).delete()  # last: as long as they are there, the rest is looked at again
        return True

    def _dictionaries(self, job_id: str) -> dict[str, str]:
        """Where each dictionary of a job is, by id."""
        statement = select(dictionaries.c.id, dictionaries.c.location).where(dictionaries.c.job_id == job_id)
        with self.database.read() as connection:
            return {row.id: row.location for row in connection.execute(statement)}
