"""One attempt at one job, from its start on the cluster to its end: what the dispatcher does with it in each turn."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self, assert_never

from gnomon.errors import GnomonError, LeaseLost, Unavailable
from gnomon_service.jobs.held import HeldJob, Lease, Wish
from gnomon_service.jobs.leases import Leases
from gnomon_service.settings import Settings
from gnomon_storage.layout import ProjectLayout
from gnomon_workers.runtime.protocol import Assignment, AttemptDied, Cluster, ClusterUnreachable, Outcome

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Run:
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
    is_over: bool = False
    """Whether it is no longer this dispatcher's."""

    @classmethod
    def of(cls, held: HeldJob) -> Self:
        """A job that was just claimed or adopted."""
        return cls(held=held, is_started=held.is_running, last_seq=held.last_report_seq, places=held.places)

    @property
    def lease(self) -> Lease:
        """The right to write for it."""
        return self.held.lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Moves jobs on that are held; a run that is over is not to be moved on again."""

    leases: Leases
    cluster: Cluster
    settings: Settings
    clock: Callable[[], float]

    def move_on(self, run: Run, wish: Wish) -> None:
        """Move one job on; whatever goes wrong with it is noted on it, and harms no other."""
        job = {"job_id": run.lease.job_id, "attempt": run.lease.attempt}
        try:
            self._advance(run, wish)
        except ClusterUnreachable as error:
            logger.warning("cluster unreachable; the job is left alone", extra={**job, "reason": str(error)})
        except AttemptDied as error:
            self._lose(run, str(error))
        except LeaseLost as error:
            self._let_go(run, error)
        except Unavailable:
            raise
        except GnomonError as error:
            self._fail(run, code=error.code, message=error.message)
        except Exception as error:  # the outermost frame of an attempt: one job must not stop the others
            logger.exception("attempt lost", extra=job)
            self._lose(run, f"{type(error).__name__}: {error}")

    def _advance(self, run: Run, wish: Wish) -> None:
        if wish.deadline_passed:
            self._fail(run, code="deadline_exceeded", message="the deadline passed before the job was done")
            return
        if not run.is_started:
            if wish.cancel_requested:
                self._end(run, "cancelled", partial(self.leases.cancelled, run.lease))
                return
            if wish.leave_why is not None:
                self._end(run, f"left: {wish.leave_why}", partial(self.leases.put_back, run.lease, wish.leave_why))
                return
            self._start(run)
        self._watch(run, wish)

    def _start(self, run: Run) -> None:
        self.leases.renew(run.lease)  # a dispatcher that slept since its claim must not begin a stale attempt
        self.cluster.start(make_assignment(run.held, self.settings))
        self.leases.mark_running(run.lease)
        run.is_started = True

    def _watch(self, run: Run, wish: Wish) -> None:
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

    def _let_leave(self, run: Run, why: str) -> None:
        """Ask a job to save what it has and leave; after the grace, put it back with what it had saved before."""
        if run.asked_to_leave_at is None:
            self.cluster.leave(run.lease.job_id, run.lease.attempt)
            run.asked_to_leave_at = self.clock()
        elif self.clock() - run.asked_to_leave_at >= self.settings.leave_grace_s:
            self.cluster.kill(run.lease.job_id, run.lease.attempt)
            late = f"{why}; it did not save in {self.settings.leave_grace_s:g} s: what came after its last save is lost"
            self._end(run, f"put back: {late}", partial(self.leases.put_back, run.lease, late))

    def _stop(self, run: Run) -> None:
        """Ask a job to stop, once; after the grace, end it."""
        if run.cancelled_at is None:
            self.cluster.cancel(run.lease.job_id, run.lease.attempt)
            run.cancelled_at = self.clock()
        elif self.clock() - run.cancelled_at >= self.settings.cancel_grace_s:
            self.cluster.kill(run.lease.job_id, run.lease.attempt)
            self._end(run, "cancelled", partial(self.leases.cancelled, run.lease))

    def _settle(self, run: Run, outcome: Outcome, wish: Wish, *, is_cancelled: bool) -> None:
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

    def _fail(self, run: Run, *, code: str, message: str) -> None:
        write = partial(self.leases.fail, run.lease, code=code, message=message)
        self._end(run, f"failed ({code}): {message}", write)

    def _lose(self, run: Run, message: str) -> None:
        self._end(run, f"lost: {message}", partial(self.leases.lose, run.lease, message))

    def _end(self, run: Run, how: str, write: Callable[[], None]) -> None:
        """Write how an attempt ended, then forget it; the next turn releases what it left behind."""
        try:
            write()
        except LeaseLost as error:
            self._let_go(run, error)
            return
        job = {"job_id": run.lease.job_id, "attempt": run.lease.attempt}
        logger.info("attempt ended", extra={**job, "how": how})
        run.is_over = True

    def _let_go(self, run: Run, error: LeaseLost) -> None:
        """Forget a job that is no longer ours; end its gang, unless another dispatcher adopted it."""
        logger.warning("lease lost", extra={"job_id": run.lease.job_id, "attempt": run.lease.attempt})
        run.is_over = True
        if not error.detail.get("is_adopted"):
            self.cluster.kill(run.lease.job_id, run.lease.attempt)


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
