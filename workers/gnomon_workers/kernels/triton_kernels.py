"""The training step's kernels in Triton, for CUDA; its interpreter runs them on the CPU, slowly, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.kernels.interface import RowGradients
from gnomon_workers.kernels.triton_encoder import EncoderGemm
from gnomon_workers.kernels.triton_sparse import sampled_products, segment_sums
from gnomon_workers.kernels.triton_topk import topk_of_encoder
from gnomon_workers.kernels.triton_update import (
    AdamStep,
    AlignedGradients,
    RowPicks,
    Rows,
    aligned_gradients,
    update_rows,
)
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.selection import Candidates, GroupedRows, local_topk
from gnomon_workers.sae.sparse import FeatureSegments, Picks
from gnomon_workers.train.optimizer import AdamState


class TritonKernels:
    """Every product of a step but the bias gradients, on float32 masters."""

    def __init__(self, encoder_dtype: torch.dtype = torch.float32) -> None:
        """encoder_dtype, float32 or bfloat16, is what the encoder's factors are rounded to; sums are float32."""
        self.encoder_dtype = encoder_dtype
        self.rounded: Tensor | None = None
        """The encoder in encoder_dtype, once an update has left it there."""

    def local_topk(self, pre: PreActivations, k: int) -> Candidates:
        """The k largest positive pre-activations of every token, behind the encoder's product where that is bfloat16.

        In float32 the vendor's matrix product is the faster by more than writing the pre-activations costs.
        """
        if self.encoder_dtype == torch.float32:
            return local_topk(GroupedRows(pre.dense(), k), k)
        weights = self.rounded if self.rounded is not None else pre.parameters.W_enc_rows
        values, features = self.topk(pre.inputs, weights, pre.parameters.b_enc, k)
        tokens = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
        is_active = values > 0
        return Candidates(tokens=tokens[is_active], features=features[is_active], values=values[is_active])

    def topk(self, inputs: Tensor, W_enc_rows: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest pre-activations of every token by ascending index: (tokens, k) float32 values, int64 indices.

        inputs is (tokens, d_in), W_enc_rows (n_local, d_in), in float32 or already in encoder_dtype. Ties of positive
        values go to the lowest index. [tokens, n_local] is not written but for tokens whose list overflows.
        """
        if not len(inputs):
            return inputs.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=inputs.device)
        return topk_of_encoder(EncoderGemm.create(inputs, W_enc_rows, b_enc, self.encoder_dtype), k)

    def decode(self, picks: Picks, W_dec: Tensor) -> Tensor:
        """Sum of the picked decoder rows weighted by their activations, (tokens, d_in), without b_dec."""
        return segment_sums(picks.offsets, picks.features, picks.values, W_dec)

    def activation_gradients(self, picks: Picks, residual_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """dL/d(activation) of every pick, (nnz,); residual_gradients is (tokens, d_in)."""
        return sampled_products(picks.offsets, picks.features, residual_gradients, W_dec)

    def row_gradients(self, segments: FeatureSegments, weights: Tensor, vectors: Tensor) -> Tensor:
        """For every touched feature the sum over its picks of weight * vector of the token, (n_touched, d_in).

        weights is (nnz,) in the order of the picks, not of the segments.
        """
        return segment_sums(segments.offsets, segments.tokens, weights[segments.order], vectors)

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
        """One program for each feature."""
        if self.encoder_dtype == torch.bfloat16 and len(optimizer.own) == parameters.n_local:
            self.rounded = parameters.W_enc_rows.bfloat16()
        return TritonUpdate(self, parameters, optimizer, alignment)

    def update(
        self,
        encoder: Rows,
        decoder: Rows,
        gradients: AlignedGradients | RowGradients,
        clip_scale: Tensor,
        adam: AdamStep,
        rule: Alignment,
        encoder_copy: Tensor | None = None,
    ) -> Tensor | None:
        """Clip, Adam and retraction of all rows in place; "scale" returns the smallest <v, d> that it divided by.

        clip_scale is a scalar on the device. encoder_copy, (n_local, d_in), receives the new encoder in its own
        dtype, so that the next topk need not read the masters.
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
        )

    def apply(self, gradients: RowGradients, *, lr: float, clip_scale: float) -> Tensor | None:
        """Clip, Adam and retraction of a row in one program."""
        optimizer = self._optimizer
        optimizer.begin(gradients.vectors, lr=lr, clip_scale=clip_scale)
        adam = AdamStep(
            number=int(optimizer.n_steps),
            lr=lr,
            beta1=optimizer.beta1,
            beta2=optimizer.config.beta2,
            eps=optimizer.config.eps,
        )
        decoder = self._rows("W_dec")
        return self._kernels.update(
            decoder if self._alignment == "tied" else self._rows("W_enc_rows"),
            decoder,
            self._own(gradients),
            torch.tensor(clip_scale, device=decoder.weights.device),
            adam,
            self._alignment,
            self._kernels.rounded,
        )

    def _rows(self, name: str) -> Rows:
        own = self._optimizer.own
        weights, first, second = self._optimizer.rows(name, own.start, own.stop)
        return Rows(weights=weights, first=first, second=second)

    def _own(self, gradients: RowGradients) -> RowGradients:
        """Gradients of the rows that this replica moves, numbered from the first of them."""
        own, touched = self._optimizer.own, gradients.touched
        first, last = torch.searchsorted(touched, torch.tensor([own.start, own.stop], device=touched.device)).tolist()
        encoder, decoder = gradients.encoder[first:last], gradients.decoder[first:last]
        return replace(
            gradients,
            touched=touched[first:last] - own.start,
            encoder=decoder if gradients.encoder is gradients.decoder else encoder,
            decoder=decoder,
        )
