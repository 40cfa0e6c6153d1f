"""What a job tells the dispatcher while it runs: a buffer of reports, written by the job and polled from outside."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from gnomon.errors import GnomonError
from gnomon.events import (
    CheckpointSaved,
    EventData,
    Logged,
    PhaseBegan,
    Progressed,
    SegmentCommitted,
    event_json,
)
from gnomon_workers.runtime.protocol import Report

_PROGRESS_SHARE: Final = 1 / 200
_PROGRESS_MIN_S: Final = 0.4
_PROGRESS_MAX_S: Final = 15.0
"""Seconds between progress reports: a 200th of the phase so far, within these bounds."""


class Ended(Exception):
    """An attempt ends, by no fault of the job's: whatever goes on after errors lets this pass."""


class Cancelled(Ended):
    """The user asked the job to stop."""


class Left(Ended):
    """The job was asked to leave, and has saved what it had."""


class WorkerLost(Ended):
    """A worker died, hung or could not be placed: an infrastructure loss, the attempt is run again."""


class Reporter:
    """Reports of one attempt, numbered from 1; safe to use from several threads.

    Reports are kept until whoever asks has stored them: a dispatcher that comes back asks again from the last one it
    stored.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: deque[Report] = deque()
        self._last_seq = 0
        self._cancelled = threading.Event()
        self._leaving = threading.Event()
        self._stopped = threading.Event()
        self.places_wanted: tuple[str, ...] | None = None
        """Devices that an elastic job shall hold, once that was said."""
        self.places: tuple[str, ...] | None = None
        """Devices that it holds; None where it keeps what it was given."""
        self._phase = PhaseBegan(phase="")
        self._phase_began = self._progress_due = 0.0
        self._n_kept = 0

    @property
    def n_kept(self) -> int:
        """Reports of what another attempt need not do again: segments and checkpoints."""
        return self._n_kept

    def report(self, told: EventData) -> None:
        """Add a report of what happened."""
        self._add(told.kind, event_json(told))

    def pass_on(self, report: Report) -> None:
        """Add what another reporter said, under a number of this one."""
        self._add(report.kind, report.data)

    def _add(self, kind: str, data: Mapping[str, Any]) -> None:
        with self._lock:
            self._n_kept += kind == CheckpointSaved.kind or (kind == SegmentCommitted.kind and not data["kept"])
            self._last_seq += 1
            self._reports.append(Report(seq=self._last_seq, kind=kind, data=data))

    def phase(self, name: str, *, total: int | None, unit: str, variant: str = "") -> None:
        """Enter a phase: "harvest", "train", "evaluate" or "export"; the last two may be of one variant of several."""
        self._phase = PhaseBegan(phase=name, total=total, unit=unit, variant=variant or None)
        self._phase_began = time.monotonic()
        self._progress_due = 0.0
        self.report(self._phase)
        self.progress(0)

    def progress(self, done: int, *, rate: float | None = None) -> None:
        """Say how many units of the present phase are done, and how many a second lately.

        Every report is stored for ever, so they come less often the longer the phase lasts; the last is always kept.
        """
        now = time.monotonic()
        if now < self._progress_due and done != self._phase.total:
            return
        age_s = now - self._phase_began
        self._progress_due = now + min(max(age_s * _PROGRESS_SHARE, _PROGRESS_MIN_S), _PROGRESS_MAX_S)
        self.report(Progressed(**self._phase.known(), done=done, rate=rate))

    def waiting(self, why: GnomonError, *, retry_in_s: float | None = None) -> None:
        """Say that nothing can be done now, and why; what is done next is said by the next phase."""
        again = "" if retry_in_s is None else f"; trying again in {retry_in_s:.0f} s"
        self.report(Logged(level="warning", message=f"waiting ({why.code}): {why.message}{again}"))
        self.report(Progressed(phase="waiting", done=0, code=why.code, message=why.message))

    def resume(self) -> None:
        """Say that the present phase, in which was waited, goes on."""
        self.report(self._phase)
        self.report(Progressed(**self._phase.known(), done=0))

    def wait(self, seconds: float) -> None:
        """Let time pass; raises Cancelled or Left as soon as the job is asked to stop."""
        self._stopped.wait(seconds)
        self.check()

    def after(self, seq: int) -> tuple[Report, ...]:
        """Reports with a number above seq, oldest first, as far as they were not acknowledged."""
        with self._lock:
            return tuple(report for report in self._reports if report.seq > seq)

    def acknowledge(self, seq: int) -> None:
        """Forget the reports up to seq: they are stored where nobody asks for them again."""
        with self._lock:
            while self._reports and self._reports[0].seq <= seq:
                self._reports.popleft()

    def cancel(self) -> None:
        """Ask the job to stop at its next check."""
        self._cancelled.set()
        self._stopped.set()

    def leave(self) -> None:
        """Ask the job to save what it has, and stop."""
        self._leaving.set()
        self._stopped.set()

    @property
    def is_leaving(self) -> bool:
        """Whether the job was asked to leave."""
        return self._leaving.is_set()

    def check(self) -> None:
        """Raise Cancelled or Left if the job was asked to stop, where there is nothing to save."""
        self.check_cancelled()
        if self.is_leaving:
            raise Left

    def check_cancelled(self) -> None:
        """Raise Cancelled if the job was asked to stop."""
        if self._cancelled.is_set():
            raise Cancelled
