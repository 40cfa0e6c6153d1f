"""A plugin of coverage that saves what a process has measured every second: actors and services end by being killed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import coverage

EVERY_S = 1.0


def coverage_init(_registry: Any, _options: dict[str, str]) -> None:
    """Called by coverage in every process that it measures."""
    _start()
    os.register_at_fork(after_in_child=_start)  # a forked process has none of its parent's threads


def _start() -> None:
    threading.Thread(target=_save_now_and_then, name="coverage", daemon=True).start()


def _save_now_and_then() -> None:
    while True:
        time.sleep(EVERY_S)
        measured = coverage.Coverage.current()
        if measured is not None:
            with contextlib.suppress(Exception):  # the process may be on its way out
                measured.save()
