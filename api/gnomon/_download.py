"""Files of a published dictionary, written so that a folder never looks whole before it is.

What has arrived of a file lies in `.<name>.<digest>.<token>.partial` beside it. The digest is that of the whole file,
as the service gave it: with it a download goes on where it was broken off, by this process or an earlier one, and what
has arrived is checked at the end. The process that writes to a partial file holds it (`gnomon.claims`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import httpx2

from gnomon._requests import Request, dictionary_file
from gnomon.claims import claim, make_claimed
from gnomon.errors import CorruptArtifact, GnomonError, Unavailable
from gnomon.resources import DictionaryRecord

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REPR_DIGEST = re.compile(r"(?:^|,)\s*blake2b-256=:([A-Za-z0-9+/=]{44}):")
_NO_DIGEST: Final = "unknown"
_LONGEST_PAUSE_S: Final = 2.0


def plan_download(dictionary: DictionaryRecord, folder: Path) -> list[FileDownload]:
    """All files of a dictionary, cfg.json last: without it, no loader takes the folder for a dictionary.

    Makes the folder. Raises GnomonError where the server names a file that could lie outside it.
    """
    names = sorted(dictionary.files, key=lambda name: (name == "cfg.json", name))
    for name in names:
        if not _SAFE_NAME.fullmatch(name):
            raise GnomonError(f"the server names a file {name!r}; refused", code="bad_response")
    folder.mkdir(parents=True, exist_ok=True)
    return [FileDownload(dictionary.id, folder / name, dictionary.files[name]) for name in names]


class FileDownload:
    """One file to fetch: which request comes next, and what becomes of the answers; sends nothing itself.

    A context manager: `start`, then requests until `is_done`, then `finish`. What has arrived is kept where a later
    download can go on with it, and removed where it is not what it should be.
    """

    def __init__(self, dictionary_id: str, path: Path, n_bytes: int) -> None:
        self._dictionary_id = dictionary_id
        self._path = path
        self._n_bytes = n_bytes
        self._partial: _Partial | None = None
        self._in_place: str | None = None
        """Digest of the file that is there already, while it has the right size."""
        self._n_failures = 0
        self._arrived_before = 0
        self.is_done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._partial is not None:
            self._partial.close(keep=error is not None and not isinstance(error, CorruptArtifact))

    def start(self) -> None:
        """Look at what is there of the file; reads all of it where it has the right size."""
        self._partial = _Partial.left_by_another(self._path, self._n_bytes)
        if self._path.is_file() and self._path.stat().st_size == self._n_bytes:
            with self._path.open("rb") as file:
                self._in_place = _digest(file)

    def request(self) -> Request[None]:
        """What to ask for next: the rest of the file, or whether what is there is the file."""
        headers = {"Accept-Encoding": "identity"}
        partial = self._partial
        if self._in_place is not None:
            headers["If-None-Match"] = f'"{self._in_place}"'
        elif partial is not None and partial.digest is not None and partial.n_bytes == self._n_bytes:
            headers["If-None-Match"] = f'"{partial.digest}"'
        elif partial is not None and partial.digest is not None and partial.n_bytes:
            headers |= {"Range": f"bytes={partial.n_bytes}-", "If-Range": f'"{partial.digest}"'}
        return dictionary_file(self._dictionary_id, self._path.name, headers)

    def begin(self, response: httpx2.Response) -> None:
        """Take the head of an answer; what was there is thrown away where the file begins anew."""
        digest = _told_digest(response.headers)
        if response.status_code == 304:
            self._check_unchanged()
            return
        if response.status_code == 206:
            self._check_part(response.headers, digest)
            return
        self._in_place = None
        if self._partial is not None:
            self._partial.close(keep=False)
        self._partial = _Partial.new(self._path, digest)

    def write(self, piece: bytes) -> None:
        """Take a piece of the body; raises CorruptArtifact where more comes than there should be."""
        assert self._partial is not None
        self._partial.write(piece)
        if self._partial.n_bytes > self._n_bytes:
            raise self._wrong(
                f"more than {self._n_bytes} bytes arrived; the file on the server was replaced or damaged"
            )

    def end(self) -> None:
        """An answer has come to its regular end."""
        self.is_done = True

    def broken(self, error: Unavailable, n_attempts: int) -> float:
        """A connection was lost; returns the seconds to wait before the next.

        Raises the error where nothing says which content was begun, and where n_attempts in a row brought nothing.
        """
        arrived = 0 if self._partial is None else self._partial.n_bytes
        self._n_failures = 1 if arrived > self._arrived_before else self._n_failures + 1
        self._arrived_before = arrived
        begun_without_name = self._partial is not None and self._partial.digest is None
        if begun_without_name or self._n_failures >= n_attempts:
            raise error
        retry_after_s: float | None = error.detail.get("retry_after_s")
        pause_s = 0.1 * 2.0**self._n_failures if retry_after_s is None else float(retry_after_s)
        return min(pause_s, _LONGEST_PAUSE_S)

    def finish(self) -> None:
        """Check what has arrived, and put it in its place; raises CorruptArtifact where it is not the file."""
        partial = self._partial
        assert partial is not None or self._in_place is not None
        if partial is None or self._in_place is not None:
            return
        if partial.n_bytes != self._n_bytes:
            raise self._wrong(f"arrived with {partial.n_bytes} bytes, wanted {self._n_bytes}")
        found = partial.digest_of_content()
        if partial.digest is not None and found != partial.digest:
            raise self._wrong(
                f"is not what was published: its BLAKE2b digest is {found[:16]}..., wanted {partial.digest[:16]}..."
            )
        partial.take_place(self._path)
        self._partial = None

    def _check_unchanged(self) -> None:
        if self._in_place is None and (self._partial is None or self._partial.n_bytes != self._n_bytes):
            raise GnomonError(
                f"{self._path.name!r}: the server says that it has not changed, and was not asked whether it has; is "
                "there a cache between?",
                code="bad_response",
            )

    def _check_part(self, headers: httpx2.Headers, digest: str | None) -> None:
        partial = self._partial
        start = -1 if partial is None else partial.n_bytes
        wanted = f"bytes {start}-{self._n_bytes - 1}/{self._n_bytes}"
        got = headers.get("Content-Range")
        if partial is None or got != wanted or digest != partial.digest:
            raise GnomonError(
                f"{self._path.name!r}: the server was asked to go on, and gave {got!r} of content {digest!r} where "
                f"{wanted!r} was wanted; is there a cache between?",
                code="bad_response",
            )

    def _wrong(self, what: str) -> CorruptArtifact:
        return CorruptArtifact(f"{self._path.name!r} {what}; nothing of it was kept, download again")


class _Partial:
    """What has arrived of a file; held by this process, and open at its end."""

    def __init__(self, path: Path, file: BinaryIO, digest: str | None) -> None:
        self.path = path
        self.digest = digest
        """Of the whole file, as the service gave it; None where it gave none."""
        self._file = file
        self.n_bytes = file.seek(0, os.SEEK_END)

    @classmethod
    def new(cls, target: Path, digest: str | None) -> Self:
        """An empty one for a file."""

        def make() -> Path:
            path = target.with_name(f".{target.name}.{digest or _NO_DIGEST}.{secrets.token_hex(4)}.partial")
            path.touch(exist_ok=False)
            return path

        path, held = make_claimed(make)
        return cls(path, path.open("r+b") if held is None else os.fdopen(held, "r+b"), digest)

    @classmethod
    def left_by_another(cls, target: Path, n_bytes: int) -> Self | None:
        """The longest that a process left which is gone and can be gone on with; the others are removed."""
        best: Self | None = None
        named = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{64}}|{_NO_DIGEST})\.[0-9a-f]{{8}}\.partial")
        for match in filter(None, (named.fullmatch(path.name) for path in target.parent.iterdir())):
            held = claim(target.with_name(match[0]))
            if held is None:
                continue
            digest = None if match[1] == _NO_DIGEST else match[1]
            found = cls(target.with_name(match[0]), os.fdopen(held, "r+b"), digest)
            better = 0 < found.n_bytes <= n_bytes and digest and (best is None or found.n_bytes > best.n_bytes)
            worse = best if better else found
            if worse is not None:
                worse.close(keep=False)
            best = found if better else best
        return best

    def write(self, piece: bytes) -> None:
        """Add to the end."""
        self._file.write(piece)
        self.n_bytes += len(piece)

    def digest_of_content(self) -> str:
        """BLAKE2b-256 of what has arrived, hexadecimal."""
        self._file.seek(0)
        return _digest(self._file)

    def take_place(self, target: Path) -> None:
        """Become the file, once all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if os.name == "nt":  # there, an open file cannot be renamed
            self._file.close()
        self.path.replace(target)
        self._file.close()

    def close(self, *, keep: bool) -> None:
        """Let go of it; keep=True leaves it to a later download, if that can know what it is part of."""
        if os.name == "nt":
            self._file.close()
        if not (keep and self.digest is not None and self.n_bytes):
            self.path.unlink(missing_ok=True)
        self._file.close()


def _digest(file: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=32)
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _told_digest(headers: Mapping[str, str]) -> str | None:
    """BLAKE2b-256 of the whole file, hexadecimal, as `Repr-Digest` has it; None of an older service."""
    match = _REPR_DIGEST.search(headers.get("Repr-Digest", ""))
    try:
        return base64.b64decode(match[1], validate=True).hex() if match else None
    except binascii.Error:
        return None
