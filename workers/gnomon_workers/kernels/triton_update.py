"""Gradients and the optimizer by whole rows: a program owns one feature, and everything it reads it reads once.

Two kernels, because clipping needs the norm of all gradients before the first row may move:

1. `aligned_gradients`: the sums over a feature's picks, both in one pass, projected by the alignment rule while they
   are in registers, and stored once. Only touched features are visited: of others the gradient is zero, and stays so
   under the projection.
2. `update_rows`: clip, Adam, retraction. Every matrix is loaded and stored once, gradients only of touched features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.kernels.triton_sparse import gather_rows
from gnomon_workers.sae.products import RowGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """How a program holds a whole row of both matrices in its registers."""

    columns_per_warp: int
    picks: int = 1
    """Rows gathered before the first is added: two matrices are gathered and their sums held beside them."""

    def launch(self, width: int) -> dict[str, int]:
        """Options of a kernel over rows of a width."""
        columns = triton.next_power_of_2(width)
        return {"COLUMNS": columns, "num_warps": min(max(columns // self.columns_per_warp, 1), MAX_WARPS)}


MAX_WARPS: Final = 16
SHORT: Final = 1024
"""Columns of a row whose gathers are so short that many threads must have one each under way."""
SHORT_GRADIENT_BLOCKS: Final = RowBlocks(columns_per_warp=64)
GRADIENT_BLOCKS: Final = RowBlocks(columns_per_warp=1024, picks=2)
UPDATE_BLOCKS: Final = RowBlocks(columns_per_warp=128)


@triton.jit
def _dot(a, b):
    return tl.sum(a * b, axis=0)


@triton.jit
def _project(g, h, w, d, ALIGNMENT: tl.constexpr):
    """Gradients of the reparameterisation of one row from plain ones: the rules of gnomon_workers.sae.alignment."""
    if ALIGNMENT == "orth":
        u = _dot(g, d)
        g, h = g - u * d, h + (u - _dot(h, d)) * d - u * w
    elif ALIGNMENT == "stopgrad":
        g, h = g - _dot(g, d) * d, h - _dot(h, d) * d
    elif ALIGNMENT == "scale":
        u = _dot(g, w)
        h -= u * w
        g, h = g - u * d, h - _dot(h, d) * d
    else:
        if ALIGNMENT == "tied":
            h += g
        h -= _dot(h, d) * d
    return g, h


@triton.jit
def _gradient_kernel(
    order_ptr, touched_ptr, offsets_ptr, tokens_ptr, rows_ptr, gradients_ptr, values_ptr, x_ptr, residual_ptr,
    w_ptr, d_ptr, g_ptr, h_ptr, squares_ptr, d_in, d_out,
    COLUMNS: tl.constexpr, PICKS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Projected gradients g (d_in) and h (d_out) of one touched feature, and the sum of their squares.

    Loads a row of x and one of the residual gradients for every pick, and w and d; stores g, h and one number.
    """
    segment = tl.load(order_ptr + tl.program_id(0))
    end = tl.load(offsets_ptr + segment + 1)
    columns = tl.arange(0, COLUMNS)
    g = tl.zeros((COLUMNS,), tl.float32)
    h = tl.zeros((COLUMNS,), tl.float32)
    for first in range(tl.load(offsets_ptr + segment), end, PICKS):
        picks = first + tl.arange(0, PICKS)
        is_pick = picks < end
        tokens = tl.load(tokens_ptr + picks, mask=is_pick, other=0)
        rows = tl.load(rows_ptr + picks, mask=is_pick, other=0)
        gradients = tl.load(gradients_ptr + picks, mask=is_pick, other=0.0)
        values = tl.load(values_ptr + picks, mask=is_pick, other=0.0)
        g += tl.sum(gradients[:, None] * gather_rows(x_ptr, tokens, is_pick, columns, d_in), axis=0)
        h += tl.sum(values[:, None] * gather_rows(residual_ptr, rows, is_pick, columns, d_out), axis=0)
    feature = tl.load(touched_ptr + segment).to(tl.int64)
    is_in, is_out = columns < d_in, columns < d_out
    w = tl.load(w_ptr + feature * d_in + columns, mask=is_in, other=0.0)
    d = tl.load(d_ptr + feature * d_out + columns, mask=is_out, other=0.0)
    g, h = _project(g, h, w, d, ALIGNMENT)
    squares = _dot(h, h)
    if ALIGNMENT != "tied":
        squares += _dot(g, g)
        tl.store(g_ptr + segment * d_in + columns, g, mask=is_in)
    tl.store(h_ptr + segment * d_out + columns, h, mask=is_out)
    tl.store(squares_ptr + segment, squares)


