"""Products with sparse activations: every program owns a row of the result, so sums need no atomics and no order
but that of the picks; two runs give the same bits."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS: Final = 1024
"""Columns of one program where columns can be divided among programs."""
PICKS_AT_ONCE: Final = 4
"""Rows loaded before the first is added: their indices are a load too, and one at a time would wait for each."""


@triton.jit
def gather_rows(vectors_ptr, rows, is_pick, columns, d_in):
    """Tile (picks, columns) of the vectors' rows, 0 beyond the end of picks and columns."""
    inside = is_pick[:, None] & (columns < d_in)[None, :]
    return tl.load(vectors_ptr + rows.to(tl.int64)[:, None] * d_in + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _segment_kernel(
    offsets_ptr, rows_ptr, weights_ptr, vectors_ptr, out_ptr, d_in, COLUMNS: tl.constexpr, PICKS: tl.constexpr
):
    """out[s] = sum over the picks of segment s of weight * vectors[row]; program (s, block of columns).

    Loads every picked row once, and stores its block of out (n_segments, d_in) once.
    """
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(offsets_ptr + segment + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.load(offsets_ptr + segment), end, PICKS):
        picks = first + tl.arange(0, PICKS)
        rows = tl.load(rows_ptr + picks, mask=picks < end, other=0)
        weights = tl.load(weights_ptr + picks, mask=picks < end, other=0.0)
        total += tl.sum(weights[:, None] * gather_rows(vectors_ptr, rows, picks < end, columns, d_in), axis=0)
    tl.store(out_ptr + segment * d_in + columns, total, mask=columns < d_in)


@triton.jit
def _sampled_kernel(
    offsets_ptr, rows_ptr, left_ptr, right_ptr, out_ptr, d_in, COLUMNS: tl.constexpr, PICKS: tl.constexpr
):
    """out[p] = <left[s], right[row of p]> for every pick p of segment s, the program.

    Loads every picked row once and its own row of left again for every few picks, from the cache; stores one number
    a pick.
    """
    segment = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets_ptr + segment + 1)
    for first in range(tl.load(offsets_ptr + segment), end, PICKS):
        picks = first + tl.arange(0, PICKS)
        rows = tl.load(rows_ptr + picks, mask=picks < end, other=0)
        total = tl.zeros((PICKS,), tl.float32)
        for start in range(0, d_in, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            left = tl.load(left_ptr + segment * d_in + columns, mask=columns < d_in, other=0.0)
            total += tl.sum(gather_rows(right_ptr, rows, picks < end, columns, d_in) * left[None, :], axis=1)
        tl.store(out_ptr + picks, total, mask=picks < end)


def segment_sums(offsets: Tensor, rows: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """For every segment the sum of weight * vectors[row] over its picks, (n_segments, d_in) float32.

    offsets is (n_segments + 1,), rows and weights are (nnz,), vectors is (n, d_in).
    """
    d_in = vectors.shape[1]
    out = torch.empty(len(offsets) - 1, d_in, device=vectors.device)
    if out.numel():
        columns = min(triton.next_power_of_2(d_in), MAX_COLUMNS)
        _segment_kernel[(len(out), triton.cdiv(d_in, columns))](
            offsets, rows, weights.contiguous(), vectors.contiguous(), out, d_in, COLUMNS=columns, PICKS=PICKS_AT_ONCE
        )
    return out


def sampled_products(offsets: Tensor, rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """For every pick <left[its segment], right[its row]>, (nnz,) float32; left is (n_segments, d_in)."""
    d_in = left.shape[1]
    out = torch.empty(len(rows), device=left.device)
    if len(out):
        columns = min(triton.next_power_of_2(d_in), MAX_COLUMNS)
        _sampled_kernel[(len(left),)](
            offsets, rows, left.contiguous(), right.contiguous(), out, d_in, COLUMNS=columns, PICKS=PICKS_AT_ONCE
        )
    return out
