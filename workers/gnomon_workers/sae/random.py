"""Counter-based randomness: every draw is a function of (seed, purpose, index), never of what was drawn before."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

ROWS_PER_BLOCK = 256
"""Rows drawn from one generator, so that a shard can draw its rows without drawing the others'."""


def make_generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator for one purpose, independent of every other (seed, purpose, index)."""
    # as uint64: numpy makes floats of a list whose numbers exceed int64, and their low bits, the index, are lost
    key = np.array([seed, (zlib.crc32(purpose.encode()) << 32) | index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def random_unit_rows(seed: int, purpose: str, start: int, stop: int, d_in: int) -> Tensor:
    """Rows [start, stop) of an endless table of random unit vectors, (stop - start, d_in) float32.

    The rows do not depend on which range is asked for: a sharded dictionary begins as the unsharded one does.
    """
    rows = torch.empty(stop - start, d_in)
    for block in range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        first = block * ROWS_PER_BLOCK
        drawn = make_generator(seed, purpose, block).standard_normal((ROWS_PER_BLOCK, d_in), dtype=np.float32)
        lo, hi = max(start, first), min(stop, first + ROWS_PER_BLOCK)
        rows[lo - start : hi - start] = torch.from_numpy(drawn[lo - first : hi - first])
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
