"""A sealed activation store, read: rows, contexts, and whether every byte is what was harvested.

Rows are read from the files of their chunks, past Zarr, which reads a missing chunk as zeros: without codecs a chunk is
nothing but its rows. Every file is compared with what its commit says of it when it is read for the first time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Final, Literal, TypeAlias

import numpy as np

from gnomon.errors import CorruptArtifact, NotFound
from gnomon_storage.arrays import Array, chunk_key
from gnomon_storage.digests import digest_of, stream_digest
from gnomon_storage.location import Location
from gnomon_storage.manifest import (
    Manifest,
    SegmentCommit,
    SegmentInfo,
    StoredFile,
    parse_commit,
    parse_manifest,
)
from gnomon_storage.rows import decode, raw_dtype, raw_width

Column: TypeAlias = Literal["tokens", "positions", "context_ids"]
MANIFEST = "manifest.json"
COLUMN_CHUNK_ROWS = 1 << 20
"""Rows in a chunk of the integer columns: 4 MB."""
MOST_SEGMENTS: Final = 1024
"""Segments whose files' digests are held in memory, those used last: some 10 kB each."""

N_VERIFYING: Final = 2
"""Files read at once where all are: digests are made beside each other."""


class ActivationStore:
    """Rows of a sealed store. Reading is safe from several threads."""

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self._files = _CheckedFiles(self)

    @classmethod
    def open(cls, location: Location) -> ActivationStore:
        """Open a store by its manifest.

        Raises NotFound, code "store_not_sealed", without one, and CorruptArtifact where it is damaged.
        """
        place = location.child(MANIFEST)
        try:
            data = place.read_bytes()
        except NotFound as error:
            raise NotFound(
                f"no sealed activation store at {location.url}; its harvest has not ended", code="store_not_sealed"
            ) from error
        return cls(location, parse_manifest(data, place.url))

    def read_raw(self, hook_name: str, segment: SegmentInfo, start: int, stop: int) -> Array:
        """Rows [start, stop) of a segment as stored, (n, width); see `gnomon_storage.rows`.

        Raises CorruptArtifact, as all that reads does, where a file is missing or its bytes are not those written.
        """
        out = self.empty(hook_name, stop - start)
        self.read_into(out, hook_name, segment, start)
        return out

    def empty(self, hook_name: str, n_rows: int) -> Array:
        """Room for so many rows of a hook as they are stored."""
        dtype = self.manifest.dtype
        return np.empty((n_rows, raw_width(dtype, self.manifest.hooks[hook_name].d_in)), dtype=raw_dtype(dtype))

    def read_into(self, out: Array, hook_name: str, segment: SegmentInfo, start: int) -> None:
        """Fill what `empty` gave with the rows of a segment from `start` on."""
        self._read(out, segment, f"acts/{hook_name}", segment.chunk_rows, segment.n_rows, start)

    def read_rows(self, hook_name: str, segment: SegmentInfo, start: int, stop: int) -> Array:
        """Rows [start, stop) of a segment as float32 (n, d_in)."""
        return self.decode(self.read_raw(hook_name, segment, start, stop))

    def decode(self, raw: Array) -> Array:
        """Float32 values of rows as `read_raw` gives them."""
        return decode(raw, self.manifest.dtype)

    def column(self, segment: SegmentInfo, column: Column) -> Array:
        """One integer for every row of a segment, int32: its token, position, or number of its context."""
        return self._integers(segment, column, (segment.n_rows,))

    def contexts(self, segment: SegmentInfo) -> Array:
        """Tokens of a segment's contexts, int32 (n_contexts, context_length); padding is -1."""
        return self._integers(segment, "contexts", (segment.n_contexts, self.manifest.context_length))

    def check_quick(self) -> None:
        """Raise CorruptArtifact unless every file is there with its right size; reads no rows."""
        for segment in self.manifest.segments:
            folder = self.location.child(segment.path)
            found = folder.walk()
            for name, file in self.commit(segment).files.items():
                if found.get(name) != file.n_bytes:
                    raise _damaged(folder, name, f"has {found.get(name)} bytes, wanted {file.n_bytes}")

    def damages(self) -> Iterator[CorruptArtifact]:
        """Read every byte, and give an error for each file that is not as it was written."""
        with ThreadPoolExecutor(max_workers=N_VERIFYING) as pool:
            for segment in self.manifest.segments:
                folder = self.location.child(segment.path)
                try:
                    files = self.commit(segment).files
                except CorruptArtifact as error:
                    yield error
                    continue
                found = pool.map(lambda item, folder=folder: _damage(folder, *item), files.items())
                yield from filter(None, found)

    def commit(self, segment: SegmentInfo) -> SegmentCommit:
        """The commit of a segment; raises CorruptArtifact where it is missing or not the one sealed."""
        place = self.location.child(segment.split, f"{segment.name}.json")
        try:
            data = place.read_bytes()
        except NotFound as error:
            raise CorruptArtifact(f"{place.url} is missing; delete the store and harvest it again") from error
        if digest_of(data) != segment.commit_sha256:
            raise CorruptArtifact(
                f"{place.url} is not the commit that was sealed; delete the store and harvest it again"
            )
        return parse_commit(data, place.url)

    def _integers(self, segment: SegmentInfo, name: str, shape: tuple[int, ...]) -> Array:
        out = np.empty(shape, dtype=np.int32)
        self._read(out, segment, name, column_chunk_rows(shape), shape[0], 0)
        return out

    def _read(self, out: Array, segment: SegmentInfo, name: str, chunk_rows: int, n_rows: int, start: int) -> None:
        """Fill an array with rows from `start` on, of an array of n_rows."""
        stop = start + len(out)
        if not 0 <= start <= stop <= n_rows:
            raise IndexError(f"rows [{start}, {stop}) of {name!r}, which has {n_rows}")
        stored, chunk_shape = out.dtype.newbyteorder("<"), (chunk_rows, *out.shape[1:])
        n_bytes = int(np.prod(chunk_shape)) * stored.itemsize
        for chunk in range(start // chunk_rows, -(-stop // chunk_rows)):
            data = self._files.read(segment, f"{name}/{chunk_key(chunk, out.ndim)}", n_bytes)
            first = chunk * chunk_rows
            here, there = max(start, first), min(stop, first + chunk_rows)
            rows = np.frombuffer(data, dtype=stored).reshape(chunk_shape)
            out[here - start : there - start] = rows[here - first : there - first]


@dataclass(slots=True)
class _CheckedFiles:
    """Files of a store's segments, each compared with its commit when it is read for the first time."""

    store: ActivationStore
    _wanted: OrderedDict[str, dict[str, str]] = field(default_factory=OrderedDict)
    """By segment the digest of each file, or "" once it was compared."""
    _lock: Lock = field(default_factory=Lock)

    def read(self, segment: SegmentInfo, name: str, n_bytes: int) -> bytes:
        """All bytes of a file that must have so many; raises CorruptArtifact."""
        folder, wanted = self.store.location.child(segment.path), self._of(segment)
        try:
            data = folder.child(name).read_bytes()
        except NotFound as error:
            raise _damaged(folder, name, "is missing") from error
        if len(data) != n_bytes:
            raise _damaged(folder, name, f"has {len(data)} bytes, wanted {n_bytes}")
        if wanted.get(name) != "":
            if digest_of(data) != wanted.get(name):
                raise _damaged(folder, name, "holds other bytes than were written")
            wanted[name] = ""
        return data

    def _of(self, segment: SegmentInfo) -> dict[str, str]:
        """The digests of a segment's files; the segment that was not used for longest makes room for them."""
        with self._lock:
            if segment.path in self._wanted:
                self._wanted.move_to_end(segment.path)
                return self._wanted[segment.path]
        # without the lock: others may read meanwhile, and a commit that is read twice does no harm
        wanted = {name: file.sha256 for name, file in self.store.commit(segment).files.items()}
        with self._lock:
            wanted = self._wanted.setdefault(segment.path, wanted)
            while len(self._wanted) > MOST_SEGMENTS:
                self._wanted.popitem(last=False)
        return wanted


def column_chunk_rows(shape: tuple[int, ...]) -> int:
    """Rows in a chunk of an integer array: about 4 MB, at most all of it."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    return max(1, min(shape[0], COLUMN_CHUNK_ROWS // width or 1))


def _damage(folder: Location, name: str, file: StoredFile) -> CorruptArtifact | None:
    """What is wrong with a file, if anything is."""
    try:
        with folder.child(name).open_read() as stream:
            digest, size = stream_digest(stream)
    except NotFound:
        return _damaged(folder, name, "is missing")
    if size != file.n_bytes:
        return _damaged(folder, name, f"has {size} bytes, wanted {file.n_bytes}")
    return None if digest == file.sha256 else _damaged(folder, name, "holds other bytes than were written")


def _damaged(folder: Location, name: str, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{folder.url}/{name} {what}; delete the store and harvest it again")
