"""Clients and dispatchers of the release before the scheduler, and upgrades, as processes of their own."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

from sqlalchemy.exc import IntegrityError

from gnomon.errors import Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.upgrading import upgrade
from gnomon_workers.runtime.protocol import Assignment
from tests.support.chaos_children import Diary, stop_on_sigterm
from tests.support.old_release import OldRelease, Taken, spec_of
from tests.support.service_jobs import PROJECT
from tests.support.waiting import LIMIT_S
from tests.support.working_cluster import RemoteCluster

N_HELD: Final = 6


def migrate_once(is_ready: Event, url: str) -> None:
    """Bring a database up to date, as `gnomon db upgrade` does."""
    database = Database(url)
    is_ready.set()
    upgrade(database)
    database.close()


def submit_as_before(is_ready: Event, url: str, diary_path: Path, name: str, n_stores: int, pause_s: float) -> None:
    """Send requests one after the other, each until it is answered."""
    stop = stop_on_sigterm(is_ready)
    diary, queue, number = Diary(diary_path), OldRelease(Database(url, busy_timeout_s=LIMIT_S)), 0
    while not stop.wait(pause_s):
        key = f"{name}-{number}"
        diary.write("sent", key)
        try:
            diary.write("answer", key, queue.submit(key, n_stores))
        except Unavailable:
            diary.write("unavailable", key)
            continue
        number += 1


def dispatch_as_before(is_ready: Event, url: str, port: int, diary_path: Path, owner: str, lease_s: float) -> None:
    """Run jobs until SIGTERM, then hand their leases back; that a claim was refused is in the diary."""
    stop = stop_on_sigterm(is_ready)
    queue = OldRelease(Database(url, busy_timeout_s=LIMIT_S))
    old = OldDispatcher(queue, RemoteCluster(port), owner, lease_s)
    while not stop.wait(0.02):
        try:
            old.step()
        except Unavailable:
            continue
        except IntegrityError as error:
            if old.is_claiming:
                Diary(diary_path).write("refused", owner, str(error.orig).splitlines()[0].replace(" ", "_"))
            old.is_claiming = False
    for taken in old.held:
        queue.hand_back(taken, owner)


class OldDispatcher:
    """One that claims whatever is ready and knows nothing of devices."""

    def __init__(self, queue: OldRelease, cluster: RemoteCluster, owner: str, lease_s: float) -> None:
        self._queue = queue
        self._cluster = cluster
        self._owner = owner
        self._lease_s = lease_s
        self.held: dict[Taken, int] = {}
        """And how many reports of each are stored."""
        self.is_claiming = True

    def step(self) -> None:
        """Move on what is held, and take one more."""
        for taken in list(self.held):
            self._move_on(taken)
        if not self.is_claiming or len(self.held) >= N_HELD:
            return
        taken_now = self._queue.claim(self._owner, self._lease_s)
        if taken_now is not None:
            self._cluster.start(assignment_of(taken_now))
            self._queue.start(taken_now)
            self.held[taken_now] = 0

    def _move_on(self, taken: Taken) -> None:
        if not self._queue.renew(taken, self._owner, self._lease_s):
            del self.held[taken]
            return
        poll = self._cluster.poll(taken.id, taken.attempt, self.held[taken])
        if poll is None:
            return
        if poll.reports:
            told = [dict(report.data) for report in poll.reports]
            if self._queue.record(taken, self._owner, told, self.held[taken]):
                self.held[taken] += len(told)
        if poll.outcome is not None and poll.outcome.status == "succeeded":
            self._queue.end(taken, "succeeded")
            self._cluster.kill(taken.id, taken.attempt)
            self._queue.release(taken)
            del self.held[taken]
        elif poll.outcome is not None:  # holding it on, this one would claim no more, and never be refused
            self._queue.hand_back(taken, self._owner)
            del self.held[taken]


def assignment_of(taken: Taken) -> Assignment:
    """What such a dispatcher gives a cluster: no devices."""
    made = Assignment(
        job_id=taken.id,
        attempt=taken.attempt,
        project=PROJECT,
        kind="harvest",
        spec=spec_of(taken.kind),
        storage_root="file:///store",
        input_roots=(),
        store_id=taken.store_id,
        dictionary_id=taken.dictionary_id,
    )
    return made if taken.kind == "harvest" else replace(made, kind="train")
