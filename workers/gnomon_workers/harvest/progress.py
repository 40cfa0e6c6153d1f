"""How far a harvest is: tokens done, of this attempt and of those before, and how fast lately."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from gnomon.events import SegmentCommitted
from gnomon_storage.manifest import SegmentCommit
from gnomon_workers.runtime.reporting import Reporter


@dataclass(slots=True, kw_only=True)
class HarvestProgress:
    """Tokens done, of this attempt and of those before, and how fast lately."""

    reporter: Reporter
    window_s: float = 10.0
    min_interval_s: float = 0.5
    n_new: int = 0
    """Tokens of segments committed by this attempt."""
    n_workers: int = 0
    """That were asked for, if any were needed."""
    _n_kept: int = 0
    _done: int = 0
    _began: float = 0.0
    _reported: float = 0.0
    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self) -> None:
        """A worker is ready: with the first, the clock starts."""
        if not self._began:
            self._began = time.monotonic()
            self._seen.append((self._began, 0))

    def segment(self, commit: SegmentCommit, *, is_new: bool) -> None:
        """A segment is part of the store: harvested now, or kept from an earlier attempt."""
        if is_new:
            self.n_new += commit.n_tokens
        else:
            self._n_kept += commit.n_tokens
        self.reporter.report(
            SegmentCommitted(
                name=commit.name,
                split=commit.split,
                attempt=commit.attempt,
                n_rows=commit.n_rows,
                n_tokens=commit.n_tokens,
                kept=not is_new,
            )
        )
        self._advance(self._n_kept + self.n_new)

    def tick(self, n_beaten: int) -> None:
        """Workers say that n_beaten tokens have passed through the model; raises Cancelled."""
        self.reporter.check_cancelled()
        now = time.monotonic()
        if self._began and now - self._reported >= self.min_interval_s:
            self._reported = now
            self._seen.append((now, n_beaten))
            while len(self._seen) > 2 and now - self._seen[0][0] > self.window_s:
                self._seen.popleft()
            self._advance(self._n_kept + n_beaten)

    def _advance(self, done: int) -> None:
        # Beats come late and segments in any order, but progress never goes back.
        self._done = max(self._done, done)
        rate = None
        if len(self._seen) > 1:
            (then, n_then), (now, n_now) = self._seen[0], self._seen[-1]
            rate = max(0.0, (n_now - n_then) / (now - then))  # a lost worker's tokens are run again
        self.reporter.progress(self._done, rate=rate)

    def mean_rate(self) -> float | None:
        """Tokens a second since workers were ready; None where there was nothing to do."""
        return self.n_new / (time.monotonic() - self._began) if self._began else None
