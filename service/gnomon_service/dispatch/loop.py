"""The dispatcher: leases jobs, runs them on a cluster, and writes down what they report.

It holds no truth. Whatever it knows is in the database or on the cluster, so it may die at any moment: its
leases pass, and the next dispatcher adopts the gangs it left running. `step` is one turn of its loop; `beat`
renews leases from another thread, because a turn may wait for the cluster longer than a lease lasts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from gnomon.errors import LeaseLost, Unavailable
from gnomon_service.dispatch.attempt import Attempts, Run
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.jobs.held import HeldJob, Lease, Wish
from gnomon_service.jobs.leases import Leases
from gnomon_service.settings import Settings
from gnomon_workers.runtime.protocol import Cluster, ClusterSnapshot, ClusterUnreachable

logger = logging.getLogger(__name__)

_OBSERVE_S = 2.0
DECIDING_SHARE: Final = 10.0
"""The next decision comes no sooner than after so many times what the last one took."""
NO_WISH: Final = Wish(cancel_requested=False, deadline_passed=False)


@dataclass(slots=True, kw_only=True)
class Dispatcher:
    """Runs the queue's jobs on one cluster."""

    leases: Leases
    observations: Observations
    scheduler: Scheduler
    cluster: Cluster
    settings: Settings
    owner: str
    """Unlike that of any other dispatcher, past or present."""
    ends_with_cluster: bool = False
    """Whether the cluster stops when this dispatcher does: its jobs are then queued again, and not left to another."""
    has_gone: threading.Event = field(default_factory=threading.Event)
    """Set where such a cluster has ended by itself: what ran there is lost."""
    clock: Callable[[], float] = time.monotonic
    _runs: dict[str, Run] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turned_at: float = field(default=0.0)
    _observed_at: float | None = None
    _snapshot: ClusterSnapshot | None = None
    _decide_at: float = 0.0
    _attempts: Attempts = field(init=False)

    def __post_init__(self) -> None:
        self._turned_at = self.clock()
        self._attempts = Attempts(
            leases=self.leases, cluster=self.cluster, settings=self.settings, clock=lambda: self.clock()
        )

    # ------------------------------------------------------------------------------------------ loop

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; then hand the leases back and leave the gangs running."""
        beats = threading.Thread(target=self._beat_until, args=(stop,), name="beats", daemon=True)
        beats.start()
        while not stop.is_set():
            try:
                self.step()
            except (Unavailable, ClusterUnreachable) as error:
                logger.warning("turn cut short", extra={"reason": str(error)})
            stop.wait(self.settings.poll_s)
        beats.join()
        self.hand_back()

    def step(self) -> None:
        """One turn: look, release what ended, adopt, watch what runs, start what is ready."""
        self._turned_at = self.clock()
        is_reachable = self._observe()
        self.leases.sweep_deadlines()
        for held in self.leases.adopt(self.owner, list(self._runs)):
            logger.info("job adopted", extra={"job_id": held.lease.job_id, "attempt": held.lease.attempt})
            self._hold(held)
        wishes = self.leases.wishes(self.owner)
        for run in self._held_runs():
            self._move_on(run, wishes.get(run.lease.job_id, NO_WISH))
        if not is_reachable:
            return
        self._release()
        self._schedule()

    def beat(self) -> None:
        """Renew every lease, unless the loop has stood still for too long: then let another take over."""
        if self.clock() - self._turned_at > self.settings.stall_s:
            logger.error("loop stands still; leases are left to pass", extra={"owner": self.owner})
            return
        for run in self._held_runs():
            try:
                self.leases.renew(run.lease)
            except LeaseLost:
                continue  # the next write of the loop meets it too, and acts on it

    def hand_back(self) -> None:
        """Let go of every lease at once; the gangs go on and are adopted, unless the cluster stops or has gone."""
        give = self.leases.hand_back
        if self.ends_with_cluster:
            give = self._lost if self.has_gone.is_set() else self._stopped
        for run in self._held_runs():
            try:
                give(run.lease)
            except (LeaseLost, Unavailable) as error:
                logger.warning("lease not handed back", extra={"job_id": run.lease.job_id, "reason": str(error)})
            self._drop(run)
        try:
            self.observations.give_up_lead(self.owner)
        except Unavailable as error:
            logger.warning("lead not given up", extra={"reason": str(error)})

    def _stopped(self, lease: Lease) -> None:
        self.leases.put_back(lease, "the service was stopped")

    def _lost(self, lease: Lease) -> None:
        self.leases.lose(lease, "the Ray of this service ended, with all that ran there")

    def _schedule(self) -> None:
        """Start what can be started, if this is the dispatcher that leads; a decision may cost a tenth of the time."""
        began = self.clock()
        if self._snapshot is None or began < self._decide_at:
            return
        if not self.observations.lead(self.owner, self.settings.lease_s):
            return
        starts = self.scheduler.turn(self._snapshot)
        self._decide_at = began + DECIDING_SHARE * (self.clock() - began)
        for job_id, placement in starts:
            claimed = self.leases.claim(self.owner, job_id, placement)
            if claimed is not None:
                logger.info("job claimed", extra={"job_id": job_id, "attempt": claimed.lease.attempt})
                self._move_on(self._hold(claimed), NO_WISH)

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(self.settings.beat_s):
            try:
                self.beat()
            except Unavailable as error:
                logger.warning("leases not renewed", extra={"reason": str(error)})

    # ------------------------------------------------------------------------------------------ bookkeeping

    def _move_on(self, run: Run, wish: Wish) -> None:
        try:
            self._attempts.move_on(run, wish)
        finally:
            if run.is_over:
                self._drop(run)

    def _observe(self) -> bool:
        """Note the cluster's resources now and then; whether the cluster answers."""
        now = self.clock()
        if self._observed_at is not None and now - self._observed_at < _OBSERVE_S:
            return True
        try:
            snapshot = self.cluster.snapshot()
        except ClusterUnreachable as error:
            logger.warning("cluster unreachable", extra={"reason": str(error)})
            self.observations.note(None)
            return False
        self.observations.note(snapshot)
        self._observed_at, self._snapshot = now, snapshot
        return True

    def _release(self) -> None:
        """Free what ended attempts hold on the cluster, also those of dispatchers that died."""
        for job_id, attempt in self.leases.unreleased():
            self.cluster.kill(job_id, attempt)
            self.leases.mark_released([(job_id, attempt)])

    def _hold(self, held: HeldJob) -> Run:
        run = Run.of(held)
        with self._lock:
            self._runs[held.lease.job_id] = run
        return run

    def _drop(self, run: Run) -> None:
        with self._lock:
            self._runs.pop(run.lease.job_id, None)

    def _held_runs(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())
