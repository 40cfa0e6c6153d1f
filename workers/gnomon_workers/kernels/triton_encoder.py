"""The encoder's matrix product, tile by tile, with three endings: written whole, as maxima of groups, cut by a bound.

They compute a tile by the same instructions in the same order, so a pre-activation has the same bits in all,
and features with equal weights have equal values wherever they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

GROUP: Final = 8
"""Neighbouring features whose maximum is taken."""
_ROW_ALIGNMENT_BYTES: Final = 16
"""The copy engine of Hopper wants rows that begin at multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The block of the GEMM that one program computes."""

    tokens: int
    features: int
    depth: int
    """Columns of d_in that are loaded at a time."""
    n_warps: int
    n_stages: int
    """Loads in flight."""


TILES: Final[dict[torch.dtype, Tile]] = {
    torch.bfloat16: Tile(tokens=128, features=256, depth=64, n_warps=8, n_stages=3),
    torch.float32: Tile(tokens=64, features=64, depth=16, n_warps=4, n_stages=3),
}
SMALL_TILE: Final = Tile(tokens=128, features=128, depth=32, n_warps=8, n_stages=3)
"""In bfloat16 before Hopper, whose products read their factors from shared memory and not from registers."""
INTERPRETED_TILE: Final = Tile(tokens=16, features=16, depth=16, n_warps=1, n_stages=1)
"""The interpreter's cost is by program and operation, hardly by element; small tiles make small shapes ragged."""


def tile_for(device: torch.device, dtype: torch.dtype) -> Tile:
    """The block for factors of a dtype, float32 or bfloat16, on a device."""
    if device.type != "cuda":
        return INTERPRETED_TILE
    is_old = torch.cuda.get_device_capability(device) < (9, 0)
    return SMALL_TILE if is_old and dtype == torch.bfloat16 else TILES[dtype]


