"""Processes that this test started, and no others: those of another service on the machine are not ours to touch."""

from __future__ import annotations

import contextlib

import psutil


def own_processes(words: str) -> list[psutil.Process]:
    """Descendants of this process with these words in their command line; Ray names workers after their actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def own_pids(words: str) -> list[int]:
    """Their ids."""
    return [process.pid for process in own_processes(words)]


def own_programs(name: str) -> list[int]:
    """Ids of descendants that run this program."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == name and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
