"""Where the time of a step goes, by class of work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal

import torch

Work = Literal["gemm", "selection", "sparse", "optimizer", "communication"]
WORK: Final[tuple[Work, ...]] = ("gemm", "selection", "sparse", "optimizer", "communication")
"""The encoder product; the choice of features; decoding and gradients; alignment, clipping, Adam and retraction;
collectives."""
MAX_EVENTS: Final = 4096
"""Events of a GPU that wait to be read: some tens of steps."""


@dataclass(slots=True)
class StepClock:
    """Adds up the time of nested sections; a moment counts for the innermost one.

    On a GPU work is only queued when a section ends, so there the device's own clock is read: an event at every
    change of section, looked at when the totals are, and the older half of them when there are MAX_EVENTS.
    """

    on_gpu: bool = False
    _open: list[Work] = field(default_factory=list)
    _totals: dict[Work, float] = field(default_factory=dict)
    _since: float = 0.0
    _events: list[tuple[Work | None, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def section(self, work: Work) -> Iterator[None]:
        """Time of the block, less that of sections inside it."""
        self._change()
        self._open.append(work)
        try:
            yield
        finally:
            self._change()
            self._open.pop()

    def _change(self) -> None:
        """Book the time since the last change for the section that is open."""
        work = self._open[-1] if self._open else None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append((work, event))
            if len(self._events) >= MAX_EVENTS:
                self._book(MAX_EVENTS // 2)  # long past on the device, so that nothing waits for it
            return
        now = time.perf_counter()
        if work is not None:
            self._totals[work] = self._totals.get(work, 0.0) + now - self._since
        self._since = now

    def lap(self) -> dict[str, float]:
        """Seconds of every class of work since the last lap."""
        self._book(len(self._events) - 1)
        self._events.clear()
        totals = {work: self._totals.get(work, 0.0) for work in WORK}
        self._totals.clear()
        return {str(work): seconds for work, seconds in totals.items()}

    def _book(self, n: int) -> None:
        """Add up the time between the first n + 1 events, and forget the first n."""
        for (_, before), (work, after) in pairwise(self._events[: n + 1]):
            if work is not None:
                after.synchronize()
                self._totals[work] = self._totals.get(work, 0.0) + before.elapsed_time(after) / 1000
        del self._events[: max(n, 0)]
