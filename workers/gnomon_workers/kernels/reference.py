"""Every product in its dense form: readable, slow, and what the fast ones are compared with. Works in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.sae.alignment import RULES
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.optimizer import MATRICES, AdamState
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.selection import Candidates
from gnomon_workers.sae.sparse import FeatureSegments, Picks


class ReferenceKernels:
    """Activations as a matrix, and nothing but matrix products and a stable sort."""

    def local_topk(self, pre: PreActivations, k: int) -> Candidates:
        """A stable descending sort, cut at k."""
        hidden_pre = pre.dense()
        kept = hidden_pre.sort(dim=1, descending=True, stable=True).indices[:, :k]
        mask = torch.zeros_like(hidden_pre, dtype=torch.bool).scatter_(1, kept, True) & (hidden_pre > 0)
        tokens, features = mask.nonzero(as_tuple=True)
        return Candidates(tokens=tokens, features=features, values=hidden_pre[mask])

    def group_maxima(self, values: Tensor, width: int) -> Tensor:
        """A dense maximum over neighbours."""
        return values.view(len(values), -1, width).amax(2)

    def decode(self, picks: Picks, W_dec: Tensor) -> Tensor:
        """Activations times decoder."""
        return _matrix(picks.token_indices(), picks.features, picks.values, (picks.n_tokens, len(W_dec))) @ W_dec

    def activation_gradients(self, picks: Picks, residual_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """The gradient of every activation, of which those of the picks are taken."""
        return (residual_gradients @ W_dec.t())[picks.token_indices(), picks.features]

    def weight_update(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> ReferenceUpdate:
        """An update that moves all features at once, by dense products."""
        return ReferenceUpdate(parameters, optimizer, alignment)


class ReferenceUpdate:
    """Gradients of all features as matrix products, and Adam as its paper writes it (arXiv:1412.6980)."""

    def __init__(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._is_tied = parameters.is_tied
        self._rule = RULES["none" if parameters.is_tied else alignment]

    def gradients(
        self,
        sparse: SparseGradient,
        segments: FeatureSegments,  # noqa: ARG002
        vectors: dict[str, Tensor],
        projections: Tensor,
    ) -> RowGradients:
        """Transposed activations times residuals, transposed gradients times inputs, and the alignment hook."""
        params = self._parameters
        shape = (len(sparse.residual_gradients), params.n_local)
        h = _matrix(sparse.rows, sparse.features, sparse.values, shape).t() @ sparse.residual_gradients
        shape = (len(sparse.encoder_inputs), params.n_local)
        g = _matrix(sparse.tokens, sparse.features, sparse.gradients, shape).t() @ sparse.encoder_inputs
        if self._is_tied:
            h += g
        self._rule.project(g, h, params.W_enc_rows, params.W_dec)
        return RowGradients(
            touched=torch.arange(params.n_local, device=h.device),
            encoder=h if self._is_tied else g,
            decoder=h,
            vectors=vectors,
            through_encoder=projections @ params.W_enc_rows,
        )

    def apply(
        self, gradients: RowGradients, *, lr: float, clip_scale: float, encoder_copy: Tensor | None = None
    ) -> Tensor | None:
        """Adam, parameter by parameter, then retraction."""
        optimizer = self._optimizer
        optimizer.n_steps.add_(1)
        n_steps = float(optimizer.n_steps)
        beta1, beta2 = optimizer.betas
        given = {**gradients.vectors, "W_dec": gradients.decoder, "W_enc_rows": gradients.encoder}
        own = slice(optimizer.own.start, optimizer.own.stop)
        for name, whole in optimizer.params.items():
            rows = own if name in MATRICES else slice(None)
            parameter, gradient = whole[rows], given[name][rows] * clip_scale
            first = optimizer.first[name].lerp_(gradient, 1 - beta1)
            second = optimizer.second[name].lerp_(gradient.square(), 1 - beta2)
            first_unbiased = first / (1 - beta1**n_steps)
            second_unbiased = second / (1 - beta2**n_steps)
            rate = lr * optimizer.rates.get(name, 1.0)
            parameter.sub_(rate * first_unbiased / (second_unbiased.sqrt() + optimizer.eps))
        smallest = self._rule.retract(self._parameters.W_enc_rows[own], self._parameters.W_dec[own])
        if encoder_copy is not None:
            encoder_copy.copy_(self._parameters.W_enc_rows)
        return smallest


def _matrix(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Dense matrix of the given entries; entries named twice add up."""
    return values.new_zeros(shape).index_put_((rows, columns), values, accumulate=True)
