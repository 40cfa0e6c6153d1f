"""What the weight gradients of a shard are made of: active (token, feature) pairs and two matrices of rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGradient:
    """All gradients of a shard are sums over picks, for the tokens of one or of all replicas.

    A pick joins a feature with a token, and with one of the n_rows rows of residual gradients that belong to the
    token: row = token * n_rows + i. Row 0 is the reconstruction's; Matryoshka groups and the auxiliary loss have
    rows of their own. Picks are in ascending order of rows, so that sums over them do not depend on the replicas.
    """

    features: Tensor
    """(nnz,) feature of every pick, within the shard."""
    tokens: Tensor
    """(nnz,) token of every pick: its row of encoder_inputs."""
    rows: Tensor
    """(nnz,) row of residual_gradients of every pick; the same tensor as tokens where n_rows is 1."""
    values: Tensor
    """(nnz,) activation: the weight of the decoder's row in what it reconstructs."""
    gradients: Tensor
    """(nnz,) dL/d(projection): of <w, encoder input>."""
    vector_gradients: dict[str, Tensor]
    """(nnz,) each, by name: gradients of per-feature vectors; b_enc's are `gradients` where it is not named."""
    encoder_inputs: Tensor
    """(tokens, d_in): x - b_dec."""
    residual_gradients: Tensor
    """(tokens * n_rows, d_out): dL/dx_hat."""
    n_rows: int = 1
    """Rows of residual gradients of each token."""
    only_active: bool = True
    """Whether every pick is an active feature; else those with a positive value are."""
    has_auxiliary: bool = False
    """Whether each token's last row is the auxiliary loss's, whose picks do not count as firing."""

    def b_dec_gradient(self) -> Tensor:
        """dL/d(b_dec) through the reconstruction, (d_out,)."""
        if self.n_rows == 1:
            return self.residual_gradients.sum(0)
        return self.residual_gradients.view(-1, self.n_rows, self.residual_gradients.shape[1])[:, 0].sum(0)

    def fired(self, touched: Tensor) -> Tensor:
        """Features that were active, perhaps repeated; touched are all features with a pick."""
        if self.only_active:
            return touched
        is_active = self.values > 0
        if self.has_auxiliary:
            is_active &= self.rows % self.n_rows != self.n_rows - 1
        return self.features[is_active]
