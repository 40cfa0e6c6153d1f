"""The training step's kernels in Triton, for CUDA; its interpreter runs them on the CPU, slowly, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.kernels.triton_select import group_maxima, select_topk
from gnomon_workers.kernels.triton_sparse import sampled_products, segment_sums
from gnomon_workers.kernels.triton_update import (
    AdamRows,
    AdamStep,
    AlignedGradients,
    RowPicks,
    aligned_gradients,
    update_rows,
)
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.optimizer import AdamState
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.selection import Candidates
from gnomon_workers.sae.sparse import FeatureSegments, Picks


class TritonKernels:
    """Every product of a step but the bias gradients, on float32 masters."""

    def local_topk(self, pre: PreActivations, k: int) -> Candidates:
        """The k largest positive pre-activations of every token, from the vendor's matrix product."""
        return select_topk(pre.dense(), k)

    def group_maxima(self, values: Tensor, width: int) -> Tensor:
        """In one pass at the speed of memory."""
        return group_maxima(values, width)

    def decode(self, picks: Picks, W_dec: Tensor) -> Tensor:
        """Sum of the picked decoder rows weighted by their activations, (tokens, d_in), without b_dec."""
        return segment_sums(picks.offsets, picks.features, picks.values, W_dec)

    def activation_gradients(self, picks: Picks, residual_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """dL/d(activation) of every pick, (nnz,); residual_gradients is (tokens, d_in)."""
        return sampled_products(picks.token_indices(), picks.features, residual_gradients, W_dec)

    def aligned_gradients(
        self, sparse: SparseGradient, segments: FeatureSegments, W_enc_rows: Tensor, W_dec: Tensor, rule: Alignment
    ) -> AlignedGradients:
        """Gradients of the touched features after the alignment hook; segments are those of the sparse gradient.

        With "tied", where encoder and decoder are one matrix, its gradient is the sum of both.
        """
        order = segments.order
        picks = RowPicks(
            touched=segments.touched,
            offsets=segments.offsets,
            tokens=segments.tokens,
            rows=segments.tokens if sparse.n_rows == 1 else sparse.rows[order],
            gradients=sparse.gradients[order],
            values=sparse.values[order],
        )
        return aligned_gradients(picks, sparse.encoder_inputs, sparse.residual_gradients, W_enc_rows, W_dec, rule)

    def weight_update(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> TritonUpdate:
        """An update with one program for each feature, so that every sum has one order."""
        return TritonUpdate(self, parameters, optimizer, alignment)

    def update(
        self,
        encoder: AdamRows,
        decoder: AdamRows,
        gradients: AlignedGradients | RowGradients,
        clip_scale: float,
        adam: AdamStep,
        rule: Alignment,
        encoder_copy: Tensor | None = None,
    ) -> Tensor | None:
        """Clip, Adam and retraction of all rows in place; "scale" returns the smallest <v, d> that it divided by.

        encoder_copy, (n_local, d_in), receives the new encoder in its own dtype, so that the next product need not
        read the masters.
        """
        return update_rows(encoder, decoder, gradients, clip_scale, adam, rule, encoder_copy)


class TritonUpdate:
    """Gradients and Adam by whole rows; biases and other vectors are left to PyTorch."""

    def __init__(
        self, kernels: TritonKernels, parameters: Parameters, optimizer: AdamState, alignment: Alignment
    ) -> None:
        self._kernels = kernels
        self._parameters = parameters
        self._optimizer = optimizer
        self._alignment = alignment

    def gradients(
        self, sparse: SparseGradient, segments: FeatureSegments, vectors: dict[str, Tensor], projections: Tensor
    ) -> RowGradients:
        """Sums over the picks of each feature, projected while they are in registers."""
        params = self._parameters
        rows = self._kernels.aligned_gradients(sparse, segments, params.W_enc_rows, params.W_dec, self._alignment)
        return RowGradients(
            touched=rows.touched,
            encoder=rows.encoder,
            decoder=rows.decoder,
            vectors=vectors,
            through_encoder=projections @ params.W_enc_rows,
            squares=rows.squares,
        )

    def apply(
        self, gradients: RowGradients, *, lr: float, clip_scale: float, encoder_copy: Tensor | None = None
    ) -> Tensor | None:
        """Clip, Adam and retraction of a row in one program."""
        optimizer = self._optimizer
        optimizer.begin(gradients.vectors, lr=lr, clip_scale=clip_scale)
        adam = AdamStep(
            number=int(optimizer.n_steps),
            lr=lr,
            beta1=optimizer.betas[0],
            beta2=optimizer.betas[1],
            eps=optimizer.eps,
        )
        decoder = self._rows("W_dec")
        return self._kernels.update(
            decoder if self._alignment == "tied" else self._rows("W_enc_rows"),
            decoder,
            self._own(gradients),
            clip_scale,
            adam,
            self._alignment,
            encoder_copy,
        )

    def _rows(self, name: str) -> AdamRows:
        own = self._optimizer.own
        weights, first, second = self._optimizer.rows(name, own.start, own.stop)
        return AdamRows(weights=weights, first=first, second=second)

    def _own(self, gradients: RowGradients) -> RowGradients:
        """Gradients of the rows that this replica moves, numbered from the first of them."""
        own, touched = self._optimizer.own, gradients.touched
        if len(own) == self._parameters.n_local:
            return gradients
        first, last = torch.searchsorted(touched, torch.tensor([own.start, own.stop], device=touched.device)).tolist()
        encoder, decoder = gradients.encoder[first:last], gradients.decoder[first:last]
        return replace(
            gradients,
            touched=touched[first:last] - own.start,
            encoder=decoder if gradients.encoder is gradients.decoder else encoder,
            decoder=decoder,
        )
