"""Exact top-k of pre-activations that lie in memory: one scan for the maxima of groups, and little work after it.

1. `_group_keys_kernel` reads the matrix once and writes the largest key of every WIDTH neighbours.
2. `_bound_kernel`: the k-th largest group key of a row, found bit by bit in registers, bounds the row's k-th largest
   entry from below, so that only groups that reach it can hold a pick. They are listed in ascending order.
3. `_candidates_kernel` lists the entries of those groups that reach the bound, in ascending order.
4. `_cut_kernel` finds the k-th largest of the list in the same way, and keeps what is larger and the first of what is
   equal: ties go to the lowest index, whatever they are.

A key is an entry's bit pattern as an integer, which orders positive floats as they are ordered; what is not positive
has key 0 and is never picked, and what is not a number has the largest, so that it is. Rows whose lists overflow, where
hundreds of entries tie at the bound, are selected by PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from gnomon_workers.sae.selection import Candidates, GroupedRows, local_topk

WIDTHS: Final = (32, 64, 128)
"""Entries in a group: the first that leaves few enough groups for the registers of one program."""
MAX_GROUPS: Final = 8192
GROUPS_AT_ONCE: Final = 16
"""Groups whose entries are looked at together."""
SCANNED: Final = 4096
"""Entries that one program of the scan reads."""
_NOT_A_NUMBER: Final = tl.constexpr(0x7FFF0000)


@triton.jit
def _keys(values):
    """int32 in the order of positive floats; 0 where not positive, the largest where not a number."""
    values = values.to(tl.float32)
    keys = values.to(tl.int32, bitcast=True)
    keys = tl.where(values > 0, keys, 0)
    return tl.where(values != values, _NOT_A_NUMBER, keys)


@triton.jit
def _kth_largest(keys, k, BITS: tl.constexpr):
    """The k-th largest of non-negative int32 keys, 0 where fewer than k are positive: bit by bit, from the highest.

    Only the BITS highest below the sign are asked for: those of bfloat16 have nothing in the others.
    """
    cut = 0
    for i in range(BITS):
        trial = cut | (1 << (30 - i))
        cut = tl.where(tl.sum((keys >= trial).to(tl.int32), axis=0) >= k, trial, cut)
    return cut


@triton.jit
def _group_keys_kernel(values_ptr, keys_ptr, n_features, n_groups, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Largest key of GROUPS groups of one row; loads each entry once, stores one number a group: the key where keys
    are integers, else the entry that has it, or 0."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    entries = groups[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    values = tl.load(values_ptr + row * n_features + entries, mask=(groups < n_groups)[:, None], other=0.0)
    keys = tl.max(_keys(values), axis=1)
    if keys_ptr.dtype.element_ty == tl.int32:
        found = keys
    else:
        found = keys.to(tl.float32, bitcast=True).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + row * n_groups + groups, found, mask=groups < n_groups)


@triton.jit
def _bound_kernel(
    keys_ptr, bounds_ptr, listed_ptr, counts_ptr, n_groups, capacity, k, GROUPS: tl.constexpr, BITS: tl.constexpr
):
    """The bound of one row, at least 1, and the groups that reach it; counts go on beyond the capacity."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    keys = tl.load(keys_ptr + row * n_groups + groups, mask=groups < n_groups, other=0)
    bound = tl.maximum(_kth_largest(keys, k, BITS), 1)
    reaches = keys >= bound
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.store(bounds_ptr + row, bound)
    tl.store(counts_ptr + row, tl.sum(reaches.to(tl.int32), axis=0))
    tl.store(listed_ptr + row * capacity + place, groups, mask=reaches & (place < capacity))


