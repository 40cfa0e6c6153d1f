"""Exact selection of the largest activations, with ties broken towards the lowest index."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GROUP: Final = 32
"""Width of a group whose maximum is taken before selecting."""


def topk_rows(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row: (values, indices), each (rows, k), by ascending index.

    Ties go to the lowest index wherever the k-th value is positive; among values <= 0, which a ReLU makes zero
    anyway, any may be returned. Equal to a stable descending sort cut at k.
    """
    n = values.shape[1]
    if k >= n:
        indices = torch.arange(n, device=values.device).expand(values.shape[0], n)
        return values, indices
    if n % GROUP or n // GROUP < 4 * k:
        top, indices = values.topk(k + 1, dim=1)
        tied = top[:, k - 1] == top[:, k]
    else:
        top, indices, tied = _topk_through_groups(values, k)
    indices, top = indices[:, :k], top[:, :k]
    rows = (tied & (top[:, k - 1] > 0)).nonzero().squeeze(1)
    if len(rows):
        # topk promises nothing about equal values; a stable sort does. Rare in float32.
        indices[rows] = values[rows].sort(dim=1, descending=True, stable=True).indices[:, :k]
    indices = indices.sort(dim=1).values
    return values.gather(1, indices), indices


def _topk_through_groups(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top k + 1 of rows by first selecting the k groups with the largest maxima: one scan, then a small top-k.

    The k-th largest group maximum is a lower bound of the k-th largest value, so no other group can hold a pick,
    except by a tie with that bound, which is reported.
    """
    rows, n = values.shape
    grouped = values.view(rows, n // GROUP, GROUP)
    maxima, groups = grouped.amax(2).topk(k + 1, dim=1)
    chosen = grouped.gather(1, groups[:, :k, None].expand(rows, k, GROUP)).view(rows, k * GROUP)
    top, within = chosen.topk(k + 1, dim=1)
    indices = groups.gather(1, within // GROUP) * GROUP + within % GROUP
    tied = (top[:, k - 1] == top[:, k]) | (top[:, k - 1] == maxima[:, k])
    return top, indices, tied
