"""Gated: a gate decides which features are active, a magnitude how strongly (Rajamanoharan et al. 2024,
arXiv:2404.16014).

With p = <w, x - b_dec> the projection on the aligned encoder,

    pi_gate = exp(-r_mag) p + b_gate      pi_mag = p + b_enc      f = H(pi_gate) relu(pi_mag)
    loss = |x - x_hat|^2 + lambda sum relu(pi_gate) + |x - x_frozen(relu(pi_gate))|^2

where x_frozen decodes with a decoder and b_dec that take no gradient from it. The source scales the gate's encoder
by exp(r_mag) to get the magnitude's; here the magnitude's is the one that is stored, because alignment belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.specs import Gated
from gnomon_workers.sae.arrays import where_positive
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.sparse import Picks
from gnomon_workers.sae.variants.base import (
    Batch,
    Setting,
    Terms,
    picks_where,
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
from gnomon_workers.sae.variants.relu import penalty_warmup


class GatedVariant:
    """b_enc is the magnitude's bias; b_gate and r_mag are vectors of their own."""

    def __init__(self, activation: Gated, setting: Setting) -> None:
        self._coefficient = activation.l1_coefficient
        self._batch_size = setting.batch_size
        self._warmup_steps = penalty_warmup(activation.warmup_steps, setting)

    def initial_vectors(self) -> dict[str, float]:
        """The gate's bias and the magnitude's rescaling, both 0, so that gate and magnitude start equal."""
        return {"b_gate": 0.0, "r_mag": 0.0}

    def initial_state(self) -> dict[str, float]:
        """The density, of which the first step decides how it is made."""
        return {DENSITY: 1.0}

    def projection_gradients(self, grads: dict[str, Tensor], parameters: Parameters) -> Tensor:
        """The projection enters the magnitude as it is, and the gate times exp(-r_mag)."""
        return grads["b_enc"] + torch.exp(-parameters.vectors["r_mag"]) * grads["b_gate"]

    def select(self, batch: Batch) -> Picks:
        """Open gates with a positive magnitude."""
        return picks_where(batch.hidden_pre, (_gates(batch.hidden_pre, batch.parameters) > 0) & (batch.hidden_pre > 0))

    def terms(self, batch: Batch) -> Terms:
        """Squared error, penalty and the gate's own reconstruction; picks are all open gates."""
        params = batch.parameters
        coefficient = self._coefficient * warm(batch.step, self._warmup_steps)
        if is_dense(batch):
            return self._dense_terms(batch, coefficient)
        gates = _gates(batch.hidden_pre, params)
        is_open = gates > 0
        gate = picks_where(gates, is_open)
        magnitude = batch.hidden_pre[is_open]
        picks = with_values(gate, magnitude.relu())
        residual, auxiliary = residual_of(picks, batch), residual_of(gate, batch)
        loss, aux_loss = (sum_of_squares(r) / self._batch_size for r in (residual, auxiliary))
        total = batch.mesh.all_reduce(gate.values.sum(dtype=torch.float64), "features")
        penalty = coefficient * total / self._batch_size
        to_gate = batch.kernels.activation_gradients(gate, auxiliary.mul_(2 / self._batch_size), params.W_dec)
        gradient = self._gradient(picks, batch, residual.mul_(2 / self._batch_size), to_gate, coefficient)
        return Terms(
            gradient=gradient,
            n_active=int((picks.values > 0).sum()),
            sums={"loss": loss, "objective": loss + penalty + aux_loss, "penalty": penalty, "aux_loss": aux_loss},
            state={DENSITY: density(len(gate.features), batch)},
        )

    def _dense_terms(self, batch: Batch, coefficient: float) -> Terms:
        """The terms of a batch from matrices, while most features are active."""
        blocks = GatedBlocks(batch.parameters, coefficient / self._batch_size)
        found = reconstruct(blocks, batch)
        loss, aux_loss = (square / self._batch_size for square in found.squares)
        penalty = coefficient * found.sums["gates"] / self._batch_size
        return Terms(
            gradient=dense_gradient(blocks, batch, found, 2 / self._batch_size),
            n_active=found.n_active,
            sums={"loss": loss, "objective": loss + penalty + aux_loss, "penalty": penalty, "aux_loss": aux_loss},
            state={DENSITY: density(found.n_active, batch)},
        )

    def _gradient(
        self, picks: Picks, batch: Batch, residual_gradients: Tensor, to_gate: Tensor, coefficient: float
    ) -> SparseGradient:
        params = batch.parameters
        to_gate += coefficient / self._batch_size
        to_magnitude = batch.kernels.activation_gradients(picks, residual_gradients, params.W_dec) * (picks.values > 0)
        scaled = torch.exp(-params.vectors["r_mag"])[picks.features] * to_gate
        tokens = picks.token_indices()
        projection = batch.hidden_pre[tokens, picks.features] - params.b_enc[picks.features]
        return SparseGradient(
            features=picks.features,
            tokens=tokens,
            rows=tokens,
            values=picks.values,
            gradients=to_magnitude + scaled,
            vector_gradients={"b_enc": to_magnitude, "b_gate": to_gate, "r_mag": -scaled * projection},
            encoder_inputs=batch.encoder_inputs,
            residual_gradients=residual_gradients,
            only_active=False,
        )


class GatedBlocks:
    """Open gates and their magnitudes, both decoded, for a block of features at a time."""

    def __init__(self, parameters: Parameters, slope: float) -> None:
        """slope is d(penalty)/d(gate)."""
        self._parameters = parameters
        self._slope = slope

    def activations(self, pre: Tensor, features: slice) -> tuple[Tensor, ...]:
        """Magnitudes behind open gates, and the gates themselves."""
        gates = _gates(pre, self._parameters, features).relu()
        return where_positive(pre.relu(), gates), gates

    def sums(self, activations: tuple[Tensor, ...], features: slice) -> dict[str, Tensor]:  # noqa: ARG002
        """The penalty on the gates of these features, one float64 scalar."""
        return {"gates": activations[1].sum(0).sum(dtype=torch.float64)}

    def pulled(self, pre: Tensor, features: slice, pulls: Sequence[Tensor]) -> Pulled:
        """Through magnitudes that are positive, and through open gates."""
        params = self._parameters
        gates = _gates(pre, params, features)
        acts = where_positive(pre.relu(), gates)
        to_magnitude = where_positive(pulls[0].to(pre.dtype), acts)
        to_gate = where_positive(pulls[1].to(pre.dtype) + self._slope, gates)
        scaled = torch.exp(-params.vectors["r_mag"][features]) * to_gate
        to_r_mag = -(scaled * (pre - params.b_enc[features])).sum(0)
        vectors = {"b_enc": to_magnitude.sum(0), "b_gate": to_gate.sum(0), "r_mag": to_r_mag}
        return Pulled(activations=acts, projections=scaled.add_(to_magnitude), vectors=vectors)


def _gates(hidden_pre: Tensor, parameters: Parameters, features: slice = slice(None)) -> Tensor:
    """pi_gate of the features given, (tokens, width); hidden_pre is their pi_mag."""
    r_mag, b_gate = parameters.vectors["r_mag"][features], parameters.vectors["b_gate"][features]
    return (hidden_pre - parameters.b_enc[features]) * torch.exp(-r_mag) + b_gate
