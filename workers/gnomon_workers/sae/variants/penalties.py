"""Penalties on activations, for matrices of them: a block of features at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from gnomon_workers.sae.arrays import where_positive
from gnomon_workers.sae.variants.dense import Pulled

FLOOR: Final = 1e-4
"""Below this activation f^p is continued as a line through 0: its slope, p f^(p - 1), has no bound there."""


def power_and_slope(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """f^p and its derivative, with the line through 0 below FLOOR."""
    is_small = values < FLOOR
    line = FLOOR ** (p - 1)
    slopes = values.clamp_min(FLOOR).pow(p - 1)
    return (values * slopes.masked_fill(is_small, line)), (p * slopes).masked_fill_(is_small, line)


@dataclass(frozen=True, slots=True, kw_only=True)
class PenaltyBlocks:
    """ReLU with a penalty on f^p, for a block of features at a time."""

    coefficient: float
    batch_size: int
    p: float = 1.0
    following: float | None = None
    """Another p at which the penalty is wanted."""
    norms: Tensor | None = None
    """(n_local,) weights of the features."""

    def activations(self, pre: Tensor, features: slice) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Every entry that is positive, and 0 elsewhere."""
        return (pre.relu(),)

    def sums(self, activations: tuple[Tensor, ...], features: slice) -> dict[str, Tensor]:
        """The penalty, and that at the other p."""
        sums = {"penalty": self._penalty(activations[0], features, self.p)}
        if self.following is not None:
            sums["following"] = self._penalty(activations[0], features, self.following)
        return sums

    def pulled(self, pre: Tensor, features: slice, pulls: Sequence[Tensor]) -> Pulled:
        """Through what is positive, with the penalty's slope."""
        acts = pre.relu()
        slopes: Tensor | float = 1.0 if self.p == 1 else power_and_slope(acts, self.p)[1]
        if self.norms is not None:
            slopes = slopes * self.norms[features]
        gradients = where_positive(pulls[0].to(pre.dtype) + slopes * (self.coefficient / self.batch_size), acts)
        return Pulled(activations=acts, projections=gradients, vectors={"b_enc": gradients.sum(0)})

    def _penalty(self, acts: Tensor, features: slice, p: float) -> Tensor:
        """Sum of f^p without the coefficient, float64; of activations that are 0 it is 0."""
        powers = acts if p == 1 else power_and_slope(acts, p)[0]
        sums = powers.sum(0).double()
        return (sums if self.norms is None else sums * self.norms[features]).sum()
