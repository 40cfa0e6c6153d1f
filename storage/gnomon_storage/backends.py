"""A place that holds bytes, as an fsspec file system: what `Location` stands on, alike for files and object stores."""

from __future__ import annotations

import errno
import io
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Final, TypeVar, cast

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from gnomon.errors import NotFound, StoreUnavailable

if TYPE_CHECKING:
    from pathlib import Path

    from fsspec import AbstractFileSystem

T = TypeVar("T")
TEMP_PREFIX: Final = ".tmp-"
"""Names that begin so are half-written files; they are never listed."""
_ABSENT: Final = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_NO_ABSENCE: Final = ("NoSuchBucket", "NoSuchUpload")
"""What else an object store does not find; the second of a large object that is there, as the answer to it was lost."""
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def mapped_errors(path: str, variables: str = "") -> Iterator[None]:
    """Turn the system's and obstore's errors into this project's; `variables` are those that give access."""
    try:
        yield
    except OSError as error:
        if any(code in str(error) for code in _NO_ABSENCE):
            raise object_store_failed(error, repr(path), variables) from error
        if isinstance(error, FileNotFoundError) or error.errno in _ABSENT:  # obstore's has no number
            raise NotFound(f"there is no file {path!r}") from error
        if error.errno in _FULL:
            raise store_full(f"the disk that holds {path!r}", error) from error
        raise StoreUnavailable(f"cannot use {path!r}: {error.strerror or error}") from error
    except BaseError as error:
        raise object_store_failed(error, repr(path), variables) from error


def store_failure(error: BaseException) -> StoreUnavailable | None:
    """What an error that passed no `mapped_errors` says of a store; None where it says nothing of one."""
    if isinstance(error, BaseError):
        return object_store_failed(error, "an object", "the credentials")
    if isinstance(error, OSError) and error.errno in _FULL:
        return store_full(f"the disk that holds {error.filename!r}" if error.filename else "a disk", error)
    return None


def store_full(disk: str, error: OSError) -> StoreUnavailable:
    """The error of a disk on which nothing more can be written."""
    return StoreUnavailable(f"{disk} is full ({error.strerror or error}); free space", code="store_full")


def object_store_failed(error: BaseError | OSError, what: str, variables: str) -> StoreUnavailable:
    """The error of an object store that did not do what was asked of it."""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StoreUnavailable(
            f"the object store refuses access to {what}; check {variables} in the environment of this process",
            code="store_refused",
        )
    if "NoSuchBucket" in str(error):
        return StoreUnavailable(f"the bucket of {what} does not exist; create it", code="no_bucket")
    return StoreUnavailable(f"the object store failed at {what}: {str(error).splitlines()[0]}")


class Backend(ABC):
    """Bytes under the paths of one file system: absolute for files, "bucket/key" for object stores.

    Every method raises NotFound where what it reads is absent and StoreUnavailable where the file system fails.
    """

    stream_bytes: ClassVar[int] = 1 << 20
    """What one read of a stream fetches."""

    def __init__(self, file_system: AbstractFileSystem, variables: str = "") -> None:
        self._fs = file_system
        self._variables = variables

    def read(self, path: str) -> bytes:
        """All bytes of one file."""
        return bytes(self._call(path, lambda: self._fs.cat_file(path)))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of one file; fewer where the file ends earlier."""
        end = min(end, self.size(path))  # object stores refuse a range that begins past the end
        if start >= end:
            return b""
        return bytes(self._call(path, lambda: self._fs.cat_file(path, start=start, end=end)))

    def open(self, path: str) -> BinaryIO:
        """A seekable stream of one file."""
        n_bytes = self.size(path)
        file = self._call(path, lambda: self._fs.open(path, "rb", size=n_bytes, buffer_size=self.stream_bytes))
        return cast("BinaryIO", io.BufferedReader(_Stream(file, self._mapped, path), self.stream_bytes))

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file; readers see the old bytes or the new, never a mixture."""
        self._call(path, lambda: self._fs.pipe_file(path, data))

    @abstractmethod
    def create(self, path: str, data: bytes) -> bool:
        """Put a whole file unless there is one; of racing writers exactly one gets True."""
        # fsspec's mode="create" is ignored by some file systems; each kind of store has a way that holds.

    def is_file(self, path: str) -> bool:
        """Whether a file is there."""
        return bool(self._fs.isfile(path))

    def exists(self, path: str) -> bool:
        """Whether a file or a folder with something in it is there."""
        return bool(self._call(path, lambda: self._fs.exists(path)))

    def size(self, path: str) -> int:
        """Bytes of one file."""
        return int(self._file_info(path)["size"])

    def etag(self, path: str) -> str:
        """What changes when the file does: the store's own tag, or size and time."""
        info = self._file_info(path)
        return info.get("e_tag") or f"{info['size']}-{info.get('mtime') or info.get('last_modified')}"

    def list(self, path: str) -> list[str]:
        """Names of the files and folders directly in a folder, sorted; empty where there is no folder."""
        try:
            found = [place.rstrip("/") for place in self._call(path, lambda: self._fs.ls(path, detail=False))]
        except NotFound:
            return []
        names = {place.rsplit("/", 1)[-1] for place in found if place != path}  # a file lists itself
        return sorted(name for name in names if not name.startswith(TEMP_PREFIX))

    def walk(self, path: str) -> dict[str, int]:
        """Bytes of every file under a folder, by relative path; links are not followed."""
        found = self._call(path, lambda: self._fs.find(path, detail=True))
        folder = path.rstrip("/") + "/"
        sizes = {
            place.removeprefix(folder): int(info["size"])
            for place, info in found.items()
            if place != path and info["type"] == "file" and not place.rsplit("/", 1)[-1].startswith(TEMP_PREFIX)
        }
        return dict(sorted(sizes.items()))

    def delete(self, path: str) -> None:
        """Remove a file or a whole folder; absent is fine."""
        with self._mapped(path):
            while self._fs.lexists(path):
                with suppress(FileNotFoundError):  # another is removing the same folder, and was there first
                    self._fs.rm(path, recursive=True)

    def upload_file(self, path: str, local: Path) -> None:
        """Put one local file, atomically."""
        self._call(path, lambda: self._fs.put_file(str(local), path))

    def download_file(self, path: str, local: Path) -> None:
        """Copy one file to a local path."""
        # As a stream: obstore's get_file holds the whole object in memory.
        with self.open(path) as stream, mapped_errors(str(local)):
            local.parent.mkdir(parents=True, exist_ok=True)
            with local.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 22)

    def _file_info(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = self._call(path, lambda: self._fs.info(path))
        if info["type"] != "file":
            raise NotFound(f"there is no file {path!r}")
        return info

    def _call(self, path: str, call: Callable[[], T]) -> T:
        """What a call of the file system gives, with mapped errors; it may be made more than once."""
        with self._mapped(path):
            return call()

    def _mapped(self, path: str) -> AbstractContextManager[None]:
        return mapped_errors(path, self._variables)


class _Stream(io.RawIOBase):
    """A file of any file system, with mapped errors; BufferedReader above it decides how much a read fetches."""

    def __init__(self, file: Any, mapped: Callable[[str], AbstractContextManager[None]], path: str) -> None:
        self._file = file
        self._mapped = mapped
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with self._mapped(self._path):
            return int(self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        super().close()
