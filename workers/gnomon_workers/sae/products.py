"""What a set of kernels can do; the step and the variants use nothing else for the products that take the time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.optimizer import AdamState
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.selection import Candidates
from gnomon_workers.sae.sparse import FeatureSegments, Picks


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGradients:
    """Gradients of a shard's features, those of features without a pick left out."""

    touched: Tensor
    """(n_touched,) features that have a gradient, ascending."""
    encoder: Tensor
    """(n_touched, d_in), after the alignment hook; the decoder's own where the two are tied."""
    decoder: Tensor
    """(n_touched, d_out), after the alignment hook."""
    vectors: dict[str, Tensor]
    """Gradients of b_enc, b_dec and what the variant trains besides, each whole."""
    through_encoder: Tensor
    """(d_in,) sum over features of dL/d(projection) times the encoder row, with which the input bias is pulled."""
    squares: Tensor | None = None
    """(n_touched,) sum of the squares of a feature's row or rows, where they were at hand."""

    def square_sums(self) -> dict[str, Tensor]:
        """Sums of squares, float64 scalars: of the matrices' gradients together, and of each vector's by its name."""
        squares = self.squares if self.squares is not None else self._row_squares()
        vectors = {name: vector.double().square().sum() for name, vector in self.vectors.items()}
        return {"rows": squares.sum(dtype=torch.float64), **vectors}

    def _row_squares(self) -> Tensor:
        matrices = [self.decoder] if self.encoder is self.decoder else [self.decoder, self.encoder]
        norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in matrices])
        return norms.double().square().sum(0)


class WeightUpdate(Protocol):
    """Sums the gradients of one shard's features and moves them, keeping the buffers that this takes."""

    def gradients(
        self, sparse: SparseGradient, segments: FeatureSegments, vectors: dict[str, Tensor], projections: Tensor
    ) -> RowGradients:
        """Gradients of the features that have picks, after the alignment hook, in buffers that are used again.

        segments are the picks by feature; vectors is passed on; projections is (n_local,), the sum over tokens of
        dL/d(projection).
        """

    def apply(
        self, gradients: RowGradients, *, lr: float, clip_scale: float, encoder_copy: Tensor | None = None
    ) -> Tensor | None:
        """One step of Adam down gradients * clip_scale, then retraction.

        encoder_copy, (n_local, d_in) in another dtype, receives the new encoder rows of the features that are moved
        here. Returns the smallest <v, d> of the shard where the alignment divides by it.
        """


class Kernels(Protocol):
    """The products of a step. Inputs and masters are float32; float64 works where the implementation says so."""

    def local_topk(self, pre: PreActivations, k: int) -> Candidates:
        """The k largest positive pre-activations of every token in this shard, ties to the lowest index."""

    def group_maxima(self, values: Tensor, width: int) -> Tensor:
        """The largest of `width` neighbours, (tokens, n / width); where none is positive, something that is not."""

    def decode(self, picks: Picks, W_dec: Tensor) -> Tensor:
        """Sum of the picked decoder rows weighted by their activations, (tokens, d_out), without b_dec."""

    def activation_gradients(self, picks: Picks, residual_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """<row of residual_gradients of its token, its row of W_dec> of every pick, (nnz,)."""

    def weight_update(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> WeightUpdate:
        """What sums gradients of features and moves them."""
