"""Requests of a key are counted; those of another are not counted with them."""

from __future__ import annotations

import pytest

from gnomon.errors import TooManyRequests
from gnomon_service.rest import rate_limits
from gnomon_service.rest.rate_limits import RateLimits


class Clock:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def n_passed(limits: RateLimits, key_id: str, n: int) -> int:
    """How many of n requests at once pass."""
    n_refused = 0
    for _ in range(n):
        try:
            limits.take(key_id)
        except TooManyRequests as error:
            n_refused += 1
            assert (error.code, error.status) == ("rate_limited", 429)
    return n - n_refused


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    limits = RateLimits(10.0, clock=clock)
    assert n_passed(limits, "a", 100) == 20
    clock.now = 0.5
    assert n_passed(limits, "a", 100) == 5
    clock.now = 1000.0
    assert n_passed(limits, "a", 100) == 20


def test_keys_do_not_pay_for_each_other() -> None:
    limits = RateLimits(10.0, clock=Clock())
    assert n_passed(limits, "a", 100) == n_passed(limits, "b", 100) == 20


def test_a_refusal_says_when_to_come_again() -> None:
    clock = Clock()
    limits = RateLimits(0.1, clock=clock)
    limits.take("a")
    with pytest.raises(TooManyRequests, match=r"more than 0\.1 requests a second") as caught:
        limits.take("a")
    assert caught.value.detail["retry_after_s"] == 10
    clock.now = 10.0
    limits.take("a")


def test_the_key_that_was_silent_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "_MAX_BUCKETS", 2)
    limits = RateLimits(1.0, clock=Clock())
    for key_id in ("a", "b", "b", "c"):
        limits.take(key_id)
    assert n_passed(limits, "a", 9) == 2
    assert n_passed(limits, "c", 9) == 1
