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

FLOOR: Final = 1e-4
"""Below this activation f^p is continued as a line through 0: its slope, p f^(p - 1), has no bound there."""
N_AVERAGED: Final = 10
"""Steps before an update of p over whose penalties lambda is rescaled."""


def penalty_warmup(given: int | None, setting: Setting) -> int:
    """Warm-up steps of a penalty, with the default of a twentieth of the run resolved."""
    return given if given is not None else setting.n_steps // 20


class ReLUVariant(PlainVariant):
    """L1 in both forms."""

    def __init__(self, activation: ReLU, setting: Setting) -> None:
        self._coefficient = activation.l1_coefficient
        self._by_decoder_norm = activation.penalty == "decoder_norm_l1"
        self._batch_size = setting.batch_size
        self._warmup_steps = penalty_warmup(activation.warmup_steps, setting)

    def select(self, batch: Batch) -> Picks:
        """What is positive."""
        return picks_where(batch.hidden_pre, batch.hidden_pre > 0)

    def terms(self, batch: Batch) -> Terms:
        """Squared error and penalty."""
        picks = self.select(batch)
        coefficient = self._coefficient * warm(batch.step, self._warmup_steps)
        weights = torch.ones_like(picks.values)
        if self._by_decoder_norm:
            weights = torch.linalg.vector_norm(batch.parameters.W_dec, dim=1)[picks.features]
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
        """lambda, and the penalties at the present and the next p since the last update."""
        return {"l1_coefficient": self._activation.l1_coefficient, "p_penalty": 0.0, "next_p_penalty": 0.0}

    def exponent(self, n_updates: int) -> float:
        """p after a number of updates."""
        share = min(n_updates, self._activation.n_updates) / self._activation.n_updates
        return 1 - share * (1 - self._activation.final_p)

    def select(self, batch: Batch) -> Picks:
        """What is positive."""
        return picks_where(batch.hidden_pre, batch.hidden_pre > 0)

    def terms(self, batch: Batch) -> Terms:
        """Squared error and penalty at this step's p."""
        picks = self.select(batch)
        n_updates = sum(update <= batch.step for update in self._updates)
        p = self.exponent(n_updates)
        state = _rescaled(batch.state) if batch.step in self._updates else dict(batch.state)
        coefficient = state["l1_coefficient"] * warm(batch.step, self._warmup_steps)
        powers, slopes = _power(picks.values, p)
        total = batch.mesh.all_reduce(powers.sum(dtype=torch.float64), "features")
        if any(0 < update - batch.step <= N_AVERAGED for update in self._updates):
            following = _power(picks.values, self.exponent(n_updates + 1))[0].sum(dtype=torch.float64)
            both = torch.stack([total, batch.mesh.all_reduce(following, "features")])
            now, later = batch.mesh.all_reduce(both, "dp").tolist()
            state["p_penalty"] += now
            state["next_p_penalty"] += later
        return penalised(picks, batch, coefficient * slopes, coefficient * total, state=state)


def _rescaled(state: dict[str, float]) -> dict[str, float]:
    """lambda such that the penalty of the last steps is the same at the new p; their sums begin again."""
    ratio = state["p_penalty"] / state["next_p_penalty"] if state["next_p_penalty"] > 0 else 1.0
    return {"l1_coefficient": state["l1_coefficient"] * ratio, "p_penalty": 0.0, "next_p_penalty": 0.0}


def _power(values: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """f^p and its derivative, with the line through 0 below FLOOR."""
    is_small = values < FLOOR
    line = FLOOR ** (p - 1)
    slopes = values.clamp_min(FLOOR).pow(p - 1)
    return (values * slopes.masked_fill(is_small, line)), (p * slopes).masked_fill_(is_small, line)


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
        state=state,
    )
