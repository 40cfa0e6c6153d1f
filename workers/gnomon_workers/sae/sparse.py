"""Sparse activations and the products with them: only nnz of batch * n_local activations are non-zero.

Every product sums in an order that depends on the picks alone, never on threads: two runs give the same bits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Said once by every rank, and nothing a user could act on: the one CSR operation used here is tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


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

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.offsets) - 1

    def token_indices(self) -> Tensor:
        """(nnz,) the token of every pick."""
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=len(self.features))


def picks_from_mask(features: Tensor, values: Tensor, mask: Tensor) -> Picks:
    """Picks from padded rows: features, values and mask are (tokens, width); masked-out entries are left out."""
    offsets = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    return Picks(features=features[mask], values=values[mask], offsets=offsets)


def decode(picks: Picks, W_dec: Tensor) -> Tensor:
    """Sum of the picked decoder rows weighted by their activations, (tokens, d_in), without b_dec."""
    return embedding_bag(
        picks.features,
        W_dec,
        picks.offsets,
        mode="sum",
        per_sample_weights=picks.values,
        include_last_offset=True,
    )


def activation_gradients(picks: Picks, residual_gradient: Tensor, W_dec: Tensor) -> Tensor:
    """dL/d(activation) of every pick, (nnz,): <dL/dx_hat of its token, its decoder row>.

    residual_gradient is (tokens, d_in).
    """
    if residual_gradient.device.type == "cpu" and not _HAS_MKL:
        return (residual_gradient[picks.token_indices()] * W_dec[picks.features]).sum(1)
    shape = (picks.n_tokens, W_dec.shape[0])
    pattern = torch.sparse_csr_tensor(
        picks.offsets, picks.features, torch.zeros_like(picks.values), shape, check_invariants=False
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


def sort_by_feature(features: Tensor, tokens: Tensor) -> FeatureSegments:
    """Group picks by feature; picks of one feature stay in token order."""
    ordered, order = features.sort(stable=True)
    touched, counts = torch.unique_consecutive(ordered, return_counts=True)
    offsets = torch.zeros(len(touched) + 1, dtype=torch.int64, device=features.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return FeatureSegments(order=order, tokens=tokens[order], touched=touched, offsets=offsets)


def row_gradients(segments: FeatureSegments, weights: Tensor, vectors: Tensor) -> Tensor:
    """For every touched feature the sum over its picks of weight * vector of the token, (n_touched, d_in).

    weights is (nnz,) in the order of the picks; vectors is (tokens, d_in).
    """
    return embedding_bag(
        segments.tokens,
        vectors,
        segments.offsets,
        mode="sum",
        per_sample_weights=weights[segments.order],
        include_last_offset=True,
    )


def segment_sums(segments: FeatureSegments, weights: Tensor) -> Tensor:
    """For every touched feature the sum of the weights of its picks, (n_touched,)."""
    return torch.segment_reduce(weights[segments.order], "sum", offsets=segments.offsets)
