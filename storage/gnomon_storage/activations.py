"""A sealed activation store, read: rows, contexts, and whether every byte is what was harvested."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Final, Literal, TypeAlias

import numpy as np

from gnomon.errors import CorruptArtifact, NotFound
from gnomon_storage.arrays import Array, ZarrArray, float32_from_bfloat16, open_array, read_rows
from gnomon_storage.digests import digest_of, stream_digest
from gnomon_storage.location import Location
from gnomon_storage.manifest import (
    Manifest,
    SegmentCommit,
    SegmentInfo,
    parse_commit,
    parse_manifest,
)

Column: TypeAlias = Literal["tokens", "positions", "context_ids"]
MANIFEST = "manifest.json"
COLUMN_CHUNK_ROWS = 1 << 20
"""Rows in a chunk of the integer columns: 4 MB."""
MAX_OPEN_ARRAYS: Final = 1024
"""Arrays that a store holds open, the last used ones: some 20 kB each."""
RAW_DTYPES = {"float32": "float32", "bfloat16": "uint16"}


class ActivationStore:
    """Rows of a sealed store. Reading is safe from several threads."""

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest
        self._arrays: OrderedDict[tuple[str, str], ZarrArray] = OrderedDict()
        self._lock = Lock()

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
        """Rows [start, stop) of a segment as stored, (n, d_in): float32, or bfloat16 bits as uint16."""
        shape = (segment.n_rows, self.manifest.hooks[hook_name].d_in)
        return self._read(segment, f"acts/{hook_name}", RAW_DTYPES[self.manifest.dtype], shape, start, stop)

    def read_rows(self, hook_name: str, segment: SegmentInfo, start: int, stop: int) -> Array:
        """Rows [start, stop) of a segment as float32 (n, d_in)."""
        return self.decode(self.read_raw(hook_name, segment, start, stop))

    def decode(self, raw: Array) -> Array:
        """Float32 values of rows as `read_raw` gives them."""
        return raw if self.manifest.dtype == "float32" else float32_from_bfloat16(raw)

    def column(self, segment: SegmentInfo, column: Column) -> Array:
        """One integer for every row of a segment, int32: its token, position, or number of its context."""
        return self._read(segment, column, "int32", (segment.n_rows,), 0, segment.n_rows)

    def contexts(self, segment: SegmentInfo) -> Array:
        """Tokens of a segment's contexts, int32 (n_contexts, context_length); padding is -1."""
        shape = (segment.n_contexts, self.manifest.context_length)
        return self._read(segment, "contexts", "int32", shape, 0, segment.n_contexts)

    def check_quick(self) -> None:
        """Raise CorruptArtifact unless every file is there with its right size; reads no rows."""
        for segment in self.manifest.segments:
            folder = self.location.child(segment.path)
            found = folder.walk()
            for name, file in self.commit(segment).files.items():
                if found.get(name) != file.n_bytes:
                    raise _damaged(folder, name, f"has {found.get(name)} bytes, wanted {file.n_bytes}")

    def verify(self, *, part: int = 0, n_parts: int = 1, on_file: Callable[[], None] = lambda: None) -> None:
        """Raise CorruptArtifact unless the bytes of every file are what was written; on_file is called after each.

        With n_parts > 1, part i of n reads only its share of the files; all parts together read each once.
        """
        files = list(self._files())[part::n_parts]
        with ThreadPoolExecutor(max_workers=2) as pool:
            for _ in pool.map(lambda item: _check_file(*item), files):
                on_file()

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

    def _files(self) -> Iterator[tuple[Location, str, int, str]]:
        for segment in self.manifest.segments:
            folder = self.location.child(segment.path)
            for name, file in self.commit(segment).files.items():
                yield folder, name, file.n_bytes, file.sha256

    def _read(
        self, segment: SegmentInfo, name: str, dtype: str, shape: tuple[int, ...], start: int, stop: int
    ) -> Array:
        folder = self.location.child(segment.path)
        rows = segment.chunk_rows if name.startswith("acts/") else column_chunk_rows(shape)
        array = self._opened(folder, name, lambda: open_array(folder, name, shape=shape, chunk_rows=rows, dtype=dtype))
        return read_rows(array, folder, name, start, stop)

    def _opened(self, folder: Location, name: str, make: Callable[[], ZarrArray]) -> ZarrArray:
        """An array that is open already, or is now; the one that was not used for longest makes room for it."""
        key = (folder.path, name)
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = make()  # without the lock: others may read meanwhile, and one that is opened twice does no harm
        with self._lock:
            self._arrays[key] = array
            while len(self._arrays) > MAX_OPEN_ARRAYS:
                self._arrays.popitem(last=False)
        return array


def column_chunk_rows(shape: tuple[int, ...]) -> int:
    """Rows in a chunk of an integer array: about 4 MB, at most all of it."""
    width = int(np.prod(shape[1:], dtype=np.int64))
    return max(1, min(shape[0], COLUMN_CHUNK_ROWS // width or 1))


def _check_file(folder: Location, name: str, n_bytes: int, sha256: str) -> None:
    try:
        with folder.child(name).open_read() as stream:
            digest, size = stream_digest(stream)
    except NotFound as error:
        raise _damaged(folder, name, "is missing") from error
    if size != n_bytes:
        raise _damaged(folder, name, f"has {size} bytes, wanted {n_bytes}")
    if digest != sha256:
        raise _damaged(folder, name, "holds other bytes than were written")


def _damaged(folder: Location, name: str, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{folder.url}/{name} {what}; delete the store and harvest it again")
