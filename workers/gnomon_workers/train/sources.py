"""The rows that a run reads: those of one hook, or of several joined side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from gnomon_storage.activations import ActivationStore
from gnomon_storage.arrays import Array
from gnomon_storage.shuffle import BatchReader


class JointReader:
    """Rows of several hooks of one store, in the order given; a context manager.

    Every hook has a reader of its own, and all read in the same order, for it depends on the store and the seed
    alone: a joint row holds the activations of one token.
    """

    def __init__(self, store: ActivationStore, hook_names: Sequence[str], *, seed: int, batch_size: int) -> None:
        self._readers = [BatchReader(store, name, seed=seed, batch_size=batch_size) for name in hook_names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()

    def batch(self, step: int, start: int, stop: int) -> Array:
        """Rows [start, stop) of global batch `step`, (stop - start, sum of widths) float32."""
        return _joined([reader.batch(step, start, stop) for reader in self._readers])

    def first_sample(self, n_rows: int) -> Array:
        """The first n_rows of the order, at most an epoch."""
        return _joined([reader.first_sample(n_rows) for reader in self._readers])


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
