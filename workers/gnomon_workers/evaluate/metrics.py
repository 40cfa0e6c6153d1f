"""Core metrics. Sums travel, ratios do not: workers add up sums in float64, and the job divides once.

With x an activation, x_hat its reconstruction, and sums over all held-out activations:

    fvu                           sum |x - x_hat|^2 / sum |x - mean|^2, the mean being that of the same activations
    explained_variance            1 - fvu
    mse                           mean over elements of (x - x_hat)^2
    cosine, l2_ratio              mean over activations of cos(x, x_hat), |x_hat| / |x|
    relative_reconstruction_bias  sum |x_hat|^2 / sum <x, x_hat>; below 1 where reconstructions are too short
    l0, l1                        mean over activations of the number, and of the sum, of active features
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from gnomon.metrics import AlignmentMetrics, DensityHistogram, DictionaryMetrics, Histogram, RowFvu

_QUANTILES = {"p1": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_RARE = 1e-4
_ROW_FVU = (-6.0, 3.0, 900)
"""Bins of log10 of a row's FVU: first edge, last edge, number; one is 2.3 % wide."""
_BLOCK = 4096
"""Features whose weights are looked at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSums:
    """Sums over activations; float64 but for the counts."""

    n_rows: Tensor
    """(), int64"""
    x: Tensor
    """(d_in,) sum of the activations."""
    x_squared: Tensor
    """(d_in,)"""
    residual_squared: Tensor
    """(d_in,)"""
    reconstruction_squared: Tensor
    x_dot_reconstruction: Tensor
    cosine: Tensor
    l2_ratio: Tensor
    n_active: Tensor
    """(), int64"""
    l1: Tensor
    n_fired: Tensor
    """(d_sae,) int64: how often each feature fired."""
    row_fvu: Tensor
    """int64: rows by log10 of their own FVU, in bins of _ROW_FVU; a sum over rows, as quantiles are not."""

    @classmethod
    def of(cls, x: Tensor, acts: Tensor, reconstruction: Tensor, *, mean: Tensor) -> Self:
        """Sums over one batch: x and reconstruction (n, d_in), acts (n, d_sae); mean (d_in,) is that of all rows."""
        wide, hat = x.double(), reconstruction.double()
        dot = (wide * hat).sum(1)
        norm, norm_hat = wide.norm(dim=1), hat.norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        fired = acts > 0
        return cls(
            n_rows=torch.tensor(len(x)),
            x=wide.sum(0),
            x_squared=wide.square().sum(0),
            residual_squared=(wide - hat).square().sum(0),
            reconstruction_squared=norm_hat.square().sum(),
            x_dot_reconstruction=dot.sum(),
            cosine=(dot / (norm * norm_hat).clamp_min(tiny)).sum(),
            l2_ratio=(norm_hat / norm.clamp_min(tiny)).sum(),
            n_active=fired.sum(),
            l1=acts.sum(dtype=torch.float64),
            n_fired=fired.sum(0),
            row_fvu=_row_fvu(wide - hat, wide - mean.double()),
        )

    def __add__(self, other: Self) -> Self:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def firing_frequency(self) -> Tensor:
        """(d_sae,) share of the activations on which each feature fires."""
        return self.n_fired.double() / self.n_rows

    def result(self, *, k: int | None, hooks: Mapping[str, int] | None = None) -> DictionaryMetrics:
        """The metrics; k is the sparsity that training aimed at, for the calibration of thresholds.

        hooks are the joined hooks of a crosscoder with their widths: each has an FVU of its own besides.
        """
        n = int(self.n_rows)
        variance = self.x_squared - self.x.square() / n
        fvu = ratio(self.residual_squared.sum(), variance.sum())
        l0 = int(self.n_active) / n
        n_never = int((self.n_fired == 0).sum())
        fvu_by_hook = None
        if hooks is not None:
            residuals, totals = (torch.split(v, list(hooks.values())) for v in (self.residual_squared, variance))
            parts = zip(hooks, residuals, totals, strict=True)
            fvu_by_hook = {name: ratio(residual.sum(), whole.sum()) for name, residual, whole in parts}
        return DictionaryMetrics(
            n_tokens=n,
            fvu=fvu,
            explained_variance=None if fvu is None else 1 - fvu,
            mse=float(self.residual_squared.sum()) / (n * len(self.x)),
            cosine=float(self.cosine) / n,
            l2_ratio=float(self.l2_ratio) / n,
            relative_reconstruction_bias=ratio(self.reconstruction_squared, self.x_dot_reconstruction),
            l0=l0,
            l1=float(self.l1) / n,
            n_never_fired=n_never,
            fraction_alive=1 - n_never / len(self.n_fired),
            fraction_rare=float((self.firing_frequency < _RARE).double().mean()),
            density_histogram=density_histogram(self.firing_frequency),
            l0_over_k=l0 / k if k is not None else None,
            fvu_by_hook=fvu_by_hook,
            row_fvu=_quantiles(self.row_fvu),
        )


def _row_fvu(residual: Tensor, distance: Tensor) -> Tensor:
    """Counts by log10 of |residual|^2 / |distance|^2, both (n, d_in); rows that are the mean are left out."""
    whole = distance.square().sum(1)
    shares = residual.square().sum(1)[whole > 0] / whole[whole > 0]
    low, high, n_bins = _ROW_FVU
    # what lies beyond the ends counts as at them
    return torch.histc(shares.log10().clamp(low, high).cpu(), n_bins, low, high).long()


def _quantiles(counts: Tensor) -> RowFvu | None:
    """Quantiles of row FVU from its counts, by the middles of bins; None where there is no row."""
    low, high, n_bins = _ROW_FVU
    if not int(counts.sum()):
        return None
    below = counts.cumsum(0).double() / counts.sum()
    middles = low + (high - low) / n_bins * (torch.arange(n_bins, dtype=torch.float64) + 0.5)
    at = torch.searchsorted(below, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    p10, median, p90 = (10 ** middles[at]).tolist()
    return RowFvu(p10=p10, median=median, p90=p90)


def ratio(part: Tensor, whole: Tensor) -> float | None:
    """part / whole; None where whole is 0, as the variance of a single row is."""
    return float(part / whole) if float(whole) else None


def density_histogram(firing_frequency: Tensor) -> DensityHistogram:
    """Histogram of log10 of the firing frequency, half a decade a bin; features that never fire are left out."""
    edges = torch.arange(-8, 0.5, 0.5, dtype=torch.float64)
    fired = firing_frequency[firing_frequency > 0].double().log10()
    counts = torch.histogram(fired.cpu(), edges).hist if len(fired) else torch.zeros(len(edges) - 1)
    return DensityHistogram(log10_edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSums:
    """Sums over predictions, in nats: of the model as it is, with reconstructions, and with zeros patched in."""

    n_predictions: int
    ce_original: float
    ce_patched: float
    ce_ablated: float
    kl_patched: float
    """KL(original || patched)"""
    kl_ablated: float

    def __add__(self, other: Self) -> Self:
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def result(self) -> DictionaryMetrics:
        """CE loss score (CE_ablated - CE_patched) / (CE_ablated - CE_original), and the same of KL."""
        n = self.n_predictions
        harm = self.ce_ablated - self.ce_original
        return DictionaryMetrics(
            n_predictions=n,
            ce_original=self.ce_original / n,
            ce_patched=self.ce_patched / n,
            ce_ablated=self.ce_ablated / n,
            ce_loss_score=(self.ce_ablated - self.ce_patched) / harm if harm else None,
            kl=self.kl_patched / n,
            kl_score=1 - self.kl_patched / self.kl_ablated if self.kl_ablated else None,
        )


def alignment_metrics(W_enc: Tensor, W_dec: Tensor) -> AlignmentMetrics:
    """Alignment scores <w, d> of W_enc (d_in, d_sae) and W_dec (d_sae, d_in), from the weights alone."""
    starts = range(0, len(W_dec), _BLOCK)
    return alignment_of_blocks((W_enc[:, start : start + _BLOCK], W_dec[start : start + _BLOCK]) for start in starts)


def alignment_of_blocks(blocks: Iterable[tuple[Tensor, Tensor]]) -> AlignmentMetrics:
    """The same of the columns (d_in, n) and rows (n, d_in) of some features at a time.

    In float64: of all features at once, that would take three times the memory of the weights.
    """
    parts = []
    for columns, rows in blocks:
        w, d = columns.t().double(), rows.double()
        parts.append(torch.stack([(w * d).sum(1), w.norm(dim=1), d.norm(dim=1)]))
    scores, encoder_norms, decoder_norms = torch.cat(parts, dim=1)
    quantiles = torch.quantile(scores[: 1 << 24], torch.tensor(list(_QUANTILES.values()), dtype=torch.float64))
    counts, edges = torch.histogram(scores.cpu(), 40)
    return AlignmentMetrics(
        min=float(scores.min()),
        median=float(scores.median()),
        max=float(scores.max()),
        **dict(zip(_QUANTILES, quantiles.tolist(), strict=True)),
        fraction_below_half=float((scores < 0.5).double().mean()),
        max_deviation=float((scores - 1).abs().max()),
        sarle_coefficient=sarle_coefficient(scores),
        mean_cosine=float((scores / (encoder_norms * decoder_norms).clamp_min(1e-300)).mean()),
        mean_encoder_norm=float(encoder_norms.mean()),
        histogram=Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist())),
    )


def sarle_coefficient(values: Tensor) -> float | None:
    """Sarle's bimodality coefficient, (skewness^2 + 1) / kurtosis; above 5/9 hints at two modes.

    None where all values are equal up to float32 rounding: of an aligned dictionary, there is nothing to judge.
    """
    centred = values - values.mean()
    second = centred.square().mean()
    if second.sqrt() <= 1e-6:
        return None
    skewness = centred.pow(3).mean() / second.pow(1.5)
    kurtosis = centred.pow(4).mean() / second.square()
    return float((skewness.square() + 1) / kurtosis)


def total(sums: Sequence[Any]) -> Any:
    """Add up CoreSums, or PatchSums, of several workers; None where there are none."""
    result = None
    for part in sums:
        if part is not None:
            result = part if result is None else result + part
    return result
