"""Digests of large files of this machine, remembered on disk: whoever needs one again need not read the file again.

A digest is found again by what no one changes without changing the file: its path, device and number, size and both
times. The time of the last change of its inode cannot be set back by whoever writes it.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

LEAST_BYTES: Final = 16 << 20
"""Smaller files are read again, which takes less than it costs to remember them for ever."""
_DIGEST_LENGTH: Final = 64
_SETTLED_NS: Final = 2_000_000_000
"""A file that was changed this shortly ago may change again within the same tick of the file system's clock."""


def recall(path: Path, status: os.stat_result) -> str | None:
    """The SHA-256 of a file as it is, where it was remembered."""
    with suppress(OSError):
        text = _place(path, status).read_text()
        if len(text) == _DIGEST_LENGTH:
            return text
    return None


def remember(path: Path, status: os.stat_result, digest: str) -> None:
    """Keep the digest of a file, if that file was let alone while it was read and shortly before."""
    is_large = status.st_size >= LEAST_BYTES
    if not is_large or time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED_NS:
        return
    with suppress(OSError):
        if _identity(path, path.stat()) != _identity(path, status):
            return
        place = _place(path, status)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(digest)  # one that is cut off is too short to be believed


def folder() -> Path:
    """$GNOMON_CACHE/digests, by default ~/.cache/gnomon/digests."""
    base = os.environ.get("GNOMON_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "gnomon") / "digests"


def _place(path: Path, status: os.stat_result) -> Path:
    return folder() / hashlib.sha256(repr(_identity(path, status)).encode()).hexdigest()[:40]


def _identity(path: Path, status: os.stat_result) -> tuple[str | int, ...]:
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (str(path.resolve()), status.st_dev, status.st_ino, status.st_size, *times)
