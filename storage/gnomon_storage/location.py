"""A place for bytes: a URL under an allowed root, and everything that is done there.

Operators choose roots; no location is ever made from a user's text except by `resolve_input`, which demands that the
resolved path lies under a root the operator named. URLs are read literally: nothing in them is decoded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from gnomon.errors import CorruptArtifact, InvalidRequest, NotFound, StoreUnavailable
from gnomon_storage.backends import TEMP_PREFIX, Backend
from gnomon_storage.local import LocalBackend
from gnomon_storage.objects import OBJECT_STORES, ObjectBackend

SCHEMES = ("file", *OBJECT_STORES)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_COMPONENT = re.compile(r"^[A-Za-z0-9._=@+-]{1,255}$")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|::|%[0-9A-Fa-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A file or folder, present or not, that lies under the root it was opened at."""

    scheme: str
    bucket: str
    """Empty for files."""
    path: str
    """Absolute for files; a key without leading slash for object stores."""
    root: str
    """The path this location was opened at; links that lead out of it are refused."""

    @classmethod
    def open(cls, url: str, *, schemes: Collection[str] = SCHEMES) -> Location:
        """The location an operator names; plain absolute paths are file paths.

        Raises InvalidRequest, code "location_not_allowed", for another scheme, chained or encoded URLs, "..",
        control characters, backslashes and relative paths.
        """
        scheme, bucket, path = split_url(url, schemes)
        return cls(scheme=scheme, bucket=bucket, path=path, root=path)

    @property
    def url(self) -> str:
        """The whole URL; `open(url)` gives an equal place."""
        return f"{self.scheme}://{self._full_path}"

    @property
    def name(self) -> str:
        """The last component."""
        return self.path.rsplit("/", 1)[-1]

    def child(self, *names: str) -> Location:
        """A place below; each name is one safe component, or several joined by "/".

        Raises InvalidRequest, code "location_not_allowed", for "..", empty components and odd characters.
        """
        parts = [part for name in names for part in name.split("/")]
        for part in parts:
            if not _COMPONENT.match(part) or part in (".", "..") or part.startswith(TEMP_PREFIX):
                raise _not_allowed(f"{part!r} is not a safe file name; use letters, digits and . _ = @ + -")
        base = self.path.rstrip("/")
        path = "/".join([base, *parts]) if base or self.scheme == "file" else "/".join(parts)
        return Location(scheme=self.scheme, bucket=self.bucket, path=path, root=self.root)

    def read_bytes(self) -> bytes:
        """All bytes; raises NotFound."""
        return self._backend().read(self._full_path)

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer where the file ends earlier; raises NotFound."""
        if not 0 <= start <= end:
            raise ValueError(f"range [{start}, {end}) is not one; give 0 <= start <= end")
        return self._backend().read_range(self._full_path, start, end)

    def read_json(self) -> Any:
        """The parsed JSON document; raises NotFound, or CorruptArtifact where it is not JSON."""
        try:
            return json.loads(self.read_bytes())
        except ValueError as error:
            raise CorruptArtifact(f"{self.url} is not JSON ({error}); it was damaged after it was written") from error

    def open_read(self) -> BinaryIO:
        """A seekable stream of the bytes; raises NotFound."""
        return self._backend().open(self._full_path)

    def write_bytes(self, data: bytes) -> None:
        """Write or replace the file at once: readers see the old bytes or the new."""
        self._backend().write(self._full_path, data)

    def create_bytes(self, data: bytes) -> bool:
        """Write the file unless it exists; of racing writers exactly one gets True."""
        return self._backend().create(self._full_path, data)

    def write_json(self, obj: Any) -> None:
        """`write_bytes` of a JSON document."""
        self.write_bytes(_encode(obj))

    def create_json(self, obj: Any) -> bool:
        """`create_bytes` of a JSON document."""
        return self.create_bytes(_encode(obj))

    def exists(self) -> bool:
        """Whether a file, or a folder with something in it, is there."""
        return self._backend().exists(self._full_path)

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self._backend().is_file(self._full_path)

    def size(self) -> int:
        """Bytes of the file; raises NotFound."""
        return self._backend().size(self._full_path)

    def etag(self) -> str:
        """What identifies the present content: the object store's ETag, or a file's size and time; raises NotFound."""
        return self._backend().etag(self._full_path)

    def list(self) -> list[str]:
        """Names directly in this folder, files and folders, sorted; half-written files are not among them.

        An object store may go on naming an emptied folder for a while.
        """
        return self._backend().list(self._full_path)

    def walk(self) -> dict[str, int]:
        """Bytes of every file below, by relative path, sorted; symbolic links are not followed."""
        return self._backend().walk(self._full_path)

    def delete(self) -> None:
        """Remove the file or the whole folder; absent is fine."""
        self._backend().delete(self._full_path)

    def upload(self, local: Path) -> None:
        """Copy a local file here, or a local folder's files below here; each file appears at once."""
        if not local.is_dir():
            self._backend().upload_file(self._full_path, local)
            return
        for file in sorted(item for item in local.rglob("*") if item.is_file()):
            self.child(file.relative_to(local).as_posix()).upload(file)

    def download(self, local: Path) -> None:
        """Copy this file to a local path, or this folder's files below it; raises NotFound."""
        if self.is_file():
            self._download_file(local)
            return
        names = self.walk()
        if not names:
            raise NotFound(f"there is nothing at {self.url}")
        for name in names:
            self.child(name)._download_file(local / name)

    def check_room(self, n_bytes: int) -> None:
        """Raise StoreUnavailable, code "store_full", where a local disk has no room for so much; others cannot say."""
        path = self.local_path()
        if path is None:
            return
        while not path.exists():
            path = path.parent
        n_free = shutil.disk_usage(path).free
        if n_free < n_bytes:
            raise StoreUnavailable(
                f"the disk that holds {self.path!r} has {n_free:,} bytes free, and {n_bytes:,} are needed; free space",
                code="store_full",
            )

    def local_path(self) -> Path | None:
        """The path where this is a local file or folder; None for object stores."""
        return Path(self.path) if self.scheme == "file" else None

    def _download_file(self, local: Path) -> None:
        self._backend().download_file(self._full_path, local)

    @property
    def _full_path(self) -> str:
        """What the file system calls this place."""
        return self.path if self.scheme == "file" else f"{self.bucket}/{self.path}".rstrip("/")

    def _backend(self) -> Backend:
        # fsspec follows links wherever they lead.
        below = self.scheme == "file" and self.path != self.root
        if below and not _is_under(os.path.realpath(self.path), os.path.realpath(self.root)):
            raise _not_allowed(f"{self.path!r} is a link that leads out of {self.root!r}")
        return _backend_for(self.scheme, self.bucket)


