"""Files and folders that belong to a process for as long as it lives: what a killed one left behind is free.

The lock is the kernel's (flock), and ends with its process however that ends. Where a file system or an operating
system has none, nothing can be held, and nothing is ever taken for abandoned.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def claim(path: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds an existing file or folder until it is closed, after waiting for it if need be.

    None where another process holds it, or where it is gone or another one by the time that it could be held.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # gone, or another user's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def make_claimed(make: Callable[[], Path]) -> tuple[Path, int | None]:
    """A new file or folder and the descriptor that holds it; None where nothing can be held.

    `make` is called again where another process took what it made for abandoned before it could be held.
    """
    while True:
        path = make()
        descriptor = claim(path, wait=True)
        if descriptor is not None or path.exists():
            return path, descriptor


def release(descriptor: int | None) -> None:
    """Let go of what a descriptor holds."""
    if descriptor is not None:
        os.close(descriptor)
