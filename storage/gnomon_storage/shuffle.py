"""The order in which training reads rows: chunks by a permutation, then rows within a buffer of many chunks.

The order is a pure function of (seed, epoch, position). It knows nothing of ranks or meshes: global batch t holds the
same rows on any number of devices and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Self

import numpy as np

from gnomon.errors import InvalidRequest
from gnomon_storage.activations import ActivationStore
from gnomon_storage.arrays import Array
from gnomon_storage.manifest import SegmentInfo
from gnomon_storage.rows import row_bytes

BUFFER_BYTES: Final = 256 << 20
"""Bytes of rows that are shuffled together; part of the order, so it must not depend on the machine."""
_CHUNKS: Final = 1
_ROWS: Final = 2
N_READERS: Final = 4
"""Chunks read at once: hides the latency of object stores."""


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """Rows [start, stop) of a segment, stored as one chunk."""

    segment: SegmentInfo
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows in the chunk."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """One buffer of one epoch: which chunks fill it, and in which order its rows are handed out."""

    chunks: tuple[int, ...]
    order: Array
    """Permutation of the buffer's rows, (n_rows,)."""


class RowOrder:
    """Order of the rows of a table of chunks, for every epoch."""

    def __init__(self, chunk_rows: Sequence[int], *, seed: int, buffer_chunks: int) -> None:
        """chunk_rows[i] is the number of rows in chunk i; buffers hold at most buffer_chunks chunks each."""
        self._rows = np.asarray(chunk_rows, dtype=np.int64)
        self.n_rows = int(self._rows.sum())
        self._seed = seed
        self.n_buffers = -(-len(self._rows) // buffer_chunks)
        self._layout = lru_cache(maxsize=4)(self._make_layout)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Epoch, buffer, and offset in the buffer, of a global position (counted over all epochs)."""
        epoch, within = divmod(position, self.n_rows)
        bounds = self._layout(epoch)[1]
        buffer = int(np.searchsorted(bounds, within, side="right")) - 1
        return epoch, buffer, within - int(bounds[buffer])

    def buffer(self, epoch: int, index: int) -> BufferPlan:
        """The plan of one buffer."""
        chunks = self._layout(epoch)[0][index]
        n_rows = int(self._rows[chunks].sum())
        order = _permutation(n_rows, self._seed, _ROWS, epoch, index)
        return BufferPlan(chunks=tuple(chunks.tolist()), order=order)

    def _make_layout(self, epoch: int) -> tuple[list[Array], Array]:
        """The chunks of every buffer of an epoch, and the position at which each buffer begins."""
        n_chunks = len(self._rows)
        # With one buffer all rows are permuted together, and keeping the chunks' order saves reading them again.
        order = _permutation(n_chunks, self._seed, _CHUNKS, epoch) if self.n_buffers > 1 else np.arange(n_chunks)
        # Evenly: a small last buffer would be shuffled worse than the others.
        buffers = np.array_split(order, self.n_buffers)
        sizes = [int(self._rows[chunks].sum()) for chunks in buffers]
        return buffers, np.cumsum([0, *sizes])


def _permutation(n: int, *key: int) -> Array:
    """A permutation of n that depends on the key alone; raw bits, because NumPy keeps only those stable for ever."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class BatchReader:
    """Rows of global batches of one hook, shuffled; reads the next buffer while the present one is used.

    A context manager. `batch` may be called for any step in any order; forward is fast. Holds at most two buffers.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_name: str,
        *,
        seed: int,
        batch_size: int,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self._store = store
        self._hook_name = hook_name
        self._batch_size = batch_size
        self._d_in = _width(store, hook_name)
        self._chunks = chunk_table(store)
        # By the widest hook, so that the rows of every hook of the store come in the same order.
        widest = max(hook.d_in for hook in store.manifest.hooks.values())
        n_bytes = max(chunk.n_rows for chunk in self._chunks) * row_bytes(store.manifest.dtype, widest)
        self._order = RowOrder(
            [chunk.n_rows for chunk in self._chunks], seed=seed, buffer_chunks=max(1, buffer_bytes // n_bytes)
        )
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="buffer")
        self._readers = ThreadPoolExecutor(max_workers=N_READERS, thread_name_prefix="chunk")
        self._loading: dict[tuple[int, int], Future[_Buffer]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._loading.clear()

    @property
    def n_rows(self) -> int:
        """Rows in an epoch."""
        return self._order.n_rows

    def batch(self, step: int, start: int, stop: int) -> Array:
        """Rows [start, stop) of global batch `step`, (stop - start, d_in) float32; wraps over epochs."""
        if not 0 <= start <= stop <= self._batch_size:
            raise IndexError(f"rows [{start}, {stop}) of a batch of {self._batch_size}")
        return self._rows(step * self._batch_size + start, stop - start)

    def first_sample(self, n_rows: int) -> Array:
        """The first n_rows of the order, at most an epoch, (n, d_in) float32."""
        return self._rows(0, min(n_rows, self.n_rows))

    def _rows(self, position: int, n_rows: int) -> Array:
        out = np.empty((n_rows, self._d_in), dtype=np.float32)
        filled = 0
        while filled < n_rows:
            epoch, index, offset = self._order.locate(position + filled)
            buffer = self._buffer(epoch, index)
            picks = buffer.order[offset : offset + n_rows - filled]
            out[filled : filled + len(picks)] = self._store.decode(buffer.raw[picks])
            filled += len(picks)
        return out

    def _buffer(self, epoch: int, index: int) -> _Buffer:
        """A buffer, with the one after it under way; all others are dropped first, which bounds the memory."""
        following = (epoch, index + 1) if index + 1 < self._order.n_buffers else (epoch + 1, 0)
        wanted = ((epoch, index), following)
        kept = {key: future for key, future in self._loading.items() if key in wanted}
        for key, future in self._loading.items():
            if key not in kept:
                future.cancel()
        present = next((future for future in kept.values() if future.done()), None)
        self._loading = kept
        for key in wanted:
            if key not in kept:
                kept[key] = self._loader.submit(self._load, key, present)
        return kept[wanted[0]].result()

    def _load(self, key: tuple[int, int], present: Future[_Buffer] | None) -> _Buffer:
        plan = self._order.buffer(*key)
        if present is not None and present.result().chunks == plan.chunks:
            return _Buffer(chunks=plan.chunks, order=plan.order, raw=present.result().raw)
        chunks = [self._chunks[number] for number in plan.chunks]
        bounds = np.cumsum([0, *(chunk.n_rows for chunk in chunks)])
        raw = self._store.empty(self._hook_name, int(bounds[-1]))

        def read(item: tuple[int, ChunkRef]) -> None:
            number, chunk = item
            self._store.read_into(raw[bounds[number] : bounds[number + 1]], self._hook_name, chunk.segment, chunk.start)

        for _ in self._readers.map(read, enumerate(chunks)):
            pass
        return _Buffer(chunks=plan.chunks, order=plan.order, raw=raw)


@dataclass(frozen=True, slots=True)
class _Buffer:
    chunks: tuple[int, ...]
    order: Array
    raw: Array


def chunk_table(store: ActivationStore) -> tuple[ChunkRef, ...]:
    """Every chunk of the rows to train on, in order; the same for every hook of the store."""
    return tuple(
        ChunkRef(segment, start, min(start + segment.chunk_rows, segment.n_rows))
        for segment in store.manifest.split("segments")
        for start in range(0, segment.n_rows, segment.chunk_rows)
    )


def _width(store: ActivationStore, hook_name: str) -> int:
    info = store.manifest.hooks.get(hook_name)
    if info is None:
        raise InvalidRequest(
            f"store {store.manifest.store_id} has no hook {hook_name!r}; it has {', '.join(store.manifest.hooks)}",
            code="unknown_hook",
        )
    return info.d_in
