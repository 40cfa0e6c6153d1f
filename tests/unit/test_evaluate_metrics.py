"""Core metrics: sums over batches give what the whole gives, and the definitions are the stated ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gnomon.specs import Evaluation
from gnomon_workers.evaluate.job import tell_of_short_store, warn_of_few_rows
from gnomon_workers.evaluate.metrics import CoreSums, alignment_metrics, density_histogram, sarle_coefficient, total
from gnomon_workers.runtime.reporting import Reporter
from tests.support.activation_stores import make_counted_store

MEAN = torch.tensor(3.0)
"""Of the activations of `batch`."""


def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations with a mean, sparse features, and a reconstruction that is a little short."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator) + 3
    acts = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.2)
    acts[:, 5] = 0
    return x, acts, 0.9 * x + 0.1 * torch.randn(n, 8, generator=generator)


def test_sums_of_parts_give_the_metrics_of_the_whole() -> None:
    x, acts, hat = batch(1000)
    whole = CoreSums.of(x, acts, hat, mean=MEAN).result(k=4)
    parts = [CoreSums.of(x[i : i + 130], acts[i : i + 130], hat[i : i + 130], mean=MEAN) for i in range(0, 1000, 130)]
    summed = total([None, *parts]).result(k=4)
    assert summed.density_histogram == whole.density_histogram
    numbers = [{k: v for k, v in metrics.known().items() if isinstance(v, int | float)} for metrics in (summed, whole)]
    assert len(numbers[0]) == 13 and numbers[0] == pytest.approx(numbers[1], rel=1e-12, abs=1e-12)
    assert total([None]) is None


def test_metrics_are_as_defined() -> None:
    x, acts, hat = batch(1000)
    metrics = CoreSums.of(x, acts, hat, mean=MEAN).result(k=4)
    assert metrics.fvu is not None and metrics.l0 is not None
    residual = (x - hat).double().square()
    assert metrics.fvu == pytest.approx(float(residual.sum() / (x - x.mean(0)).double().square().sum()), rel=1e-6)
    assert metrics.explained_variance == 1 - metrics.fvu
    assert metrics.mse == pytest.approx(float(residual.mean()), rel=1e-6)
    assert metrics.l0 == pytest.approx(float((acts > 0).sum(1).double().mean()))
    assert metrics.l1 == pytest.approx(float(acts.sum(1).mean()), rel=1e-6)
    assert metrics.cosine == pytest.approx(float(torch.cosine_similarity(x, hat).mean()), rel=1e-5)
    assert metrics.relative_reconstruction_bias == pytest.approx(0.9, abs=0.01)
    assert metrics.n_never_fired == 1 and metrics.fraction_alive == 0.95
    assert metrics.l0_over_k == metrics.l0 / 4


def test_a_few_long_rows_do_not_hide_how_the_others_are_reconstructed() -> None:
    """1 % of the rows, 300 times as long and reconstructed well: they make up the FVU, and not its quantiles."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5000, 8, generator=generator)
    hat = x + 0.4 * torch.randn(5000, 8, generator=generator)
    x[::100] *= 300
    hat[::100] = 0.99 * x[::100]
    metrics = CoreSums.of(x, torch.zeros(5000, 4), hat, mean=torch.zeros(8)).result(k=4)
    ratios = (x - hat).square().sum(1) / x.square().sum(1)
    expected = torch.quantile(ratios, torch.tensor([0.1, 0.5, 0.9])).tolist()
    assert metrics.row_fvu is not None and metrics.fvu is not None
    found = metrics.row_fvu
    assert [found.p10, found.median, found.p90] == pytest.approx(expected, rel=0.03)
    assert metrics.fvu < 0.001 < 0.1 < found.median
    reporter = Reporter()
    warn_of_few_rows(metrics, reporter)
    assert "a few activations carry most of the variance" in reporter.after(0)[0].data["message"]


def test_what_the_store_lacks_of_the_text_asked_for_is_said(tmp_path: Path) -> None:
    store, reporter = make_counted_store(tmp_path), Reporter()  # 60 rows of 20 contexts are held out
    for evaluation in (Evaluation(n_tokens=256, n_ce_tokens=256), Evaluation(n_tokens=300, ce=False)):
        tell_of_short_store(store, evaluation, reporter, has_logits=True)
    assert [report.data["message"] for report in reporter.after(0)] == [
        f"evaluated on {said}: the store holds out no more"
        for said in (
            "60 of n_tokens=256 activations and 80 of n_ce_tokens=256 tokens of text",
            "60 of n_tokens=300 activations",
        )
    ]


def test_joined_hooks_have_an_fvu_each() -> None:
    x, acts, hat = batch(1000)
    found = CoreSums.of(x, acts, hat, mean=MEAN).result(k=4, hooks={"a": 3, "b": 5}).fvu_by_hook
    assert found is not None
    assert found["a"] == pytest.approx(CoreSums.of(x[:, :3], acts, hat[:, :3], mean=MEAN).result(k=4).fvu, rel=1e-9)
    assert found["b"] == pytest.approx(CoreSums.of(x[:, 3:], acts, hat[:, 3:], mean=MEAN).result(k=4).fvu, rel=1e-9)


def test_density_histogram_counts_every_feature_that_fires() -> None:
    histogram = density_histogram(torch.tensor([0.0, 1e-4, 0.01, 0.012, 1.0]))
    assert sum(histogram.counts) == 4
    assert len(histogram.log10_edges) == len(histogram.counts) + 1


def test_alignment_of_orthogonal_and_aligned_features() -> None:
    d = torch.eye(8)
    w = d.clone()
    w[0] = d[1]  # score 0
    metrics = alignment_metrics(w.t(), d)
    assert metrics.min == 0 and metrics.max == 1 and metrics.median == 1
    assert metrics.fraction_below_half == 1 / 8 and metrics.max_deviation == 1
    assert sum(metrics.histogram.counts) == 8
    assert alignment_metrics(d.t(), d).sarle_coefficient is None


def test_sarle_tells_two_modes_from_one() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(5000, generator=generator, dtype=torch.float64)
    two = torch.cat([one[:2500] * 0.1, one[2500:] * 0.1 + 1])
    bimodal, unimodal = sarle_coefficient(two), sarle_coefficient(one)
    assert bimodal is not None and unimodal is not None
    assert unimodal < 5 / 9 < bimodal


def test_what_is_undefined_of_a_single_row_is_unknown() -> None:
    x = torch.ones(1, 4)
    found = CoreSums.of(x, torch.zeros(1, 8), torch.zeros(1, 4), mean=MEAN).result(k=4, hooks={"a": 2, "b": 2})
    assert (found.fvu, found.explained_variance, found.relative_reconstruction_bias) == (None, None, None)
    assert found.fvu_by_hook == {"a": None, "b": None}
    assert (found.n_tokens, found.l0, found.n_never_fired) == (1, 0, 8)
    found.model_dump_json()
