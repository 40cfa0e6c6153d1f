"""Data parallelism by exchanging the batch instead of dense gradients.

Every gradient of W_enc and W_dec is a sum over (token, picked feature). Replicas of one shard therefore gather each
other's tokens and picks, O(batch * (2 d_in + 3 k)) numbers, and each sums the whole batch in token order: replicas
stay equal bit for bit, and equal to a run with one replica, while the encoder product stays divided.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.sparse import Picks


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGradient:
    """All that the weight gradients of a shard are made of, for the tokens of one or of all replicas."""

    features: Tensor
    """(nnz,) feature of every pick, within the shard."""
    tokens: Tensor
    """(nnz,) token of every pick."""
    values: Tensor
    """(nnz,) activation."""
    gradients: Tensor
    """(nnz,) dL/d(activation)."""
    encoder_inputs: Tensor
    """(tokens, d_in): x - b_dec."""
    residual_gradients: Tensor
    """(tokens, d_in): dL/dx_hat."""


def local_gradient(
    picks: Picks, gradients: Tensor, encoder_inputs: Tensor, residual_gradients: Tensor
) -> SparseGradient:
    """The sparse gradient of this replica's own tokens."""
    return SparseGradient(
        features=picks.features,
        tokens=picks.token_indices(),
        values=picks.values,
        gradients=gradients,
        encoder_inputs=encoder_inputs,
        residual_gradients=residual_gradients,
    )


def exchange(local: SparseGradient, mesh: ProcessMesh) -> SparseGradient:
    """The sparse gradient of the whole batch, in token order; the input itself where there is one replica."""
    if mesh.dp == 1:
        return local
    n_tokens = len(local.encoder_inputs)
    index = torch.stack([local.features, local.tokens + mesh.replica * n_tokens], dim=1)
    weight = torch.stack([local.values, local.gradients], dim=1)
    indices = torch.cat(mesh.all_gather_ragged(index, "dp"))
    weights = torch.cat(mesh.all_gather_ragged(weight, "dp"))
    return SparseGradient(
        features=indices[:, 0].contiguous(),
        tokens=indices[:, 1].contiguous(),
        values=weights[:, 0].contiguous(),
        gradients=weights[:, 1].contiguous(),
        encoder_inputs=torch.cat(mesh.all_gather(local.encoder_inputs, "dp")),
        residual_gradients=torch.cat(mesh.all_gather(local.residual_gradients, "dp")),
    )
