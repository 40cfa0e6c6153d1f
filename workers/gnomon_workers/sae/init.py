"""The initial decoder bias: a centre of the data, so that features need not spend themselves on it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def initial_b_dec(sample: Tensor, kind: Literal["mean", "geometric_median"]) -> Tensor:
    """Mean or geometric median of a sample (n, d_in), as (d_in,) float32, computed in float64."""
    rows = sample.double()
    return (rows.mean(0) if kind == "mean" else geometric_median(rows)).float()


def geometric_median(rows: Tensor, *, n_iterations: int = 100, tolerance: float = 1e-9) -> Tensor:
    """The point with the least sum of distances to the rows (n, d_in), by Weiszfeld's iteration.

    Less drawn to outliers than the mean. Stops when the point moves by less than tolerance, relative.
    """
    centre = rows.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (rows - centre).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * rows).sum(0) / weights.sum()
        step = (moved - centre).norm()
        centre = moved
        if step <= tolerance * torch.linalg.vector_norm(centre):
            break
    return centre
