"""The supervisor: one detached Ray actor for each attempt, which runs the job and keeps what it has to say.

Where a store is away or full the attempt waits, without its gang, and goes on from what it has committed: that costs no
attempt, however long it lasts.

It outlives the dispatcher that started it, owns every other actor of the attempt, and is the only one that the
dispatcher talks to: a dispatcher that comes back finds it by name and goes on polling from the last report it stored.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import ValidationError

from gnomon.errors import InvalidRequest, Unavailable
from gnomon.events import Logged
from gnomon.specs import EvaluateSpec, HarvestSpec, Spec, TrainSpec
from gnomon.specs.base import unread_fields
from gnomon.specs.problems import explain
from gnomon_workers.evaluate.job import run_evaluate
from gnomon_workers.harvest.job import run_harvest
from gnomon_workers.runtime.faults import own_fault, summary, trace
from gnomon_workers.runtime.protocol import Assignment, Outcome, Poll
from gnomon_workers.runtime.reporting import Cancelled, Left, Reporter, WorkerLost
from gnomon_workers.train.job import run_train

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 120.0
"""Pauses while a store is away double from the first to the longest; after something was committed they begin anew."""
RUNNERS: Final[Mapping[str, tuple[type[Spec], Callable[[Assignment, Reporter], Mapping[str, Any]]]]] = {
    "harvest": (HarvestSpec, run_harvest),
    "train": (TrainSpec, run_train),
    "evaluate": (EvaluateSpec, run_evaluate),
}


class Supervisor:
    """Runs one attempt in a thread, and answers polls meanwhile."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._reporter = Reporter()
        self._outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Answers once the actor is placed."""
        return True

    def poll(self, after: int) -> Poll:
        """Reports with a number above `after`, and the outcome once there is one.

        Those up to `after` are forgotten: whoever asks has them in the database, and so has whoever comes after it.
        """
        self._reporter.acknowledge(after)
        # The outcome is read first: reports made before it are then never missed.
        outcome = self._outcome
        return Poll(reports=self._reporter.after(after), outcome=outcome, places=self._reporter.places)

    def cancel(self) -> None:
        """Ask the job to stop."""
        self._reporter.cancel()

    def leave(self) -> None:
        """Ask the job to save what it has and end."""
        self._reporter.leave()

    def resize(self, places: tuple[str, ...]) -> None:
        """Ask an elastic job to hold these devices, as soon as it can."""
        self._reporter.places_wanted = places

    def _run(self) -> None:
        kind, runner = RUNNERS[self._assignment.kind]
        try:
            self._check_spec(kind)
            result = self._patiently(lambda: runner(self._assignment, self._reporter))
            self._outcome = Outcome(status="succeeded", result=dict(result))
        except Cancelled:
            self._outcome = Outcome(status="cancelled")
        except Left:
            self._outcome = Outcome(status="left")
        except WorkerLost as error:
            self._outcome = Outcome(status="lost", code="worker_lost", message=str(error))
        except Exception as error:
            # The outermost loop of the attempt: whatever it is, the dispatcher must hear of it.
            self._outcome = self._ended_by(error)

    def _patiently(self, run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What the job gives, begun again after a pause as often as something that it needs is away."""
        pause_s = FIRST_PAUSE_S
        while True:
            n_kept = self._reporter.n_kept
            try:
                return run()
            except Exception as error:
                why = own_fault(error)
                if not isinstance(why, Unavailable):
                    raise
                if self._reporter.n_kept > n_kept:
                    pause_s = FIRST_PAUSE_S
                logger.warning("waiting", extra={"job_id": self._assignment.job_id, "reason": why.message})
                self._reporter.waiting(why, retry_in_s=pause_s)
            self._reporter.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _ended_by(self, error: Exception) -> Outcome:
        """The outcome of an attempt that an error ended; traces of what nobody meant to raise are logged."""
        fault = own_fault(error)
        if fault is None:
            logger.error("attempt lost", exc_info=error, extra={"job_id": self._assignment.job_id})
            self._reporter.report(Logged(level="error", message=trace(error)))
            return Outcome(status="lost", code="internal", message=summary(error))
        if "trace" in fault.detail:
            logger.error("attempt failed", exc_info=error, extra={"job_id": self._assignment.job_id})
            self._reporter.report(Logged(level="error", message=str(fault.detail["trace"])))
        return Outcome(status="failed", code=fault.code, message=fault.message)

    def _check_spec(self, kind: type[Spec]) -> None:
        """Raise InvalidRequest where the spec, of another release, cannot be read; say what of it has no effect."""
        data = self._assignment.spec
        try:
            spec = kind.read(data)
        except ValidationError as error:
            raise InvalidRequest(
                f"these workers cannot read the job's spec ({explain(error, data, kind)}); the service is of another "
                "release: run both from the same one, and submit the job again",
                code="unreadable_spec",
            ) from error
        for path in unread_fields(data, spec.model_dump(mode="json")):
            message = f"{path} is a field that these workers do not know: it has no effect; the service is newer"
            self._reporter.report(Logged(level="warning", message=message))
