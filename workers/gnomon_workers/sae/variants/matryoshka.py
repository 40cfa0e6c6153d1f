"""Matryoshka-BatchTopK: nested dictionaries, each the first features of the next (Bussmann et al. 2025).

    loss = mean over prefixes m of |x - x_hat_m|^2,  x_hat_m = b_dec + sum of f_i d_i over features of groups <= m

A feature of group g takes part in the prefixes m >= g, so that its gradients come from the sum of their residuals:
one suffix sum of [tokens, groups, d_out], after which the step is that of any other variant, with a row of residual
gradients for each (token, group). Groups may begin and end anywhere within a shard.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gnomon.specs import Matryoshka
from gnomon_workers.sae.arrays import offsets_of
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.sparse import Picks
from gnomon_workers.sae.variants.base import Batch, Setting, Terms, float32_values, sum_of_squares
from gnomon_workers.sae.variants.topk import BatchTopKVariant, moved_threshold


class MatryoshkaVariant(BatchTopKVariant):
    """Selection and threshold as for BatchTopK; the loss is the mean over nested prefixes."""

    def __init__(self, activation: Matryoshka, setting: Setting) -> None:
        super().__init__(activation, setting)
        self._batch_size = setting.batch_size
        self._bounds = activation.group_bounds(setting.d_sae)

    def terms(self, batch: Batch) -> Terms:
        """The mean over prefixes of the squared error; "loss" is that of the whole dictionary."""
        picks, cut = self._select(batch)
        picks = float32_values(picks, batch)
        grouped = self._by_group(picks, batch.parameters)
        residuals = self._prefix_residuals(grouped, batch)
        n_groups = residuals.shape[1]
        whole = residuals[:, -1] if self._auxiliary is None else residuals[:, -1].clone()
        squares = [sum_of_squares(residuals[:, group]) for group in range(n_groups)]
        gradients = _suffix_sums(residuals, 2 / (self._batch_size * n_groups))
        objective = torch.stack(squares).sum() / (self._batch_size * n_groups)
        terms = Terms(
            gradient=_gradient(grouped, batch, gradients),
            n_active=len(picks.features),
            sums={"loss": squares[-1] / self._batch_size, "objective": objective},
            state=moved_threshold(batch, self._beta, cut),
        )
        return terms if self._auxiliary is None else self._auxiliary.add(terms, batch, whole)

    def _by_group(self, picks: Picks, parameters: Parameters) -> Picks:
        """The same picks with a row for each (token, group): features ascend, so groups lie together."""
        bounds = torch.tensor(self._bounds, device=picks.features.device)
        group = torch.bucketize(picks.features + parameters.start, bounds, right=True)
        n_groups = len(self._bounds)
        rows = picks.token_indices() * n_groups + group
        counts = torch.bincount(rows, minlength=picks.n_tokens * n_groups)
        return replace(picks, offsets=offsets_of(counts), tokens=rows)

    def _prefix_residuals(self, grouped: Picks, batch: Batch) -> Tensor:
        """x_hat_m - x of every prefix m, (tokens, groups, d_out)."""
        parts = batch.mesh.all_reduce(batch.kernels.decode(grouped, batch.parameters.W_dec), "features")
        parts = parts.view(len(batch.targets), len(self._bounds), -1)
        parts[:, 0] -= batch.targets
        for group in range(1, parts.shape[1]):
            parts[:, group] += parts[:, group - 1]
        return parts


def _suffix_sums(rows: Tensor, scale: float) -> Tensor:
    """Of (tokens, groups, d_out) scale times the sum of each group and those after it, in place: what a flipped cumsum
    gives, in a quarter of its time."""
    rows[:, -1].mul_(scale)
    for group in range(rows.shape[1] - 2, -1, -1):
        torch.add(rows[:, group + 1], rows[:, group], alpha=scale, out=rows[:, group])
    return rows


def _gradient(grouped: Picks, batch: Batch, gradients: Tensor) -> SparseGradient:
    n_rows = gradients.shape[1]
    residual_gradients = gradients.reshape(-1, gradients.shape[2])
    rows = grouped.token_indices()
    return SparseGradient(
        features=grouped.features,
        tokens=rows // n_rows,
        rows=rows,
        values=grouped.values,
        gradients=batch.kernels.activation_gradients(grouped, residual_gradients, batch.parameters.W_dec),
        vector_gradients={},
        encoder_inputs=batch.encoder_inputs,
        residual_gradients=residual_gradients,
        n_rows=n_rows,
    )
