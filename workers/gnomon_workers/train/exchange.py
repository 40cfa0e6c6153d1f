"""How replicas share what they have learnt: by exchanging the batch, or by summing dense gradients.

Every gradient of W_enc and W_dec is a sum over (token, picked feature). Replicas of one shard can therefore gather
each other's tokens and picks, and each sums the whole batch in token order: replicas stay equal bit for bit, and
equal to a run with one replica, while the encoder product stays divided. For a dictionary that is small against its
batch, a sum over replicas of the dense gradients is less to send; it too leaves replicas equal, but rounds otherwise
than a run with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.products import RowGradients


def start_inputs(encoder_inputs: Tensor, mesh: ProcessMesh) -> Callable[[], Tensor]:
    """Begin to gather the batch's inputs, so that they travel while the encoder works; returns what waits for them."""
    finish = mesh.start_all_gather(encoder_inputs, "dp")
    return lambda: torch.cat(finish()) if mesh.dp > 1 else encoder_inputs


def exchange(local: SparseGradient, encoder_inputs: Callable[[], Tensor], mesh: ProcessMesh) -> SparseGradient:
    """The sparse gradient of the whole batch, in token order; the input itself where there is one replica."""
    if mesh.dp == 1:
        return local
    names = sorted(local.vector_gradients)  # columns in the same order on every replica
    columns = [local.values, local.gradients, *(local.vector_gradients[name] for name in names)]
    # rows of a token lie together, so the replicas' rows follow each other as their tokens do
    rows = local.rows + mesh.replica * len(local.residual_gradients)
    index = torch.stack([local.features, rows], dim=1).int()
    indices, gathered = (
        torch.cat(parts).t() for parts in mesh.all_gather_ragged([index, torch.stack(columns, dim=1)], "dp")
    )
    features, rows = indices.long().contiguous()
    gathered = gathered.contiguous()
    return replace(
        local,
        features=features,
        tokens=rows if local.n_rows == 1 else rows // local.n_rows,
        rows=rows,
        values=gathered[0],
        gradients=gathered[1],
        vector_gradients=dict(zip(names, gathered[2:], strict=True)),
        encoder_inputs=encoder_inputs(),
        residual_gradients=torch.cat(mesh.all_gather(local.residual_gradients, "dp")),
    )


def reduce_dense(gradients: RowGradients, n_local: int, mesh: ProcessMesh) -> RowGradients:
    """The gradients of every feature, summed over replicas."""
    features = torch.arange(n_local, device=gradients.touched.device)
    is_tied = gradients.encoder is gradients.decoder
    decoder = mesh.all_reduce(_dense(gradients.decoder, gradients.touched, n_local), "dp")
    encoder = decoder if is_tied else mesh.all_reduce(_dense(gradients.encoder, gradients.touched, n_local), "dp")
    vectors = {name: mesh.all_reduce(vector, "dp") for name, vector in gradients.vectors.items()}
    through_encoder = mesh.all_reduce(gradients.through_encoder, "dp")
    return RowGradients(
        touched=features, encoder=encoder, decoder=decoder, vectors=vectors, through_encoder=through_encoder
    )


def fired_anywhere(fired: Tensor, n_local: int, mesh: ProcessMesh) -> Tensor:
    """Features that fired on any replica."""
    mask = torch.zeros(n_local, dtype=torch.int32, device=fired.device)
    mask[fired] = 1
    return mesh.all_reduce(mask, "dp").nonzero().squeeze(1)


def _dense(rows: Tensor, touched: Tensor, n_local: int) -> Tensor:
    return rows.new_zeros(n_local, rows.shape[1]).index_copy_(0, touched, rows)
