"""Small activation stores with known rows, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gnomon.specs import StoredDtype
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit, Split
from gnomon_storage.writing import SegmentWriter, seal
from tests.support.stored_rows import as_stored

CONTEXT_LENGTH = 4
HOOKS = {"layers.0": 8, "layers.1": 3}
Rows = np.ndarray[Any, np.dtype[np.float32]]


def known_rows(first: int, n_rows: int, d_in: int) -> Rows:
    """Rows whose first number is the row's own number, counted over the whole store."""
    rows = np.random.default_rng(first).standard_normal((n_rows, d_in)).astype(np.float32)
    rows[:, 0] = np.arange(first, first + n_rows)
    return rows


def write_segment(
    store: Location,
    split: Split,
    index: int,
    *,
    first: int,
    n_rows: int,
    dtype: StoredDtype = "float32",
    attempt: int = 1,
) -> SegmentCommit:
    """One committed segment with rows numbered from `first`; every context has dropped its first token."""
    kept = CONTEXT_LENGTH - 1
    n_contexts = -(-n_rows // kept)
    contexts = np.arange(n_contexts * CONTEXT_LENGTH, dtype=np.int32).reshape(n_contexts, CONTEXT_LENGTH)
    positions = np.tile(np.arange(1, CONTEXT_LENGTH, dtype=np.int32), n_contexts)[:n_rows]
    context_ids = np.repeat(np.arange(n_contexts, dtype=np.int32), kept)[:n_rows]
    writer = SegmentWriter(
        store, split=split, index=index, attempt=attempt, hooks=HOOKS, dtype=dtype, contexts=contexts,
        tokens=contexts[context_ids, positions], positions=positions, context_ids=context_ids,
        n_tokens=contexts.size,
    )  # fmt: skip
    for start in range(0, n_rows, 100):
        n = min(100, n_rows - start)
        rows = {name: known_rows(first, n_rows, d_in)[start : start + n] for name, d_in in HOOKS.items()}
        writer.append({name: as_stored(values, dtype) for name, values in rows.items()})
    return writer.commit()


def make_counted_store(
    folder: Path | str, sizes: tuple[int, ...] = (700, 513, 300), dtype: StoredDtype = "float32"
) -> ActivationStore:
    """A sealed store of training segments with the given numbers of rows, and one of 60 held out."""
    location = Location.open(str(folder))
    firsts = np.cumsum([0, *sizes])
    commits = [
        write_segment(location, "segments", index, first=int(firsts[index]), n_rows=n_rows, dtype=dtype)
        for index, n_rows in enumerate(sizes)
    ]
    commits.append(write_segment(location, "held_out", 0, first=10**6, n_rows=60, dtype=dtype))
    return seal_store(location, commits, dtype=dtype)


def seal_store(location: Location, commits: list[SegmentCommit], *, dtype: StoredDtype = "float32") -> ActivationStore:
    """Seal with made-up provenance."""
    return seal(
        location, commits, dtype=dtype, store_id="act_" + "0" * 32, spec={}, context_length=CONTEXT_LENGTH, packing={},
        drop={}, model={}, tokenizer={}, text={}, versions={},
    )  # fmt: skip
