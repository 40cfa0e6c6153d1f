"""Weight gradients of a step that is made with matrices: sums over tokens of a block of features, projected at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.variants import Variant
from gnomon_workers.sae.variants.dense import DenseGradient


def dense_gradients(
    dense: DenseGradient, parameters: Parameters, alignment: Alignment, variant: Variant
) -> RowGradients:
    """Gradients of all features of a shard for the tokens of this replica, after the alignment hook."""
    is_tied = parameters.is_tied
    decoder = torch.empty_like(parameters.W_dec)
    encoder = decoder if is_tied else torch.empty_like(parameters.W_enc_rows)
    vectors = {name: torch.empty_like(parameters.b_enc) for name in ("b_enc", *parameters.vectors)}
    for features, g, h, pulled in dense.blocks():
        d = parameters.W_dec[features]
        w = d if is_tied else parameters.W_enc_rows[features]
        if is_tied:
            h.add_(g)  # one matrix, whose gradient is the sum of both
        RULES["none" if is_tied else alignment].project(g, h, w, d)
        decoder[features] = h
        if not is_tied:
            encoder[features] = g
        for name, vector in pulled.items():
            vectors[name][features] = vector
    projections: Tensor = variant.projection_gradients(vectors, parameters)
    vectors["b_dec"] = dense.b_dec_gradient()
    return RowGradients(
        touched=torch.arange(parameters.n_local, device=decoder.device),
        encoder=encoder,
        decoder=decoder,
        vectors=vectors,
        through_encoder=projections @ parameters.W_enc_rows,
    )
