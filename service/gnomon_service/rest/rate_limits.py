"""How many requests a key may send: a bucket of tokens for each, so that one key's loop leaves room for the others."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gnomon.errors import TooManyRequests

BURST_S: Final = 2.0
"""A key that was silent for so long may send at once what it has left out."""
_MAX_BUCKETS: Final = 10_000
"""Keys that are remembered; the one that was silent longest, whose bucket is full again, is forgotten first."""


@dataclass(slots=True)
class _Bucket:
    n_tokens: float
    at: float


class RateLimits:
    """Buckets by key, in this process; used from its event loop alone."""

    def __init__(self, requests_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = requests_per_s
        self._size = max(1.0, requests_per_s * BURST_S)
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, key_id: str) -> None:
        """Count one request of a key; raises TooManyRequests, "rate_limited", where it has sent too many."""
        now = self._clock()
        bucket = self._bucket(key_id, now)
        bucket.n_tokens = min(self._size, bucket.n_tokens + (now - bucket.at) * self._rate)
        bucket.at = now
        if bucket.n_tokens < 1.0:
            raise TooManyRequests(
                f"key {key_id!r} sends more than {self._rate:g} requests a second; nothing was done: wait and send it "
                "again, or follow a job's events instead of asking for its state",
                code="rate_limited",
                retry_after_s=math.ceil((1.0 - bucket.n_tokens) / self._rate),
            )
        bucket.n_tokens -= 1.0

    def _bucket(self, key_id: str, now: float) -> _Bucket:
        bucket = self._buckets.setdefault(key_id, _Bucket(self._size, now))
        self._buckets.move_to_end(key_id)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return bucket