def resolve_input(url: str, roots: Sequence[str], *, schemes: Collection[str] = SCHEMES) -> Location:
    """The location a user names, if it lies under one of the operator's roots once links are resolved.

    Raises InvalidRequest, code "location_not_allowed", naming the roots; says the same whether or not it exists.
    """
    scheme, bucket, path = split_url(url, schemes)
    for root_url in roots:
        root = Location.open(root_url)
        if (root.scheme, root.bucket) != (scheme, bucket):
            continue
        if scheme == "file":
            real, real_root = os.path.realpath(path), os.path.realpath(root.path)
            if _is_under(real, real_root):
                return Location(scheme=scheme, bucket="", path=real, root=real_root)
        elif _is_under("/" + path, "/" + root.path):
            return Location(scheme=scheme, bucket=bucket, path=path, root=root.path)
    allowed = ", ".join(repr(root) for root in roots) or "none"
    raise _not_allowed(f"{url!r} does not lie under an allowed root; put it under one of: {allowed}")


def split_url(url: str, schemes: Collection[str] = SCHEMES) -> tuple[str, str, str]:
    """Scheme, bucket and path of a URL or plain absolute path; raises InvalidRequest, code "location_not_allowed"."""
    if _FORBIDDEN.search(url):
        raise _not_allowed(f"{url!r} holds '::', a backslash, a control character or an encoded byte; write it plainly")
    match = _SCHEME.match(url)
    scheme, rest = (match[1].lower(), url[match.end() :]) if match else ("file", url)
    if scheme not in schemes:
        raise _not_allowed(f"scheme {scheme!r} of {url!r} is not allowed; use one of: {', '.join(sorted(schemes))}")
    bucket = ""
    if match:
        if not rest.startswith("//"):
            raise _not_allowed(f"{url!r} is not a URL; write {scheme}://...")
        bucket, slash, path = rest[2:].partition("/")
        rest = slash + path
    return (scheme, *_check_path(scheme, bucket, rest, url))


def _check_path(scheme: str, bucket: str, path: str, url: str) -> tuple[str, str]:
    if scheme == "file" and (bucket or not path.startswith("/")):
        raise _not_allowed(f"{url!r} is not an absolute path on this machine; write /path or file:///path")
    if scheme != "file" and not _BUCKET.match(bucket):
        raise _not_allowed(f"{url!r} names no valid bucket; write {scheme}://bucket/path")
    trimmed = path.removeprefix("/").removesuffix("/")
    parts = trimmed.split("/") if trimmed else []
    if any(part in ("", ".", "..") for part in parts):
        raise _not_allowed(f"{url!r} holds an empty, '.' or '..' component; write the plain path")
    return bucket, ("/" if scheme == "file" else "") + "/".join(parts)


def _is_under(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


@cache
def _backend_for(scheme: str, bucket: str) -> Backend:
    """The one backend of a bucket in this process, in which connections are pooled; all files share one."""
    return LocalBackend() if scheme == "file" else ObjectBackend(scheme, bucket)


def _encode(obj: Any) -> bytes:
    return (json.dumps(obj, indent=1, allow_nan=False, sort_keys=True) + "\n").encode()


def _not_allowed(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="location_not_allowed")