@triton.jit
def _candidates_kernel(
    values_ptr, bounds_ptr, listed_ptr, n_listed_ptr, keys_ptr, features_ptr, counts_ptr,
    n_features, group_capacity, capacity, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The entries of one row's listed groups that reach its bound, by ascending feature."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bounds_ptr + row)
    n_listed = tl.minimum(tl.load(n_listed_ptr + row), group_capacity)
    n_found = 0
    for first in range(0, n_listed, GROUPS):
        slots = first + tl.arange(0, GROUPS)
        groups = tl.load(listed_ptr + row * group_capacity + slots, mask=slots < n_listed, other=0)
        entries = groups[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(values_ptr + row * n_features + entries, mask=(slots < n_listed)[:, None], other=0.0)
        keys = tl.reshape(_keys(values), (GROUPS * WIDTH,))
        features = tl.reshape(entries, (GROUPS * WIDTH,))
        reaches = keys >= bound
        place = n_found + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        fits = reaches & (place < capacity)
        tl.store(keys_ptr + row * capacity + place, keys, mask=fits)
        tl.store(features_ptr + row * capacity + place, features, mask=fits)
        n_found += tl.sum(reaches.to(tl.int32), axis=0)
    tl.store(counts_ptr + row, n_found)


@triton.jit
def _cut_kernel(
    keys_ptr, features_ptr, n_listed_ptr, out_values_ptr, out_features_ptr, counts_ptr, k, capacity,
    CAPACITY: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The k largest of one row's list, ties to the first, by ascending feature."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, CAPACITY)
    is_listed = slots < tl.minimum(tl.load(n_listed_ptr + row), capacity)
    keys = tl.load(keys_ptr + row * capacity + slots, mask=is_listed, other=0)
    features = tl.load(features_ptr + row * capacity + slots, mask=is_listed, other=0)
    cut = tl.maximum(_kth_largest(keys, k, BITS), 1)
    is_larger = keys > cut
    is_tied = keys == cut
    n_missing = k - tl.sum(is_larger.to(tl.int32), axis=0)
    kept = is_larger | (is_tied & (tl.cumsum(is_tied.to(tl.int32), axis=0) <= n_missing))
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(out_values_ptr + row * k + place, keys.to(tl.float32, bitcast=True), mask=kept)
    tl.store(out_features_ptr + row * k + place, features.to(tl.int64), mask=kept)
    tl.store(counts_ptr + row, tl.sum(kept.to(tl.int32), axis=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lists:
    """What reaches the bound of each row."""

    keys: Tensor
    """(rows, capacity) int32"""
    features: Tensor
    """(rows, capacity) int32, ascending"""
    counts: Tensor
    """(rows,) int32"""
    overflows: Tensor
    """(rows,) bool: the list is not whole."""


def group_width(n_features: int, k: int) -> int | None:
    """Entries in a group, or None where a row is too short, too ragged or too long for this way."""
    fitting = (w for w in WIDTHS if n_features % w == 0 and 2 * k <= n_features // w <= MAX_GROUPS)
    return next(fitting, None)


def select_topk(values: Tensor, k: int) -> Candidates:
    """The k largest positive entries of every row of values (rows, n), ties to the lowest index; values are float32."""
    width = group_width(values.shape[1], k)
    if width is None:
        return local_topk(GroupedRows(values, k), k)
    lists = _listed(values, k, width)
    found, features, counts = _cut(lists, k, values.dtype)
    n_overflows, n_least = torch.stack([lists.overflows.sum(), counts.min().long()]).tolist()
    if n_overflows:
        n_least = min(n_least, _select_again(values, k, lists.overflows, found, features, counts))
    tokens = torch.arange(len(values), device=values.device)[:, None].expand(-1, k)
    if n_least == k:
        return Candidates(tokens=tokens.reshape(-1), features=features.view(-1), values=found.view(-1), counts=counts)
    kept = torch.arange(k, device=values.device) < counts[:, None]
    return Candidates(tokens=tokens[kept], features=features[kept], values=found[kept], counts=counts)


def group_maxima(values: Tensor, width: int) -> Tensor:
    """The largest positive entry of every `width` neighbours, or 0, (rows, n / width), in the entries' dtype."""
    return _scan(values, width, values.dtype)


def group_keys(values: Tensor, width: int) -> Tensor:
    """The largest key of every `width` neighbours, (rows, n / width) int32."""
    return _scan(values, width, torch.int32)


def _scan(values: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    n_rows, n_features = values.shape
    n_groups = n_features // width
    at_once = min(max(1, SCANNED // width), triton.next_power_of_2(n_groups))
    keys = torch.empty(n_rows, n_groups, dtype=dtype, device=values.device)
    _group_keys_kernel[(n_rows, triton.cdiv(n_groups, at_once))](
        values, keys, n_features, n_groups, GROUPS=at_once, WIDTH=width, num_warps=4
    )
    return keys


def _listed(values: Tensor, k: int, width: int) -> _Lists:
    n_rows, n_features = values.shape
    n_groups = n_features // width
    keys = group_keys(values, width)
    capacity = triton.next_power_of_2(2 * k + 128)
    bounds, n_listed, counts = torch.empty(3, n_rows, dtype=torch.int32, device=values.device)
    listed, found, features = torch.empty(3, n_rows, capacity, dtype=torch.int32, device=values.device)
    n_columns = triton.next_power_of_2(n_groups)
    _bound_kernel[(n_rows,)](
        keys, bounds, listed, n_listed, n_groups, capacity, k,
        GROUPS=n_columns, BITS=_bits(values.dtype), num_warps=min(max(n_columns // 512, 1), 16),
    )  # fmt: skip
    _candidates_kernel[(n_rows,)](
        values, bounds, listed, n_listed, found, features, counts, n_features, capacity, capacity,
        GROUPS=GROUPS_AT_ONCE, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return _Lists(keys=found, features=features, counts=counts, overflows=(n_listed > capacity) | (counts > capacity))


def _bits(dtype: torch.dtype) -> int:
    """Bits of a key that an entry of a dtype can have, below the sign."""
    return 15 if dtype == torch.bfloat16 else 31


def _cut(lists: _Lists, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, k) values and features of what is kept, and the (rows,) number of it; beyond that nothing is written."""
    n_rows, capacity = lists.keys.shape
    device = lists.keys.device
    values = torch.empty(n_rows, k, device=device)
    features = torch.empty(n_rows, k, dtype=torch.int64, device=device)
    counts = torch.empty(n_rows, dtype=torch.int32, device=device)
    _cut_kernel[(n_rows,)](
        lists.keys, lists.features, lists.counts, values, features, counts, k, capacity,
        CAPACITY=capacity, BITS=_bits(dtype), num_warps=min(max(capacity // 128, 1), 4),
    )  # fmt: skip
    return values, features, counts


def _select_again(values: Tensor, k: int, overflows: Tensor, found: Tensor, features: Tensor, counts: Tensor) -> int:
    """Overwrite the rows whose lists overflowed; returns the least number of picks in any row."""
    rows = overflows.nonzero().squeeze(1)
    again = local_topk(GroupedRows(values[rows], k), k)
    n_kept = torch.bincount(again.tokens, minlength=len(rows))
    place = torch.arange(len(again.tokens), device=rows.device) - (n_kept.cumsum(0) - n_kept)[again.tokens]
    found[rows[again.tokens], place] = again.values.float()
    features[rows[again.tokens], place] = again.features
    counts[rows] = n_kept.int()
    return int(counts.min())
