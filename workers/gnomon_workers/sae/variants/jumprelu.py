"""JumpReLU: features above a threshold that each learns (Rajamanoharan et al. 2024, arXiv:2407.14435).

    f = pre * H(pre - theta),  loss = |x - x_hat|^2 + lambda L0,  or + lambda (L0 / L0* - 1)^2

with L0 the mean number of active features. H has no useful gradient, so theta learns through a straight-through
estimator: a rectangle K of width eps,

    df/dtheta = -(theta / eps) K((pre - theta) / eps),    dH/dtheta = -(1 / eps) K((pre - theta) / eps)

theta is kept as its logarithm, which keeps it positive, in float32: in bfloat16 steps of it would round away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gnomon.specs import JumpReLU
from gnomon_workers.sae.arrays import take, true_indices, where_positive
from gnomon_workers.sae.sparse import Picks
from gnomon_workers.sae.variants.base import (
    Batch,
    PlainVariant,
    Setting,
    Terms,
    picks_where,
    plain_gradient,
    residual_of,
    sum_of_squares,
    warm,
    with_values,
)
from gnomon_workers.sae.variants.dense import (
    DENSITY,
    Pulled,
    dense_gradient,
    density,
    is_dense,
    reconstruct,
)


class JumpReLUVariant(PlainVariant):
    """A threshold for each feature, trained with the rest."""

    def __init__(self, activation: JumpReLU, setting: Setting) -> None:
        self._activation = activation
        self._batch_size = setting.batch_size
        default = 0.001 if activation.target_l0 is None else 1.0
        self._coefficient = activation.l0_coefficient if activation.l0_coefficient is not None else default
        short = min(10_000, setting.n_steps // 4)
        self._warmup_steps = activation.warmup_steps if activation.warmup_steps is not None else short

    def initial_vectors(self) -> dict[str, float]:
        """log_threshold, the natural logarithm of theta."""
        return {"log_threshold": math.log(self._activation.initial_threshold)}

    def initial_state(self) -> dict[str, float]:
        """The density, of which the first step decides how it is made."""
        return {DENSITY: 1.0}

    def select(self, batch: Batch) -> Picks:
        """Every feature whose pre-activation exceeds its threshold."""
        thresholds = batch.parameters.vectors["log_threshold"].exp()
        return picks_where(batch.hidden_pre, batch.hidden_pre > thresholds)

    def terms(self, batch: Batch) -> Terms:
        """Squared error and the penalty on L0; picks include what lies in the window below the threshold."""
        half = self._activation.bandwidth / 2
        thresholds = batch.parameters.vectors["log_threshold"].exp()
        if is_dense(batch):
            return self._dense_terms(batch, thresholds)
        near = picks_where(batch.hidden_pre, batch.hidden_pre > thresholds - half)
        threshold = thresholds[near.features]
        is_active = near.values > threshold
        picks = with_values(near, near.values * is_active)
        residual = residual_of(picks, batch)
        loss = sum_of_squares(residual) / self._batch_size
        n_active = is_active.sum()
        penalty, slope = self._penalty(n_active, batch)
        gradient = plain_gradient(picks, batch, residual.mul_(2 / self._batch_size))
        in_window = near.values < threshold + half
        pull = in_window * (threshold * gradient.gradients + slope) / self._activation.bandwidth
        return Terms(
            gradient=replace(
                gradient,
                gradients=gradient.gradients * is_active,
                # d(theta)/d(log theta) = theta
                vector_gradients={"log_threshold": -threshold * pull},
                only_active=False,
            ),
            n_active=int(n_active),
            sums={"loss": loss, "objective": loss + penalty, "penalty": penalty},
            state={DENSITY: density(len(near.features), batch)},
        )

    def _dense_terms(self, batch: Batch, thresholds: Tensor) -> Terms:
        """The terms of a batch from matrices, while most features are active."""
        blocks = JumpReLUBlocks(thresholds, self._activation.bandwidth)
        found = reconstruct(blocks, batch)
        loss = found.squares[0] / self._batch_size
        penalty, blocks.slope = self._penalty(torch.tensor(found.n_active, device=batch.targets.device), batch)
        return Terms(
            gradient=dense_gradient(blocks, batch, found, 2 / self._batch_size),
            n_active=found.n_active,
            sums={"loss": loss, "objective": loss + penalty, "penalty": penalty},
            state={DENSITY: density(found.n_active, batch)},
        )

    def _penalty(self, n_active: Tensor, batch: Batch) -> tuple[Tensor, float]:
        """The penalty, as this replica's share of it, and its derivative by the number of active entries."""
        coefficient = self._coefficient * warm(batch.step, self._warmup_steps)
        n_active = batch.mesh.all_reduce(n_active.clone(), "features")
        target = self._activation.target_l0
        if target is None:
            return coefficient * n_active.double() / self._batch_size, coefficient / self._batch_size
        excess = int(batch.mesh.all_reduce(n_active, "dp")) / self._batch_size / target - 1
        penalty = torch.tensor(coefficient * excess**2 / batch.mesh.dp, dtype=torch.float64, device=n_active.device)
        return penalty, 2 * coefficient * excess / (target * self._batch_size)


class JumpReLUBlocks:
    """What exceeds its threshold, and what lies in the window around it, for a block of features at a time."""

    def __init__(self, thresholds: Tensor, bandwidth: float) -> None:
        """thresholds is (n_local,)."""
        self._thresholds = thresholds
        self._bandwidth = bandwidth
        self.slope = 0.0
        """d(penalty)/d(active entries), which is known when they are counted."""

    def activations(self, pre: Tensor, features: slice) -> tuple[Tensor, ...]:
        """Entries above their thresholds."""
        return (where_positive(pre, pre - self._thresholds[features]),)

    def sums(self, activations: tuple[Tensor, ...], features: slice) -> dict[str, Tensor]:  # noqa: ARG002
        """None: the penalty is on the number of active entries."""
        return {}

    def pulled(self, pre: Tensor, features: slice, pulls: Sequence[Tensor]) -> Pulled:
        """Through what is active, and by the window to the thresholds."""
        threshold, pull = self._thresholds[features], pulls[0].to(pre.dtype)
        excess = pre - threshold
        gradients, acts = where_positive(pull, excess), where_positive(pre, excess)
        # few entries lie in the window, and it is small: found first, and summed alone
        inside = true_indices(excess.abs_() < self._bandwidth / 2)
        where = inside % len(threshold)
        by_entry = threshold[where] * take(pull.reshape(-1), inside) + self.slope
        by_window = torch.zeros_like(threshold).index_add_(0, where, by_entry) / self._bandwidth
        return Pulled(
            activations=acts,
            projections=gradients,
            # d(theta)/d(log theta) = theta
            vectors={"b_enc": gradients.sum(0), "log_threshold": -threshold * by_window},
        )
