"""Sparse activations and the products with them: only nnz of batch * n_local activations are non-zero.

Every product sums in an order that depends on the picks alone, never on threads: two runs give the same bits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gnomon_workers.sae.arrays import offsets_of, stable_order, take

# Said once by every rank, and nothing a user could act on: the one CSR operation used here is tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


DENSE_SHARE: Final = 0.1
"""Above this share of active entries the dense product is the faster one: variants without a fixed number of active
features begin with half of all."""
_HAS_MKL = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
"""The sampled product on CPU needs MKL; without it (on Arm) rows are gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Active features of a batch, in rows of ascending feature index."""

    features: Tensor
    """(nnz,) int64, index within the shard."""
    values: Tensor
    """(nnz,) activation."""
    offsets: Tensor
    """(tokens + 1,) int64: token t has the picks [offsets[t], offsets[t + 1])."""
    tokens: Tensor | None = None
    """(nnz,) int64, the token of every pick, where it is known already."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch, those without an active feature included."""
        return len(self.offsets) - 1

    def token_indices(self) -> Tensor:
        """(nnz,) the token of every pick."""
        if self.tokens is not None:
            return self.tokens
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=len(self.features))


def bag_sums(vectors: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Weighted sums of rows of `vectors`: result i is that of rows [offsets[i], offsets[i + 1])."""
    return embedding_bag(rows, vectors, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def decode(picks: Picks, W_dec: Tensor) -> Tensor:
    """Sum of the picked decoder rows weighted by their activations, (tokens, d_in), without b_dec."""
    return bag_sums(W_dec, picks.features, picks.values, picks.offsets)


def activation_gradients(picks: Picks, residual_gradient: Tensor, W_dec: Tensor) -> Tensor:
    """dL/d(activation) of every pick, (nnz,): <dL/dx_hat of its token, its decoder row>.

    residual_gradient is (tokens, d_in).
    """
    if len(picks.features) > DENSE_SHARE * picks.n_tokens * W_dec.shape[0]:
        products = torch.mm(residual_gradient, W_dec.t()).view(-1)
        return take(products, picks.token_indices() * W_dec.shape[0] + picks.features)
    if residual_gradient.device.type == "cpu" and not _HAS_MKL:
        return (residual_gradient[picks.token_indices()] * W_dec[picks.features]).sum(1)
    shape = (picks.n_tokens, W_dec.shape[0])
    pattern = torch.sparse_csr_tensor(
        picks.offsets, picks.features, W_dec.new_zeros(len(picks.values)), shape, check_invariants=False
    )
    sampled: Tensor = torch.sparse.sampled_addmm(pattern, residual_gradient, W_dec.t(), beta=0.0)
    return sampled.values()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSegments:
    """The picks of a batch sorted by feature, so that a weight gradient is a sum over consecutive picks."""

    order: Tensor
    """(nnz,) permutation of the picks: by feature, then by token."""
    tokens: Tensor
    """(nnz,) token of every pick, in that order."""
    touched: Tensor
    """(n_touched,) features that are active at least once, ascending."""
    offsets: Tensor
    """(n_touched + 1,) the picks of touched[i] are [offsets[i], offsets[i + 1])."""

    def of_all(self, n_features: int) -> FeatureSegments:
        """The same segments among empty ones for the features, of n_features, that have no pick."""
        counts = torch.zeros(n_features, dtype=torch.int64, device=self.touched.device)
        counts[self.touched] = self.offsets.diff()
        touched = torch.arange(n_features, device=self.touched.device)
        return FeatureSegments(order=self.order, tokens=self.tokens, touched=touched, offsets=offsets_of(counts))


def sort_by_feature(features: Tensor, tokens: Tensor) -> FeatureSegments:
    """Group picks by feature; picks of one feature stay in token order."""
    order = stable_order(features)
    touched, counts = torch.unique_consecutive(take(features, order), return_counts=True)
    return FeatureSegments(order=order, tokens=take(tokens, order), touched=touched, offsets=offsets_of(counts))


def segment_sums(segments: FeatureSegments, weights: Tensor) -> Tensor:
    """For every touched feature the sum of the weights of its picks, (n_touched,)."""
    return torch.segment_reduce(take(weights, segments.order), "sum", offsets=segments.offsets)
