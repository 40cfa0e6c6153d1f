"""Products with sparse activations: every program owns a row of the result, so sums need no atomics and no order
but that of the picks; two runs give the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What one program does at a time."""

    columns: int
    """Of a row; programs of one block of columns run together, so that few columns leave more rows in the cache."""
    picks: int
    """Rows loaded before the first is added: their indices are a load too, and one at a time would wait for each."""
    n_warps: int

    def launch(self, width: int) -> dict[str, int]:
        """Options of a kernel over rows of a width."""
        columns = min(triton.next_power_of_2(width), self.columns)
        return {"COLUMNS": columns, "PICKS": self.picks, "num_warps": self.n_warps}


SEGMENT_BLOCKS: Final = Blocks(columns=128, picks=8, n_warps=1)
SAMPLED_BLOCKS: Final = Blocks(columns=256, picks=4, n_warps=1)
PASSES: Final = tl.constexpr(8)
"""Times that a program of the sampled product takes its few picks."""


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
    tokens_ptr, rows_ptr, left_ptr, right_ptr, out_ptr, n_picks, d_in, COLUMNS: tl.constexpr, PICKS: tl.constexpr
):
    """out[block, p] = <left[token of p], right[row of p]> over one block of columns.

    Program (c, block) has the c-th few picks, whatever tokens they belong to: where a token has a hundred times the
    picks of others, nobody waits for it. Loads its part of every row once, those of left from the cache.
    """
    block = tl.program_id(1).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    for i in range(PASSES):
        picks = (tl.program_id(0) * PASSES + i) * PICKS + tl.arange(0, PICKS)
        is_pick = picks < n_picks
        tokens = tl.load(tokens_ptr + picks, mask=is_pick, other=0)
        rows = tl.load(rows_ptr + picks, mask=is_pick, other=0)
        left = gather_rows(left_ptr, tokens, is_pick, columns, d_in)
        right = gather_rows(right_ptr, rows, is_pick, columns, d_in)
        tl.store(out_ptr + block * n_picks + picks, tl.sum(left * right, axis=1), mask=is_pick)


def segment_sums(
    offsets: Tensor, rows: Tensor, weights: Tensor, vectors: Tensor, *, blocks: Blocks = SEGMENT_BLOCKS
) -> Tensor:
    """For every segment the sum of weight * vectors[row] over its picks, (n_segments, d_in) float32.

    offsets is (n_segments + 1,), rows and weights are (nnz,), vectors is (n, d_in).
    """
    d_in = vectors.shape[1]
    out = torch.empty(len(offsets) - 1, d_in, device=vectors.device)
    if out.numel():
        options = blocks.launch(d_in)
        _segment_kernel[(len(out), triton.cdiv(d_in, options["COLUMNS"]))](
            offsets, rows, weights.contiguous(), vectors.contiguous(), out, d_in, **options
        )
    return out


def sampled_products(
    tokens: Tensor, rows: Tensor, left: Tensor, right: Tensor, *, blocks: Blocks = SAMPLED_BLOCKS
) -> Tensor:
    """For every pick <left[its token], right[its row]>, (nnz,) float32; tokens and rows are (nnz,).

    Blocks of columns are added in their order: two runs give the same bits.
    """
    d_in, options = left.shape[1], blocks.launch(left.shape[1])
    n_blocks = triton.cdiv(d_in, options["COLUMNS"])
    out = torch.empty(n_blocks, len(rows), device=left.device)
    if len(rows):
        _sampled_kernel[(triton.cdiv(len(rows), PASSES.value * blocks.picks), n_blocks)](
            tokens, rows, left.contiguous(), right.contiguous(), out, len(rows), d_in, **options
        )
    return out.sum(0) if n_blocks > 1 else out[0]
