"""Local files: atomic replacement, create-only files, and nothing half-written under a final name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from gnomon_storage.backends import TEMP_PREFIX, Backend


class LocalBackend(Backend):
    """Files of this machine, or of a file system that every node mounts at the same path.

    fsspec writes in place and syncs nothing, so whatever makes a file is done here: it is filled under another name,
    forced to the disk, and only then named.
    """

    def __init__(self) -> None:
        super().__init__(LocalFileSystem())

    def write(self, path: str, data: bytes) -> None:
        with self._mapped(path), _filled_beside(Path(path), lambda new: self._fs.pipe_file(new, data)) as new:
            new.replace(path)

    def create(self, path: str, data: bytes) -> bool:
        # A hard link fails where the name is taken, and the linked file is already whole.
        with self._mapped(path), _filled_beside(Path(path), lambda new: self._fs.pipe_file(new, data)) as new:
            try:
                os.link(new, path)
            except FileExistsError:
                return False
            return True

    def upload_file(self, path: str, local: Path) -> None:
        with self._mapped(path), _filled_beside(Path(path), lambda new: self._fs.put_file(str(local), new)) as new:
            new.replace(path)


@contextmanager
def _filled_beside(target: Path, fill: Callable[[str], object]) -> Iterator[Path]:
    """A synced file beside the target; gone afterwards, whatever became of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(TEMP_PREFIX + uuid.uuid4().hex)
    try:
        fill(str(temporary))
        sync(temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    sync(target.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Force everything under a folder to the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
