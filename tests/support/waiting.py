"""Waiting for what must come, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
LIMIT_S: Final = 600.0
"""The one limit of all tests: far beyond what a busy machine needs, below pytest's own, which tells less."""


def wait_until(condition: Callable[[], T | None], what: str | Callable[[], object], *, every_s: float = 0.05) -> T:
    """The first true answer of a condition; fails after LIMIT_S, saying what was waited for."""
    deadline = time.monotonic() + LIMIT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what if isinstance(what, str) else what()}"
        time.sleep(every_s)
    return answer
