"""Log files that a process writes to as long as it lives, kept to a bounded size."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 16 << 20
"""Of one file, about: it is looked at now and then."""
N_OLDER: Final = 3
"""Older parts that are kept beside it, as <name>.1 (the latest) to <name>.3."""


def rotate(log: Path) -> bool:
    """Put what a log holds aside where that is much; returns whether it was.

    It is copied and emptied, and not renamed: its process goes on writing to the file that it has open, which must be
    open for appending. A line that is written in between may be lost.
    """
    with suppress(FileNotFoundError):
        if log.stat().st_size < MAX_BYTES:
            return False
        partial = _older(log, 0)
        with log.open("rb") as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            shutil.copyfileobj(source, copy)  # what was added during the first
            os.truncate(log, 0)
        for number in range(N_OLDER - 1, -1, -1):
            if _older(log, number).exists():
                _older(log, number).replace(_older(log, number + 1))
        return True
    return False


def last_bytes(log: Path, n_bytes: int) -> bytes:
    """The end of a log; nothing where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - n_bytes))
            return file.read()
    except FileNotFoundError:
        return b""


def _older(log: Path, number: int) -> Path:
    return log.with_name(f"{log.name}.{number}")
