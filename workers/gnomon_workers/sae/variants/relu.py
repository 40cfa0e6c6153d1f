"""ReLU with a sparsity penalty: L1, L1 weighted by decoder norms, or annealed from L1 towards L0.

    l1                loss = |x - x_hat|^2 + lambda sum f             Bricken et al. 2023
    decoder_norm_l1   loss = |x - x_hat|^2 + lambda sum f |d|         Anthropic, April 2024
    p_anneal          loss = |x - x_hat|^2 + lambda_s sum f^p_s       Karvonen et al. 2024, arXiv:2408.00113

The gradient of |d| points along d. Rows of norm 1 have no such component, the alignment rule would take it off, and
so it is never formed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from gnomon.specs import PAnneal, ReLU
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
)
from gnomon_workers.sae.variants.dense import (
    DENSITY,
    dense_gradient,
    density,
    is_dense,
    reconstruct,
)
from gnomon_workers.sae.variants.penalties import PenaltyBlocks, power_and_slope

N_AVERAGED: Final = 10
"""Steps before an update of p over whose penalties lambda is rescaled."""


def penalty_warmup(given: int | None, setting: Setting) -> int:
    """Warm-up steps of a penalty, with the default of a twentieth of the run resolved."""
    return given if given is not None else setting.n_steps // 20


class ReLUVariant(PlainVariant):
    """ReLU with an L1 penalty, of activations alone or weighted by the decoder's norms."""

    def __init__(self, activation: ReLU, setting: Setting) -> None:
        self._coefficient = activation.l1_coefficient
        self._by_decoder_norm = activation.penalty == "decoder_norm_l1"
        self._batch_size = setting.batch_size
        self._warmup_steps = penalty_warmup(activation.warmup_steps, setting)

    def select(self, batch: Batch) -> Picks:
        """Every feature whose pre-activation is positive."""
        return picks_where(batch.hidden_pre, batch.hidden_pre > 0)

    def initial_state(self) -> dict[str, float]:
        """The density, of which the first step decides how it is made."""
        return {DENSITY: 1.0}

    def terms(self, batch: Batch) -> Terms:
        """Squared error and penalty."""
        coefficient = self._coefficient * warm(batch.step, self._warmup_steps)
        norms = torch.linalg.vector_norm(batch.parameters.W_dec, dim=1) if self._by_decoder_norm else None
        if is_dense(batch):
            return dense_penalised(
                PenaltyBlocks(coefficient=coefficient, batch_size=self._batch_size, norms=norms), batch, batch.state
            )
        picks = self.select(batch)
        weights = torch.ones_like(picks.values) if norms is None else norms[picks.features]
        total = batch.mesh.all_reduce((picks.values * weights).sum(dtype=torch.float64), "features")
        return penalised(picks, batch, coefficient * weights, coefficient * total, state=batch.state)


class PAnnealVariant(PlainVariant):
    """f^p, with p falling in equal steps and lambda following."""

    def __init__(self, activation: PAnneal, setting: Setting) -> None:
        self._activation = activation
        self._warmup_steps = penalty_warmup(activation.warmup_steps, setting)
        given, quarter = activation.start_step, max(1, setting.n_steps // 4)
        start = given if given is not None else min(10_000, quarter)
        span = max(0, setting.n_steps - start)
        self._updates = [start + span * i // activation.n_updates for i in range(activation.n_updates)]

    def initial_state(self) -> dict[str, float]:
        """lambda, the penalties at the present and the next p since the last update, and the density."""
        sums = {"p_penalty": 0.0, "next_p_penalty": 0.0}
        return {"l1_coefficient": self._activation.l1_coefficient, **sums, DENSITY: 1.0}

    def exponent(self, n_updates: int) -> float:
        """p after a number of updates."""
        share = min(n_updates, self._activation.n_updates) / self._activation.n_updates
        return 1 - share * (1 - self._activation.final_p)

    def select(self, batch: Batch) -> Picks:
        """Every feature whose pre-activation is positive."""
        return picks_where(batch.hidden_pre, batch.hidden_pre > 0)

    def terms(self, batch: Batch) -> Terms:
        """Squared error and penalty at this step's p."""
        n_updates = sum(update <= batch.step for update in self._updates)
        p = self.exponent(n_updates)
        state = _rescaled(batch.state) if batch.step in self._updates else dict(batch.state)
        coefficient = state["l1_coefficient"] * warm(batch.step, self._warmup_steps)
        is_counted = any(0 < update - batch.step <= N_AVERAGED for update in self._updates)
        following = self.exponent(n_updates + 1) if is_counted else None
        if is_dense(batch):
            size = len(batch.targets) * batch.mesh.dp
            blocks = PenaltyBlocks(coefficient=coefficient, batch_size=size, p=p, following=following)
            return dense_penalised(blocks, batch, state)
        picks = self.select(batch)
        powers, slopes = power_and_slope(picks.values, p)
        total = batch.mesh.all_reduce(powers.sum(dtype=torch.float64), "features")
        if following is not None:
            later = power_and_slope(picks.values, following)[0].sum(dtype=torch.float64)
            _count_penalties(state, total, batch.mesh.all_reduce(later, "features"), batch)
        return penalised(picks, batch, coefficient * slopes, coefficient * total, state=state)


def _count_penalties(state: dict[str, float], now: Tensor, later: Tensor, batch: Batch) -> None:
    """Add this step's penalties at the present and the next p, complete over shards, to the running sums."""
    total, following = batch.mesh.all_reduce(torch.stack([now, later]), "dp").tolist()
    state["p_penalty"] += total
    state["next_p_penalty"] += following


def _rescaled(state: dict[str, float]) -> dict[str, float]:
    """lambda such that the penalty of the last steps is the same at the new p; their sums begin again."""
    ratio = state["p_penalty"] / state["next_p_penalty"] if state["next_p_penalty"] > 0 else 1.0
    coefficient = state["l1_coefficient"] * ratio
    return {**state, "l1_coefficient": coefficient, "p_penalty": 0.0, "next_p_penalty": 0.0}


def penalised(picks: Picks, batch: Batch, slopes: Tensor, total: Tensor, *, state: dict[str, float]) -> Terms:
    """Terms of squared error plus a penalty; slopes (nnz,) and total are summed over tokens, not averaged."""
    batch_size = len(batch.targets) * batch.mesh.dp
    residual = residual_of(picks, batch)
    loss, penalty = sum_of_squares(residual) / batch_size, total / batch_size
    gradient = plain_gradient(picks, batch, residual.mul_(2 / batch_size))
    return Terms(
        gradient=replace(gradient, gradients=gradient.gradients + slopes / batch_size),
        n_active=len(picks.features),
        sums={"loss": loss, "objective": loss + penalty, "penalty": penalty},
        state={**state, DENSITY: density(len(picks.features), batch)},
    )


def dense_penalised(blocks: PenaltyBlocks, batch: Batch, state: dict[str, float]) -> Terms:
    """The terms of a batch from matrices, while most features are active."""
    found = reconstruct(blocks, batch)
    if "following" in found.sums:
        _count_penalties(state, found.sums["penalty"], found.sums["following"], batch)
    loss = found.squares[0] / blocks.batch_size
    penalty = blocks.coefficient * found.sums["penalty"] / blocks.batch_size
    return Terms(
        gradient=dense_gradient(blocks, batch, found, 2 / blocks.batch_size),
        n_active=found.n_active,
        sums={"loss": loss, "objective": loss + penalty, "penalty": penalty},
        state={**state, DENSITY: density(found.n_active, batch)},
    )
