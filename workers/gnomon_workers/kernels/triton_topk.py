"""Exact top-k behind the encoder GEMM: the [tokens, n_local] pre-activations are never written to memory.

1. The GEMM over the first n_sample features writes the maxima of their groups. The k-th largest maximum of a token
   bounds its k-th largest pre-activation from below, for k groups hold at least one value each that reaches it.
2. The GEMM over all features appends what is not below its token's bound to the token's list, and drops the rest
   while it is in registers.
3. The top k of the list is the top k of the row. The order of a list depends on timing, so the selection goes by
   (value, lowest index), in which no two entries are equal.

A token whose list overflows gets its whole row written instead, and the result is exact for lists of any length.
With features in random order a list has about k * n_local / n_sample entries; it has room for twice that and more.
All kernels compute a tile by the same instructions in the same order: equal weights give equal bits and remain ties.

At n_local 131,072 and k 64: a list of 2,000 entries, 16 KB written and read, and 2 KB of maxima, against 512 KB a
token; the sample repeats 1/32 of the GEMM. Rejected: computing the k best groups again from group maxima of all
features (k * GROUP rows of weights gathered for every token, ten times the GEMM's time), and keeping the T largest
of every tile (T rounds of arg-max over the accumulator against one comparison, and an overflow wherever T picks meet
in a tile).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from gnomon_workers.kernels.triton_encoder import GROUP, EncoderGemm, Lists

SAMPLE_SHARE: Final = 32
"""The bound comes from one in so many features: the more, the less is computed twice, and the longer the lists."""
MAX_WRITTEN: Final = 2**27
"""Pre-activations written at once, where rows are, and entries of all lists at once."""
_FEATURE_MASK: Final = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The top k of every token by ascending index, and how it was found."""

    values: Tensor
    """(tokens, k) float32"""
    features: Tensor
    """(tokens, k) int64"""
    n_written: int
    """Tokens whose whole row was written, because their list was too short or there was nothing to gain."""


def sample_size(n_features: int, k: int, tile_features: int) -> int:
    """Features from which the bound is found: whole tiles, and four groups for each of the k picks or more."""
    return -(-max(n_features // SAMPLE_SHARE, 4 * GROUP * k) // tile_features) * tile_features


def list_capacity(n_features: int, n_sample: int, k: int) -> int:
    """Length of a token's list: twice the mean where features are in random order, and room for small k."""
    return 2 * k * -(-n_features // n_sample) + 512


def fused_topk(gemm: EncoderGemm, k: int, n_sample: int, capacity: int) -> Selection:
    """Top k of every token, ties to the lowest index; exact for any capacity >= k.

    n_sample is a multiple of the tile's features, with at least k groups. Where that is all there is, rows are
    written whole.
    """
    n_tokens, n_features = len(gemm.inputs), len(gemm.weights)
    k = min(k, n_features)
    if n_sample < n_features:
        bounds = gemm.group_maxima(n_sample).topk(k, dim=1, sorted=False).values.amin(1)
        found = gemm.reaching(bounds, capacity)
        values, features = _topk_listed(found, k)
        # fewer than k are listed where a row has -inf among its k largest
        rest = ((found.counts > capacity) | (found.counts < k)).nonzero().squeeze(1)
    else:
        values, features = gemm.bias.new_empty(n_tokens, k), gemm.bias.new_empty(n_tokens, k, dtype=torch.int64)
        rest = torch.arange(n_tokens, device=gemm.bias.device)
    n_rows = max(1, MAX_WRITTEN // n_features)
    for start in range(0, len(rest), n_rows):
        rows = rest[start : start + n_rows]
        values[rows], features[rows] = _topk_written(gemm.rows(rows), k)
    return Selection(values=values, features=features, n_written=len(rest))


def topk_of_encoder(gemm: EncoderGemm, k: int) -> tuple[Tensor, Tensor]:
    """Top k of every token by ascending index: (values, indices), a part of the tokens at a time if there are many."""
    n_features = len(gemm.weights)
    n_sample = sample_size(n_features, k, gemm.tile.features)
    capacity = list_capacity(n_features, n_sample, k)
    parts = torch.split(gemm.inputs, max(1, MAX_WRITTEN // capacity))
    found = [fused_topk(replace(gemm, inputs=part), k, n_sample, capacity) for part in parts]
    return torch.cat([part.values for part in found]), torch.cat([part.features for part in found])


def _topk_written(gemm: EncoderGemm, k: int) -> tuple[Tensor, Tensor]:
    n_features = len(gemm.weights)
    return _topk_of_keys(_sort_keys(gemm.write(n_features), torch.arange(n_features, device=gemm.bias.device)), k)


def _topk_listed(found: Lists, k: int) -> tuple[Tensor, Tensor]:
    width = max(k, min(int(found.counts.max()), found.values.shape[1]))
    keys = _sort_keys(found.values[:, :width], found.features[:, :width])
    is_written = torch.arange(width, device=keys.device) < found.counts[:, None]
    return _topk_of_keys(keys.masked_fill_(~is_written, torch.iinfo(torch.int64).min), k)


def _topk_of_keys(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of every row, each (rows, k), by ascending index."""
    top = keys.topk(k, dim=1, sorted=False).values
    features, order = (_FEATURE_MASK - (top & _FEATURE_MASK)).sort(dim=1)
    return _values_of(top.gather(1, order)), features


def _sort_keys(values: Tensor, features: Tensor) -> Tensor:
    """int64 keys, all different, in the order of (value, lowest feature): what topk promises of ties plays no part."""
    return (_ordered(values.view(torch.int32)).long() << 32) | (_FEATURE_MASK - features.long())


def _values_of(keys: Tensor) -> Tensor:
    return _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Bits of floats to integers in the floats' order, and back: negative floats count their magnitude upwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