@triton.jit
def _adam(p_ptr, first_ptr, second_ptr, g, place, inside, rate, take1, keep2, take2, eps, root_correction):
    """One step of one row: loads and stores both moments, loads the parameters and returns what they become.

    take is 1 - beta from the host: in float32 the difference would be 4e-5 off for a beta of .999.
    """
    first = tl.load(first_ptr + place, mask=inside, other=0.0)
    second = tl.load(second_ptr + place, mask=inside, other=0.0)
    first += take1 * (g - first)
    second = keep2 * second + take2 * g * g
    tl.store(first_ptr + place, first, mask=inside)
    tl.store(second_ptr + place, second, mask=inside)
    p = tl.load(p_ptr + place, mask=inside, other=0.0)
    return p - rate * first / (tl.sqrt_rn(second) / root_correction + eps)


@triton.jit
def _update_kernel(
    slots_ptr, w_ptr, g_ptr, w_first_ptr, w_second_ptr, d_ptr, h_ptr, d_first_ptr, d_second_ptr,
    scales_ptr, copy_ptr, d_in, d_out, clip, rate, take1, keep2, take2, eps, root_correction,
    COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr, HAS_COPY: tl.constexpr,
):  # fmt: skip
    """Clip, Adam and retraction of one feature: loads and stores w, d and their moments, loads g and h where touched.

    Stores the <v, d> that "scale" divided by, and w in the dtype of the copy where there is one.
    """
    feature = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + feature).to(tl.int64)
    # a width of 0 where there is no gradient: nothing is read, and everything is 0
    n_in, n_out = tl.where(slot < 0, 0, d_in), tl.where(slot < 0, 0, d_out)
    columns = tl.arange(0, COLUMNS)
    decoder, is_out = feature * d_out + columns, columns < d_out
    h = clip * tl.load(h_ptr + slot * d_out + columns, mask=columns < n_out, other=0.0)
    d = _adam(d_ptr, d_first_ptr, d_second_ptr, h, decoder, is_out, rate, take1, keep2, take2, eps, root_correction)
    d = d / tl.sqrt_rn(_dot(d, d))
    tl.store(d_ptr + decoder, d, mask=is_out)
    encoder, is_in = feature * d_in + columns, columns < d_in
    w = d
    if ALIGNMENT != "tied":
        g = clip * tl.load(g_ptr + slot * d_in + columns, mask=columns < n_in, other=0.0)
        w = _adam(w_ptr, w_first_ptr, w_second_ptr, g, encoder, is_in, rate, take1, keep2, take2, eps, root_correction)
        if ALIGNMENT == "scale":
            scale = _dot(w, d)
            w = w / scale
            tl.store(scales_ptr + feature, scale)
        elif ALIGNMENT != "none":
            w += (1.0 - _dot(w, d)) * d
        tl.store(w_ptr + encoder, w, mask=is_in)
    if HAS_COPY:
        tl.store(copy_ptr + encoder, w.to(copy_ptr.dtype.element_ty), mask=is_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamRows:
    """One of the matrices of a shard with Adam's moments, each (n_local, width) float32."""

    weights: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignedGradients:
    """Projected gradients of the features that have a pick."""

    touched: Tensor
    """(n_touched,) int64"""
    encoder: Tensor
    """(n_touched, d_in) float32; the decoder's own where the two are tied."""
    decoder: Tensor
    """(n_touched, d_out) float32"""
    squares: Tensor
    """(n_touched,) float32 sums of the squares of both: to be added in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamStep:
    """What one step of Adam needs besides the tensors."""

    number: int
    """Number of the step, counted from 1 as Adam's bias correction wants it."""
    lr: float
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPicks:
    """The picks of a batch sorted by feature: those of touched[i] are [offsets[i], offsets[i + 1])."""

    touched: Tensor
    """(n_touched,) int64, all different."""
    offsets: Tensor
    """(n_touched + 1,) int64"""
    tokens: Tensor
    """(nnz,) row of the encoder inputs."""
    rows: Tensor
    """(nnz,) row of the residual gradients."""
    gradients: Tensor
    """(nnz,) dL/d(projection), the weight of the encoder input."""
    values: Tensor
    """(nnz,) activation, the weight of the residual gradient."""


def aligned_gradients(
    picks: RowPicks,
    encoder_inputs: Tensor,
    residual_gradients: Tensor,
    W_enc_rows: Tensor,
    W_dec: Tensor,
    rule: Alignment,
    *,
    blocks: RowBlocks | None = None,
) -> AlignedGradients:
    """Projected gradients of all touched features; with "tied" one matrix gets the sum of both."""
    n_touched, d_in, d_out = len(picks.touched), W_enc_rows.shape[1], W_dec.shape[1]
    decoder = W_dec.new_empty(n_touched, d_out)
    encoder = decoder if rule == "tied" else W_dec.new_empty(n_touched, d_in)
    squares = W_dec.new_empty(n_touched)
    width = max(d_in, d_out)
    blocks = blocks or (SHORT_GRADIENT_BLOCKS if width <= SHORT else GRADIENT_BLOCKS)
    if n_touched:
        # a feature that fires on every token takes a thousand times as long as most: begun last, all would wait for it
        order = picks.offsets.diff().argsort(descending=True)
        _gradient_kernel[(n_touched,)](
            order, picks.touched, picks.offsets, picks.tokens, picks.rows, picks.gradients, picks.values,
            encoder_inputs.contiguous(), residual_gradients.contiguous(), W_enc_rows, W_dec,
            encoder, decoder, squares, d_in, d_out,
            PICKS=blocks.picks, ALIGNMENT=rule, **blocks.launch(width),
        )  # fmt: skip
    return AlignedGradients(touched=picks.touched, encoder=encoder, decoder=decoder, squares=squares)


def update_rows(
    encoder: AdamRows,
    decoder: AdamRows,
    gradients: AlignedGradients | RowGradients,
    clip_scale: float,
    adam: AdamStep,
    rule: Alignment,
    encoder_copy: Tensor | None = None,
    *,
    blocks: RowBlocks = UPDATE_BLOCKS,
) -> Tensor | None:
    """One step down the gradients times clip_scale, in place; returns "scale"'s least <v, d>.

    encoder_copy, (n_local, d_in) of another dtype, receives the new encoder.
    """
    n_local, d_out = decoder.weights.shape
    d_in, n_touched = encoder.weights.shape[1], len(gradients.touched)
    slots = torch.full((n_local,), -1, dtype=torch.int32, device=decoder.weights.device)
    slots[gradients.touched] = torch.arange(n_touched, dtype=torch.int32, device=decoder.weights.device)
    scales = decoder.weights.new_empty(n_local if rule == "scale" else 0)
    # the interpreter cuts bits off where a GPU rounds, and then a resumed run would differ
    has_copy = encoder_copy is not None and encoder_copy.is_cuda
    _update_kernel[(n_local,)](
        slots,
        encoder.weights, gradients.encoder, encoder.first, encoder.second,
        decoder.weights, gradients.decoder, decoder.first, decoder.second,
        scales, encoder_copy if has_copy else encoder.weights, d_in, d_out, clip_scale,
        adam.lr / (1 - adam.beta1**adam.number), 1 - adam.beta1, adam.beta2, 1 - adam.beta2, adam.eps,
        (1 - adam.beta2**adam.number) ** 0.5,
        ALIGNMENT=rule, HAS_COPY=has_copy, **blocks.launch(max(d_in, d_out)),
    )  # fmt: skip
    if encoder_copy is not None and not has_copy:
        encoder_copy.copy_(encoder.weights)
    return scales.min() if rule == "scale" else None
