"""What a variant is: from pre-activations to the terms that the common step makes an update of.

All variants share the projection hidden_pre = (x - b_dec) W_enc + b_enc, one dense product. A variant decides which
features are active, what is lost, and hands back sparse terms; exchange between replicas, weight gradients,
alignment, clipping, Adam and retraction are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.arrays import offsets_of
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.products import Kernels
from gnomon_workers.sae.sparse import Picks

if TYPE_CHECKING:
    from gnomon_workers.sae.variants.dense import DenseGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Numbers of a run that variants need."""

    d_sae: int
    batch_size: int
    """Tokens of a step over all replicas."""
    n_steps: int
    k_aux: int
    dead_after_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a variant is given at a step; tokens are those of this replica."""

    step: int
    """Number of the step, counted from 0."""
    pre: PreActivations
    encoder_inputs: Tensor
    """(tokens, d_in)"""
    targets: Tensor
    """(tokens, d_out): what the decoded features should add up to; the encoder inputs but for transcoders."""
    parameters: Parameters
    kernels: Kernels
    mesh: ProcessMesh
    n_tokens_since_fired: Tensor
    """(n_local,)"""
    state: dict[str, float]
    """Running numbers as the step before left them."""
    dense_dtype: torch.dtype = torch.float32
    """Of the products of matrices that stand for picks where most features are active."""

    @property
    def hidden_pre(self) -> Tensor:
        """(tokens, n_local)"""
        return self.pre.dense()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a variant makes of a batch."""

    gradient: SparseGradient | DenseGradient
    """Sums over the tokens of this replica alone; the step adds up those of all."""
    n_active: int
    """Active (token, feature) pairs of this rank."""
    sums: dict[str, Tensor]
    """Float64 scalars, complete over shards, that add up over replicas: "loss", the mean of |x - x_hat|^2; the
    "objective" that is minimised; and parts of it by name."""
    state: dict[str, float]
    """Running numbers after this step, which take effect only if the step is made."""


class Variant(Protocol):
    """An activation and its loss: which features are active, and the gradients of what is minimised."""

    def initial_vectors(self) -> dict[str, float]:
        """Per-feature parameters besides b_enc, with the value each starts from."""

    def initial_state(self) -> dict[str, float]:
        """Running numbers that checkpoints keep."""

    def select(self, batch: Batch) -> Picks:
        """Active features of a batch, as in training; collective."""

    def terms(self, batch: Batch) -> Terms:
        """Losses and sparse gradients of a batch; collective, and changes nothing."""

    def projection_gradients(self, grads: dict[str, Tensor], parameters: Parameters) -> Tensor:
        """Sum over tokens of dL/d(projection) of every feature, (n_local,), from the vectors' gradients."""


class PlainVariant:
    """The common case: no vectors, no running numbers, and a bias whose gradient is the projection's."""

    def initial_vectors(self) -> dict[str, float]:
        """No parameters beside W_enc, W_dec, b_enc and b_dec."""
        return {}

    def initial_state(self) -> dict[str, float]:
        """Nothing that a step takes over from the one before, and a checkpoint would have to hold."""
        return {}

    def projection_gradients(self, grads: dict[str, Tensor], parameters: Parameters) -> Tensor:  # noqa: ARG002
        """The bias is added to the projection, so their gradients are equal."""
        return grads["b_enc"]


def picks_where(values: Tensor, mask: Tensor) -> Picks:
    """Picks of the entries of values (tokens, n_local) that the mask keeps."""
    tokens, features = mask.nonzero(as_tuple=True)
    return Picks(features=features, values=values[mask], offsets=offsets_of(mask.sum(1)), tokens=tokens)


def residual_of(picks: Picks, batch: Batch) -> Tensor:
    """x_hat - x, (tokens, d_out); b_dec cancels. Collective over shards."""
    reconstruction = batch.mesh.all_reduce(batch.kernels.decode(picks, batch.parameters.W_dec), "features")
    return reconstruction.sub_(batch.targets)


def plain_gradient(picks: Picks, batch: Batch, residual_gradients: Tensor) -> SparseGradient:
    """The gradient where dL/d(projection) is dL/d(activation) of active features."""
    tokens = picks.token_indices()
    return SparseGradient(
        features=picks.features,
        tokens=tokens,
        rows=tokens,
        values=picks.values,
        gradients=batch.kernels.activation_gradients(picks, residual_gradients, batch.parameters.W_dec),
        vector_gradients={},
        encoder_inputs=batch.encoder_inputs,
        residual_gradients=residual_gradients,
    )


def float32_values(picks: Picks, batch: Batch, *, relu: bool = True) -> Picks:
    """The picks with their activations in the inputs' precision; themselves where they have it already.

    With relu, what turns out not to be positive stays picked at 0: too close to it for bfloat16 to tell.
    """
    if picks.values.dtype == batch.encoder_inputs.dtype and not batch.pre.is_rounded:
        return picks
    params = batch.parameters
    projections = batch.kernels.activation_gradients(picks, batch.encoder_inputs, params.W_enc_rows)
    values = projections + params.b_enc[picks.features]
    return replace(picks, values=values.clamp_min_(0) if relu else values)


def with_values(picks: Picks, values: Tensor) -> Picks:
    """The same picks with other activations."""
    return replace(picks, values=values)


def sum_of_squares(values: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar: rows in the tensor's own precision, the sum of rows in float64."""
    # the norm makes no copy of the values, which are as large as a batch
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms.double().square().sum()


def warm(step: int, n_steps: int) -> float:
    """Share of a coefficient at a step of its linear warm-up, as the learning rate's."""
    return min(1.0, (step + 1) / (n_steps + 1))
