"""An activation store, written: segments by one writer each, then the manifest that seals them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from gnomon.errors import NotFound
from gnomon.specs import StoredDtype
from gnomon_storage.activations import MANIFEST, ActivationStore, column_chunk_rows
from gnomon_storage.arrays import Array, chunk_key, make_array
from gnomon_storage.digests import canonical_json, digest_of
from gnomon_storage.local import sync_tree
from gnomon_storage.location import Location
from gnomon_storage.manifest import (
    HookInfo,
    HookSums,
    Manifest,
    SegmentCommit,
    SegmentInfo,
    Split,
    StoredFile,
    parse_commit,
    segment_name,
    segment_path,
)
from gnomon_storage.rows import decode, raw_dtype, raw_width, row_bytes

CHUNK_BYTES = {"file": 4 << 20, "s3": 16 << 20}
"""Target size of a chunk: object stores want fewer, larger requests."""
ROW_MULTIPLE = 256


class SegmentWriter:
    """Writes one segment: the whole index first, then rows in order, then `commit`.

    Belongs to one attempt, and to one life of a worker in it.

    tokens, positions and context_ids are int32 (n_rows,), contexts int32 (n_contexts, context_length), padding -1.
    """

    def __init__(
        self,
        store: Location,
        *,
        split: Split,
        index: int,
        attempt: int,
        hooks: Mapping[str, int],
        dtype: StoredDtype,
        contexts: Array,
        tokens: Array,
        positions: Array,
        context_ids: Array,
        n_tokens: int,
        life: int = 0,
    ) -> None:
        self._store = store
        self._split = split
        self._index = index
        self._attempt = attempt
        self._life = life
        self._dtype = dtype
        self._n_tokens = n_tokens
        self._n_contexts = len(contexts)
        self._n_rows = len(tokens)
        self._folder = store.child(segment_path(split, index, attempt, life))
        self._folder.delete()  # left by an earlier life of the same attempt
        self._chunk_rows = rows_per_chunk(self._n_rows, max(hooks.values()), dtype, store.scheme)
        self._files: dict[str, StoredFile] = {}
        self._columns = {name: _Column(self, f"acts/{name}", d_in, dtype) for name, d_in in hooks.items()}
        columns = {"tokens": tokens, "positions": positions, "context_ids": context_ids, "contexts": contexts}
        for name, values in columns.items():
            self._write_column(name, values)

    def append(self, rows: Mapping[str, Array], squared_errors: Mapping[str, float] | None = None) -> None:
        """Add the next rows of every hook, each (n, width) as stored (see `gnomon_storage.rows`).

        squared_errors: by hook, the sum of the rows' squared distances from what the model gave; None: not measured.
        """
        for name, column in self._columns.items():
            column.append(rows[name], None if squared_errors is None else squared_errors[name])

    def commit(self) -> SegmentCommit:
        """Make the segment part of the store; where another attempt was first, drop this one and return that."""
        sums = {name: column.finish() for name, column in self._columns.items()}
        for name in self._folder.walk():
            if name not in self._files:  # the metadata, which Zarr wrote
                self._note(name, self._folder.child(name).read_bytes())
        root = self._folder.local_path()
        if root is not None:
            sync_tree(root)
        commit = SegmentCommit(
            name=segment_name(self._index),
            split=self._split,
            index=self._index,
            attempt=self._attempt,
            life=self._life,
            n_rows=self._n_rows,
            n_contexts=self._n_contexts,
            n_tokens=self._n_tokens,
            chunk_rows=self._chunk_rows,
            files=dict(sorted(self._files.items())),
            sums=sums,
        )
        place = commit_location(self._store, self._split, self._index)
        if place.create_bytes(canonical_json(commit.model_dump(mode="json"))):
            return commit
        winner = parse_commit(place.read_bytes(), place.url)
        if winner.path != commit.path:
            self._folder.delete()
        return winner

    @property
    def folder(self) -> Location:
        """The segment's Zarr folder."""
        return self._folder

    @property
    def n_rows(self) -> int:
        """Rows of the whole segment."""
        return self._n_rows

    @property
    def chunk_rows(self) -> int:
        """Rows in a chunk."""
        return self._chunk_rows

    def write_chunk(self, array: str, chunk: int, block: Array, n_rows: int) -> None:
        """Write rows as one chunk of an array whose chunks have n_rows rows.

        The bytes go to the store directly: an uncompressed chunk is nothing but its rows, the digest is then of
        exactly what was written, and Zarr would leave a chunk of zeros out, which could not be told from a lost one.
        """
        if len(block) < n_rows:  # the last chunk of an array is filled up
            missing = np.zeros((n_rows - len(block), *block.shape[1:]), dtype=block.dtype)
            block = np.concatenate([block, missing])
        name, data = f"{array}/{chunk_key(chunk, block.ndim)}", block.tobytes()
        self._folder.child(name).write_bytes(data)
        self._note(name, data)

    def _note(self, name: str, data: bytes) -> None:
        self._files[name] = StoredFile(n_bytes=len(data), sha256=digest_of(data))

    def _write_column(self, name: str, values: Array) -> None:
        values = np.ascontiguousarray(values, dtype="<i4")
        rows = column_chunk_rows(values.shape)
        make_array(self._folder, name, shape=values.shape, chunk_rows=rows, dtype="int32", attributes={})
        for start in range(0, len(values), rows):
            self.write_chunk(name, start // rows, values[start : start + rows], rows)


class _Column:
    """Rows of one hook: gathered into whole chunks, summed, written once each."""

    def __init__(self, writer: SegmentWriter, name: str, d_in: int, dtype: StoredDtype) -> None:
        self._writer = writer
        self._name = name
        self._dtype = dtype
        chunk_rows, width, raw = writer.chunk_rows, raw_width(dtype, d_in), raw_dtype(dtype)
        shape, attributes = (writer.n_rows, width), {"dtype": dtype}
        make_array(writer.folder, name, shape=shape, chunk_rows=chunk_rows, dtype=raw, attributes=attributes)
        self._buffer = np.empty((chunk_rows, width), dtype=raw)
        self._n_buffered = 0
        self._n_written = 0
        self._total = np.zeros(d_in)
        self._squared_norm = 0.0
        self._squared_error: float | None = 0.0

    def append(self, rows: Array, squared_error: float | None) -> None:
        if squared_error is None or self._squared_error is None:
            self._squared_error = None
        else:
            self._squared_error += squared_error
        while len(rows):
            n_rows = min(len(rows), len(self._buffer) - self._n_buffered)
            self._buffer[self._n_buffered : self._n_buffered + n_rows] = rows[:n_rows]
            self._n_buffered += n_rows
            rows = rows[n_rows:]
            if self._n_buffered == len(self._buffer):
                self._flush()

    def finish(self) -> HookSums:
        if self._n_buffered:
            self._flush()
        if self._n_written != self._writer.n_rows:
            raise ValueError(f"{self._name}: {self._n_written} rows were written of {self._writer.n_rows}")
        return HookSums(
            total=tuple(self._total.tolist()), squared_norm=self._squared_norm, squared_error=self._squared_error
        )

    def _flush(self) -> None:
        block = self._buffer[: self._n_buffered]
        chunk_rows = len(self._buffer)
        self._writer.write_chunk(self._name, self._n_written // chunk_rows, block, chunk_rows)
        values = decode(block, self._dtype).astype(np.float64)
        self._total += values.sum(0)
        self._squared_norm += float(np.einsum("ij,ij->", values, values))
        self._n_written += len(block)
        self._n_buffered = 0


def rows_per_chunk(n_rows: int, d_in: int, dtype: StoredDtype, scheme: str) -> int:
    """Rows in a chunk of about CHUNK_BYTES, a multiple of ROW_MULTIPLE; all rows of a smaller segment.

    d_in is the widest hook's, so that the rows of every hook are chunked, and shuffled, alike.
    """
    fitting = CHUNK_BYTES[scheme] // row_bytes(dtype, d_in) // ROW_MULTIPLE * ROW_MULTIPLE
    return max(1, min(n_rows, max(ROW_MULTIPLE, fitting)))


def commit_location(store: Location, split: Split, index: int) -> Location:
    """Where the commit of a segment lies."""
    return store.child(split, f"{segment_name(index)}.json")


def load_commit(store: Location, split: Split, index: int) -> SegmentCommit | None:
    """The commit of a segment, or None where it is not committed yet."""
    place = commit_location(store, split, index)
    try:
        return parse_commit(place.read_bytes(), place.url)
    except NotFound:
        return None


def seal(store: Location, commits: list[SegmentCommit], *, dtype: StoredDtype, **fields: Any) -> ActivationStore:
    """Write the manifest over the committed segments; where another attempt was first, return what it sealed.

    `fields` are the manifest's that do not follow from the commits: store_id, spec, context_length, packing, drop,
    model, tokenizer, text, versions.
    """
    ordered = sorted(commits, key=lambda commit: (commit.split != "segments", commit.index))
    infos = tuple(_info(store, commit) for commit in ordered)
    manifest = Manifest(
        dtype=dtype,
        hooks=summarise([commit for commit in ordered if commit.split == "segments"]),
        n_rows=sum(info.n_rows for info in infos if info.split == "segments"),
        n_held_out_rows=sum(info.n_rows for info in infos if info.split == "held_out"),
        n_tokens=sum(commit.n_tokens for commit in ordered),
        n_bytes=sum(info.n_bytes for info in infos),
        segments=infos,
        **fields,
    ).sealed()
    store.child(MANIFEST).create_bytes(canonical_json(manifest.model_dump(mode="json")))
    return ActivationStore.open(store)


def summarise(commits: list[SegmentCommit]) -> dict[str, HookInfo]:
    """Means of every hook, divided once over the sums of all segments."""
    n_rows = max(1, sum(commit.n_rows for commit in commits))
    hooks = {}
    for name in commits[0].sums:
        sums = [commit.sums[name] for commit in commits]
        mean = np.array([each.total for each in sums]).sum(0) / n_rows
        mean_squared_norm = sum(each.squared_norm for each in sums) / n_rows
        hooks[name] = HookInfo(
            d_in=len(mean),
            mean=tuple(mean.tolist()),
            mean_squared_norm=mean_squared_norm,
            rounding_error=_rounding_error(sums, n_rows, mean_squared_norm - float(mean @ mean)),
        )
    return hooks


def _rounding_error(sums: list[HookSums], n_rows: int, variance: float) -> float | None:
    known = [each.squared_error for each in sums if each.squared_error is not None]
    if len(known) < len(sums) or variance <= 0:
        return None
    return sum(known) / n_rows / variance


def _info(store: Location, commit: SegmentCommit) -> SegmentInfo:
    data = commit_location(store, commit.split, commit.index).read_bytes()
    return SegmentInfo(
        name=commit.name,
        split=commit.split,
        index=commit.index,
        path=commit.path,
        n_rows=commit.n_rows,
        n_contexts=commit.n_contexts,
        n_bytes=sum(file.n_bytes for file in commit.files.values()),
        chunk_rows=commit.chunk_rows,
        commit_sha256=digest_of(data),
    )


def leftovers(store: Location, kept: Collection[str]) -> list[Location]:
    """Segment folders, but for those at these paths: attempts that were lost left them."""
    return [
        store.child(split, name)
        for split in ("segments", "held_out")
        for name in store.child(split).list()
        if name.endswith(".zarr") and f"{split}/{name}" not in kept
    ]
