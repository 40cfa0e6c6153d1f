"""Exact selection of the largest activations, with ties broken towards the lowest index.

Of n activations a token keeps k, a few in a thousand. Rows are therefore cut into groups, and one scan takes the
maximum of each: the k-th largest maximum is a lower bound of the k-th largest activation, so that only groups whose
maximum reaches it can hold a pick. What reaches the bound is a handful more than k entries a row, and the exact cut,
ties included, is made among those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from gnomon_workers.sae.arrays import kth_largest, offsets_of, take, true_indices
from gnomon_workers.sae.sparse import Picks

WIDTHS: Final = (32, 16, 8)
"""Entries in a group: the first that leaves at least GROUPS_PER_PICK groups for each of the k picks."""
GROUPS_PER_PICK: Final = 2
"""With r picks a group, a row of independent entries has k (-ln(1 - r) / r) candidates: 1.4 k at a half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Entries of a matrix by ascending (row, column)."""

    tokens: Tensor
    """(n,) int64 row."""
    features: Tensor
    """(n,) int64 column."""
    values: Tensor
    """(n,)"""
    counts: Tensor | None = None
    """(tokens,) entries of every row, where that is known already."""

    def where(self, mask: Tensor) -> Self:
        """The entries at which the (n,) mask is true."""
        return type(self)(tokens=self.tokens[mask], features=self.features[mask], values=self.values[mask])

    def picks(self, n_tokens: int) -> Picks:
        """These entries as the picks of n_tokens tokens."""
        counts = self.counts if self.counts is not None else torch.bincount(self.tokens, minlength=n_tokens)
        offsets = offsets_of(counts)
        return Picks(features=self.features, values=self.values, offsets=offsets, tokens=self.tokens)

    def padded(self, n_tokens: int, width: int, fill: float) -> tuple[Tensor, Tensor]:
        """(n_tokens, width) values by ascending column, filled up at the end, and the (n,) flat place of each entry."""
        starts = offsets_of(torch.bincount(self.tokens, minlength=n_tokens))
        place = torch.arange(len(self.values), device=self.values.device) - starts[self.tokens] + self.tokens * width
        rows = self.values.new_full((n_tokens, width), fill)
        rows.view(-1)[place] = self.values
        return rows, place


Maxima = Callable[[Tensor, int], Tensor]
"""(rows, n) and a width: the largest of every `width` neighbours, (rows, n / width), for what is positive."""


def group_maxima(values: Tensor, width: int) -> Tensor:
    """The largest of every `width` neighbours; where none is positive, some number that is not."""
    if values.dtype == torch.bfloat16 and values.device.type == "cpu":
        # Positive floats are ordered as integers are, and a maximum of neighbours is vectorised for those only.
        return values.view(len(values), -1, width).view(torch.int16).amax(2).view(torch.bfloat16)
    return _all_maxima(values, width)


def _all_maxima(values: Tensor, width: int) -> Tensor:
    return values.view(len(values), -1, width).amax(2)


class GroupedRows:
    """A matrix of activations and the maxima of its groups: what reaches a bound is found without reading it again."""

    def __init__(self, values: Tensor, k: int, *, above: float = 0.0, positive_maxima: Maxima | None = None) -> None:
        """values is (tokens, n); k of a row are wanted, of those > `above`, which is 0 or -inf.

        positive_maxima scans for what is positive, where something faster than PyTorch can.
        """
        self.values = values
        finfo = torch.finfo(values.dtype)
        self._floor = finfo.tiny if above == 0 else finfo.min
        n = values.shape[1]
        self.width = next((w for w in WIDTHS if n % w == 0 and n // w >= GROUPS_PER_PICK * k), 1)
        scan = positive_maxima or group_maxima if above == 0 else _all_maxima
        self.maxima = scan(values, self.width) if self.width > 1 else values
        """(tokens, n / width); below the floor only some number below the floor."""

    def reaching(self, bounds: Tensor) -> Candidates:
        """Entries >= the bound of their row, (tokens, 1), and above the floor."""
        # a bound of 0 would let in entries that are not active, and whole groups of which no maximum is known
        bounds = bounds.clamp_min(self._floor).to(self.values.dtype)
        groups = true_indices(self.maxima >= bounds)
        if self.width == 1:
            n = self.values.shape[1]
            return Candidates(tokens=groups // n, features=groups % n, values=take(self.values.view(-1), groups))
        n_groups = self.maxima.shape[1]
        tokens = groups // n_groups
        entries = take(self.values.view(-1, self.width), groups)
        found = true_indices(entries >= bounds[tokens])
        where = found // self.width
        tokens = tokens[where]
        return Candidates(
            tokens=tokens,
            features=(groups[where] - tokens * n_groups) * self.width + found % self.width,
            values=take(entries.view(-1), found),
        )


def local_topk(grouped: GroupedRows, k: int) -> Candidates:
    """The k largest entries of every row that are above the floor: equal to a stable descending sort cut at k."""
    n_tokens, n = grouped.values.shape
    if k >= n:
        return grouped.reaching(grouped.maxima.new_full((n_tokens, 1), -torch.inf))
    candidates = grouped.reaching(kth_largest(grouped.maxima, k))
    counts = torch.bincount(candidates.tokens, minlength=n_tokens)
    is_crowded = counts > k
    rows = is_crowded.nonzero().squeeze(1)
    if not len(rows):
        return candidates
    crowded = is_crowded[candidates.tokens]
    number = is_crowded.cumsum(0) - 1
    excess = candidates.where(crowded)
    excess = Candidates(tokens=number[excess.tokens], features=excess.features, values=excess.values)
    padded, place = excess.padded(len(rows), int(counts.max()), -torch.inf)
    keep = ~crowded
    keep[crowded] = keep_largest(padded, k).view(-1)[place]
    return candidates.where(keep)


def keep_largest(rows: Tensor, k: int) -> Tensor:
    """Mask of the k largest entries of every row, ties to the first."""
    cut = kth_largest(rows, k).to(rows.dtype)
    larger, tied = rows > cut, rows == cut
    # columns ascend with the index, so that counting from the left gives ties to the lowest one
    return larger | (tied & (tied.cumsum(1) <= k - larger.sum(1, keepdim=True)))
