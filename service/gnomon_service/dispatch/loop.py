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
from functools import partial
from typing import Final, assert_never

from gnomon.errors import GnomonError, LeaseLost, Unavailable
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.jobs.held import HeldJob, Lease, Wish
from gnomon_service.jobs.leases import Leases
from gnomon_service.settings import Settings
from gnomon_storage.layout import ProjectLayout
from gnomon_workers.runtime.protocol import Assignment, Cluster, ClusterSnapshot, ClusterUnreachable, Outcome

logger = logging.getLogger(__name__)

_OBSERVE_S = 2.0
DECIDING_SHARE: Final = 10.0
"""The next decision comes no sooner than after so many times what the last one took."""
_NO_WISH = Wish(cancel_requested=False, deadline_passed=False)


@dataclass(slots=True, kw_only=True)
class _Run:
    """A job that this dispatcher holds."""

    held: HeldJob
    is_started: bool
    last_seq: int
    places: tuple[str, ...] = ()
    """The node of each device that it holds, as the database has it."""
    cancelled_at: float | None = None
    """When the cluster was asked to stop it, by the monotonic clock."""
    asked_to_leave_at: float | None = None
    """When the cluster was asked to let it save what it has and leave."""
    places_asked: tuple[str, ...] | None = None
    """Devices that it was asked to hold."""

    @property
    def lease(self) -> Lease:
        return self.held.lease


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
    clock: Callable[[], float] = time.monotonic
    _runs: dict[str, _Run] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _turned_at: float = field(default=0.0)
    _observed_at: float | None = None
    _snapshot: ClusterSnapshot | None = None
    _decide_at: float = 0.0

    def __post_init__(self) -> None:
        self._turned_at = self.clock()

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
            self._guard(run, wishes.get(run.lease.job_id, _NO_WISH))
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
        """Let go of every lease at once; the gangs go on and are adopted, unless the cluster stops too."""
        give = self._stopped if self.ends_with_cluster else self.leases.hand_back
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
                self._guard(self._hold(claimed), _NO_WISH)

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(self.settings.beat_s):
            try:
                self.beat()
            except Unavailable as error:
                logger.warning("leases not renewed", extra={"reason": str(error)})

    # ------------------------------------------------------------------------------------------ one job

    def _guard(self, run: _Run, wish: Wish) -> None:
        """Move one job on; whatever goes wrong with it is noted on it, and harms no other."""
        job = {"job_id": run.lease.job_id, "attempt": run.lease.attempt}
        try:
            self._advance(run, wish)
        except ClusterUnreachable as error:
            logger.warning("cluster unreachable; the job is left alone", extra={**job, "reason": str(error)})
        except LeaseLost as error:
            self._let_go(run, error)
        except Unavailable:
            raise
        except GnomonError as error:
            self._fail(run, code=error.code, message=error.message)
        except Exception as error:  # the outermost frame of an attempt: one job must not stop the others
            logger.exception("attempt lost", extra=job)
            self._lose(run, f"{type(error).__name__}: {error}")

    def _advance(self, run: _Run, wish: Wish) -> None:
        if wish.deadline_passed:
            self._fail(run, code="deadline_exceeded", message="the deadline passed before the job was done")
            return
        if not run.is_started:
            if wish.cancel_requested:
                self._end(run, "cancelled", partial(self.leases.cancelled, run.lease))
                return
            self._start(run)
        self._watch(run, wish)

    def _start(self, run: _Run) -> None:
        self.leases.renew(run.lease)  # a dispatcher that slept since its claim must not begin a stale attempt
        self.cluster.start(make_assignment(run.held, self.settings))
        self.leases.mark_running(run.lease)
        run.is_started = True

    def _watch(self, run: _Run, wish: Wish) -> None:
        is_cancelled = wish.cancel_requested or run.cancelled_at is not None
        try:
            poll = self.cluster.poll(run.lease.job_id, run.lease.attempt, run.last_seq)
        except ClusterUnreachable:
            if is_cancelled:
                self._stop(run)  # a supervisor that stands still cannot keep its job from being cancelled
            raise
        if poll is None:
            self._lose(run, "the cluster no longer knows the attempt")
            return
        if poll.reports:
            reports = [(report.seq, report.kind, report.data) for report in poll.reports]
            run.last_seq = self.leases.record(run.lease, reports)
        if poll.places is not None and poll.places != run.places:
            self.leases.place(run.lease, poll.places)
            run.places = poll.places
        if poll.outcome is not None:
            self._settle(run, poll.outcome, wish, is_cancelled=is_cancelled)
        elif is_cancelled:
            self._stop(run)
        elif wish.leave_why is not None:
            self._let_leave(run, wish.leave_why)
        elif wish.places is not None and wish.places != run.places_asked:
            self.cluster.resize(run.lease.job_id, run.lease.attempt, wish.places)
            run.places_asked = wish.places

    def _let_leave(self, run: _Run, why: str) -> None:
        """Ask a job to save what it has and leave; after the grace, put it back with what it had saved before."""
        if run.asked_to_leave_at is None:
            self.cluster.leave(run.lease.job_id, run.lease.attempt)
            run.asked_to_leave_at = self.clock()
        elif self.clock() - run.asked_to_leave_at >= self.settings.leave_grace_s:
            self.cluster.kill(run.lease.job_id, run.lease.attempt)
            late = f"{why}; it did not save in {self.settings.leave_grace_s:g} s: what came after its last save is lost"
            self._end(run, f"put back: {late}", partial(self.leases.put_back, run.lease, late))

    def _stop(self, run: _Run) -> None:
        """Ask a job to stop, once; after the grace, end it."""
        if run.cancelled_at is None:
            self.cluster.cancel(run.lease.job_id, run.lease.attempt)
            run.cancelled_at = self.clock()
        elif self.clock() - run.cancelled_at >= self.settings.cancel_grace_s:
            self.cluster.kill(run.lease.job_id, run.lease.attempt)
            self._end(run, "cancelled", partial(self.leases.cancelled, run.lease))

    def _settle(self, run: _Run, outcome: Outcome, wish: Wish, *, is_cancelled: bool) -> None:
        message = outcome.message or "no reason was given"
        match outcome.status:
            case "succeeded":
                self._end(run, "succeeded", partial(self.leases.succeed, run.lease, outcome.result))
            case "failed":
                self._fail(run, code=outcome.code or "job_failed", message=message)
            case "cancelled" if is_cancelled:
                self._end(run, "cancelled", partial(self.leases.cancelled, run.lease))
            case "left" if wish.leave_why is not None:
                self._end(run, f"left: {wish.leave_why}", partial(self.leases.put_back, run.lease, wish.leave_why))
            case "lost" | "cancelled" | "left":
                self._lose(run, message)
            case _:
                assert_never(outcome.status)

    def _fail(self, run: _Run, *, code: str, message: str) -> None:
        write = partial(self.leases.fail, run.lease, code=code, message=message)
        self._end(run, f"failed ({code}): {message}", write)

    def _lose(self, run: _Run, message: str) -> None:
        self._end(run, f"lost: {message}", partial(self.leases.lose, run.lease, message))

    def _end(self, run: _Run, how: str, write: Callable[[], None]) -> None:
        """Write how an attempt ended, then forget it; the next turn releases what it left behind."""
        try:
            write()
        except LeaseLost as error:
            self._let_go(run, error)
            return
        job = {"job_id": run.lease.job_id, "attempt": run.lease.attempt}
        logger.info("attempt ended", extra={**job, "how": how})
        self._drop(run)

    def _let_go(self, run: _Run, error: LeaseLost) -> None:
        """Forget a job that is no longer ours; end its gang, unless another dispatcher adopted it."""
        logger.warning("lease lost", extra={"job_id": run.lease.job_id, "attempt": run.lease.attempt})
        self._drop(run)
        if not error.detail.get("is_adopted"):
            self.cluster.kill(run.lease.job_id, run.lease.attempt)

    # ------------------------------------------------------------------------------------------ bookkeeping

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

    def _hold(self, held: HeldJob) -> _Run:
        run = _Run(held=held, is_started=held.is_running, last_seq=held.last_report_seq, places=held.places)
        with self._lock:
            self._runs[held.lease.job_id] = run
        return run

    def _drop(self, run: _Run) -> None:
        with self._lock:
            self._runs.pop(run.lease.job_id, None)

    def _held_runs(self) -> list[_Run]:
        with self._lock:
            return list(self._runs.values())


def make_assignment(held: HeldJob, settings: Settings) -> Assignment:
    """What the workers need to know of a job."""
    return Assignment(
        job_id=held.lease.job_id,
        attempt=held.lease.attempt,
        project=held.project,
        kind=held.kind,
        spec=held.spec,
        storage_root=ProjectLayout.of(settings.project_root, held.project).root.url,
        input_roots=settings.input_roots,
        store_id=held.store_id,
        dictionary_id=held.dictionary_id,
        places=held.places,
        mesh=held.mesh,
    )