@triton.jit
def _tile_origin(n_tokens, n_features, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """(first token, first feature) of this program; programs that run together form squares, to share loads in L2."""
    GROUP_T: tl.constexpr = 8
    n_blocks_t = tl.cdiv(n_tokens, BLOCK_T)
    n_blocks_f = tl.cdiv(n_features, BLOCK_F)
    group = tl.program_id(0) // (GROUP_T * n_blocks_f)
    within = tl.program_id(0) % (GROUP_T * n_blocks_f)
    height = min(n_blocks_t - group * GROUP_T, GROUP_T)
    block_t = group * GROUP_T + within % height
    block_f = within // height
    return block_t * BLOCK_T, block_f * BLOCK_F


@triton.jit
def _pre_activations(
    x, w, bias_ptr, token, feature, n_features, d_in,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_T, BLOCK_F) of x W^T + b in float32; loads the two strips and the bias, stores nothing.

    Beyond the last feature it is -inf.
    """
    tile = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for column in tl.range(0, d_in, DEPTH):
        left = x.load([token, column])
        right = w.load([feature, column])
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        tile = tl.dot(left, right.T, tile, input_precision="ieee")
    features = feature + tl.arange(0, BLOCK_F)
    return tile + tl.load(bias_ptr + features, mask=features < n_features, other=float("-inf"))[None, :]


@triton.jit
def _write_kernel(
    x, w, bias_ptr, out_ptr, n_tokens, n_features, d_in,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Store the pre-activations of features [0, n_features) to out (n_tokens, n_features)."""
    token, feature = _tile_origin(n_tokens, n_features, BLOCK_T, BLOCK_F)
    tile = _pre_activations(x, w, bias_ptr, token, feature, n_features, d_in, BLOCK_T, BLOCK_F, DEPTH, WIDEN)
    tokens = token + tl.arange(0, BLOCK_T)[:, None]
    features = feature + tl.arange(0, BLOCK_F)[None, :]
    inside = (tokens < n_tokens) & (features < n_features)
    tl.store(out_ptr + tokens.to(tl.int64) * n_features + features, tile, mask=inside)


@triton.jit
def _maxima_kernel(
    x, w, bias_ptr, out_ptr, n_tokens, n_features, d_in, n_groups,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the maxima of groups of WIDTH neighbours among features [0, n_features) to out (n_tokens, n_groups)."""
    token, feature = _tile_origin(n_tokens, n_features, BLOCK_T, BLOCK_F)
    tile = _pre_activations(x, w, bias_ptr, token, feature, n_features, d_in, BLOCK_T, BLOCK_F, DEPTH, WIDEN)
    maxima = tl.max(tl.reshape(tile, (BLOCK_T, BLOCK_F // WIDTH, WIDTH)), axis=2)
    tokens = token + tl.arange(0, BLOCK_T)[:, None]
    groups = feature // WIDTH + tl.arange(0, BLOCK_F // WIDTH)[None, :]
    tl.store(out_ptr + tokens * n_groups + groups, maxima, mask=(tokens < n_tokens) & (groups < n_groups))


@triton.jit
def _append_kernel(
    x, w, bias_ptr, bounds_ptr, counts_ptr, values_ptr, features_ptr,
    n_tokens, n_features, d_in, capacity,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Append what is not below the token's bound to its list; loads one bound a token, stores the few that pass.

    counts (n_tokens,) goes on counting beyond the capacity, which is how an overflow shows. -inf is never appended.
    """
    token, feature = _tile_origin(n_tokens, n_features, BLOCK_T, BLOCK_F)
    tile = _pre_activations(x, w, bias_ptr, token, feature, n_features, d_in, BLOCK_T, BLOCK_F, DEPTH, WIDEN)
    tokens = token + tl.arange(0, BLOCK_T)
    bounds = tl.load(bounds_ptr + tokens, mask=tokens < n_tokens, other=float("inf"))[:, None]
    # "below" and not "reaches": what is not a number must be picked, as torch.topk does, or nobody would notice it
    tile = tl.where((tile < bounds) | (tokens >= n_tokens)[:, None], float("-inf"), tile)
    # in one dimension, because the compiler fails on atomics over a tile in the layout of a matrix product
    values = tl.reshape(tile, (BLOCK_T * BLOCK_F,))
    passes = values != float("-inf")
    index = tl.arange(0, BLOCK_T * BLOCK_F)
    tokens = token + index // BLOCK_F
    slots = tl.atomic_add(counts_ptr + tokens, 1, mask=passes, sem="relaxed")
    fits = passes & (slots < capacity)
    place = tokens * capacity + slots
    tl.store(values_ptr + place, values, mask=fits)
    tl.store(features_ptr + place, feature + index % BLOCK_F, mask=fits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """For every token the features that reach its bound, in no particular order."""

    values: Tensor
    """(tokens, capacity) float32; only the first counts[t] entries of a row are written."""
    features: Tensor
    """(tokens, capacity) int32"""
    counts: Tensor
    """(tokens,) int32: how many there are; more than the capacity where the list overflowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderGemm:
    """inputs W_enc + b_enc in one precision, for its three uses: written whole, as maxima, or cut by a bound."""

    inputs: Tensor
    """(tokens, d_in) in float32 or bfloat16, rows aligned."""
    weights: Tensor
    """(n_local, d_in) in the same dtype, rows aligned."""
    bias: Tensor
    """(n_local,) float32"""
    tile: Tile

    @classmethod
    def create(cls, inputs: Tensor, weights: Tensor, bias: Tensor, dtype: torch.dtype) -> EncoderGemm:
        """Cast to dtype (float32 or bfloat16) where needed; products are summed in float32 in either."""
        return cls(
            inputs=_with_aligned_rows(inputs.to(dtype)),
            weights=_with_aligned_rows(weights.to(dtype)),
            bias=bias.float().contiguous(),
            tile=tile_for(inputs.device, dtype),
        )

    def rows(self, rows: Tensor) -> EncoderGemm:
        """The same for some of the tokens."""
        return EncoderGemm(inputs=self.inputs[rows], weights=self.weights, bias=self.bias, tile=self.tile)

    def write(self, n_features: int) -> Tensor:
        """Pre-activations of the first n_features, (tokens, n_features)."""
        n_tokens, d_in = self.inputs.shape
        out = torch.empty(n_tokens, n_features, device=self.inputs.device)
        _write_kernel[self._grid(n_features)](
            *self._descriptors(), self.bias, out, n_tokens, n_features, d_in, **self._options()
        )
        return out

    def group_maxima(self, n_features: int) -> Tensor:
        """Largest pre-activation of every GROUP neighbours of the first n_features, (tokens, n_features / GROUP)."""
        assert n_features % self.tile.features == 0
        n_tokens, d_in = self.inputs.shape
        out = torch.empty(n_tokens, n_features // GROUP, device=self.inputs.device)
        _maxima_kernel[self._grid(n_features)](
            *self._descriptors(), self.bias, out, n_tokens, n_features, d_in, out.shape[1],
            **self._options(), WIDTH=GROUP,
        )  # fmt: skip
        return out

    def reaching(self, bounds: Tensor, capacity: int) -> Lists:
        """The features that are not below the bound of their token, bounds being (tokens,)."""
        n_tokens, d_in = self.inputs.shape
        assert n_tokens * capacity < 2**31, "places in lists are counted in 32 bits, to save registers"
        device = self.inputs.device
        found = Lists(
            values=torch.empty(n_tokens, capacity, device=device),
            features=torch.empty(n_tokens, capacity, dtype=torch.int32, device=device),
            counts=torch.zeros(n_tokens, dtype=torch.int32, device=device),
        )
        _append_kernel[self._grid(len(self.weights))](
            *self._descriptors(), self.bias, bounds, found.counts, found.values, found.features,
            n_tokens, len(self.weights), d_in, capacity, **self._options(),
        )  # fmt: skip
        return found

    def _grid(self, n_features: int) -> tuple[int]:
        return (int(triton.cdiv(len(self.inputs), self.tile.tokens) * triton.cdiv(n_features, self.tile.features)),)

    def _descriptors(self) -> tuple[TensorDescriptor, TensorDescriptor]:
        tile = self.tile
        return (
            TensorDescriptor.from_tensor(self.inputs, [tile.tokens, tile.depth]),
            TensorDescriptor.from_tensor(self.weights, [tile.features, tile.depth]),
        )

    def _options(self) -> dict[str, int]:
        return options_of(self.tile, is_interpreted=not self.inputs.is_cuda)


def options_of(tile: Tile, *, is_interpreted: bool) -> dict[str, int]:
    """What all kernels are launched with."""
    return {
        "BLOCK_T": tile.tokens,
        "BLOCK_F": tile.features,
        "DEPTH": tile.depth,
        # the interpreter would multiply the bit patterns of bfloat16 as integers
        "WIDEN": is_interpreted,
        "num_warps": tile.n_warps,
        "num_stages": tile.n_stages,
    }


def _with_aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix itself, or with zero columns added where its rows would not be aligned."""
    n_values = _ROW_ALIGNMENT_BYTES // matrix.element_size()
    missing = -matrix.shape[1] % n_values
    return pad(matrix, (0, missing)) if missing else matrix.contiguous()
