"""A plugin of coverage that saves what a process has measured every second: actors and services end by being killed."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import coverage

EVERY_S = 1.0

_save = coverage.Coverage.save


class Saver(threading.Thread):
    """Saves every second until told to stop."""

    def __init__(self) -> None:
        super().__init__(name="coverage", daemon=True)
        self._is_over = threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(EVERY_S):
            measured = coverage.Coverage.current()
            if measured is not None:
                with contextlib.suppress(Exception):  # the process may be on its way out
                    measured.save()

    def stop(self) -> None:
        """Wait for the save under way."""
        self._is_over.set()
        self.join()


_saver: Saver


def coverage_init(_registry: Any, _options: dict[str, str]) -> None:
    """Called by coverage in every process that it measures."""
    coverage.Coverage.save = _save_alone  # type: ignore[method-assign]
    _start()
    os.register_at_fork(after_in_child=_start)  # a forked process has none of its parent's threads


def _start() -> None:
    global _saver
    _saver = Saver()
    _saver.start()


def _save_alone(self: coverage.Coverage) -> None:
    """Coverage's own save is the last one; beside another, on the same database, it crashes the interpreter."""
    if threading.current_thread() is not _saver:
        _saver.stop()
    _save(self)
