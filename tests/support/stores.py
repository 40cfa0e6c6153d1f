"""Sealed activation stores of made-up rows, for tests that need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.writing import SegmentWriter, seal

HOOK = "model.layers.0"
CONTEXT_LENGTH = 32


def rows_of(n: int, d_in: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Rows (n, d_in) with a few strong directions and a mean."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((4 * d_in, d_in))
    weights = generator.random((n, 4 * d_in)) ** 12
    return (3 * (weights @ directions) + 1.0).astype(np.float32)


def make_store(
    root: Path | Location,
    *,
    store_id: str = "act_" + "1" * 32,
    d_in: int = 16,
    n_segments: int = 2,
    n_contexts: int = 32,
    hooks: dict[str, int] | None = None,
) -> ActivationStore:
    """A sealed store with n_segments training segments and one held-out segment; hooks maps names to widths."""
    hooks = hooks or {HOOK: d_in}
    base = root if isinstance(root, Location) else Location.open(f"file://{root}")
    place = base.child("activations", store_id)
    commits = []
    for number in range(n_segments + 1):
        n_rows = n_contexts * CONTEXT_LENGTH
        contexts = np.arange(n_rows, dtype=np.int32).reshape(n_contexts, CONTEXT_LENGTH)
        writer = SegmentWriter(
            place,
            split="segments" if number < n_segments else "held_out",
            index=number if number < n_segments else 0,
            attempt=1,
            hooks=hooks,
            dtype="float32",
            contexts=contexts,
            tokens=contexts.reshape(-1),
            positions=np.tile(np.arange(CONTEXT_LENGTH, dtype=np.int32), n_contexts),
            context_ids=np.repeat(np.arange(n_contexts, dtype=np.int32), CONTEXT_LENGTH),
            n_tokens=n_rows,
        )
        writer.append({name: rows_of(n_rows, width, seed=number) for name, width in hooks.items()})
        commits.append(writer.commit())
    return seal(
        place,
        commits,
        dtype="float32",
        store_id=store_id,
        spec={
            "model": {"source": "none", "revision": None},
            "text": [{"url": "none"}],
            "context_length": CONTEXT_LENGTH,
            "packing": {"kind": "concat", "bos": False},
            "drop": {"special_tokens": True},
        },
        context_length=CONTEXT_LENGTH, packing={}, drop={}, model={}, tokenizer={}, text={}, versions={},
    )  # fmt: skip
