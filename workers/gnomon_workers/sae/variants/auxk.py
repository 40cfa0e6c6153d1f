"""AuxK: dead features reconstruct what is left over, so that they come alive (Gao et al. 2024, arXiv:2406.04093).

    aux = coefficient * |e - e_hat|^2 / |e - mean e|^2,  e = stopgrad(x - x_hat),  e_hat = sum of f_i d_i

over the k largest pre-activations of dead features, without ReLU and without b_dec: the target is a residual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gnomon.specs import AuxK
from gnomon_workers.sae.global_selection import global_topk
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.variants.base import Batch, Setting, Terms, float32_values, plain_gradient, sum_of_squares


@dataclass(frozen=True, slots=True, kw_only=True)
class Auxiliary:
    """The auxiliary loss of one run: dead features reconstruct what the active ones left over."""

    coefficient: float
    k: int
    dead_after_tokens: int
    batch_size: int

    @classmethod
    def create(cls, aux: AuxK | None, setting: Setting) -> Self | None:
        """The loss that a spec asks for, if any."""
        if aux is None:
            return None
        return cls(
            coefficient=aux.coefficient,
            k=setting.k_aux,
            dead_after_tokens=setting.dead_after_tokens,
            batch_size=setting.batch_size,
        )

    def add(self, terms: Terms, batch: Batch, residual: Tensor) -> Terms:
        """Terms with the auxiliary loss, from those of picks; residual is x_hat - x, (tokens, d_out)."""
        assert isinstance(terms.gradient, SparseGradient), "variants that choose k have picks"
        is_dead = batch.n_tokens_since_fired >= self.dead_after_tokens
        if not int(batch.mesh.all_reduce(is_dead.sum(), "features")):
            none = torch.zeros((), dtype=torch.float64, device=residual.device)
            return replace(terms, sums={**terms.sums, "aux_loss": none})
        masked = batch.hidden_pre.masked_fill(~is_dead, -torch.inf)
        picks = global_topk(masked, self.k, batch.mesh, above=-torch.inf)
        picks = float32_values(picks, batch, relu=False)
        error = batch.mesh.all_reduce(batch.kernels.decode(picks, batch.parameters.W_dec), "features") + residual
        coefficient = self.coefficient / self._spread(batch, residual)
        gradient = plain_gradient(picks, batch, error * (2 * coefficient).to(error.dtype))
        loss = coefficient * sum_of_squares(error)
        sums = {**terms.sums, "aux_loss": loss, "objective": terms.sums["objective"] + loss}
        return replace(terms, gradient=_merged(terms.gradient, gradient), sums=sums)

    def _spread(self, batch: Batch, residual: Tensor) -> Tensor:
        """|e - mean e|^2 over the whole batch; never zero, so that a perfect reconstruction gives no NaN."""
        mean = batch.mesh.all_reduce(residual.sum(0), "dp") / self.batch_size
        total = batch.mesh.all_reduce(sum_of_squares(residual - mean), "dp")
        return total.clamp_min(torch.finfo(torch.float64).tiny)


def _merged(main: SparseGradient, aux: SparseGradient) -> SparseGradient:
    """Both in one, the auxiliary rows after the others of their token."""
    n_rows = main.n_rows + 1
    d_out = main.residual_gradients.shape[1]
    both = [main.residual_gradients.view(-1, main.n_rows, d_out), aux.residual_gradients[:, None]]
    rows = torch.cat([main.rows + main.tokens, aux.tokens * n_rows + main.n_rows])
    rows, order = rows.sort(stable=True)
    return replace(
        main,
        features=torch.cat([main.features, aux.features])[order],
        tokens=rows // n_rows,
        rows=rows,
        values=torch.cat([main.values, aux.values])[order],
        gradients=torch.cat([main.gradients, aux.gradients])[order],
        residual_gradients=torch.cat(both, dim=1).view(-1, d_out),
        n_rows=n_rows,
        only_active=False,
        has_auxiliary=True,
    )
