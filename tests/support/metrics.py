"""Alignment scores of a made-up dictionary."""

from __future__ import annotations

from typing import Any

from gnomon.metrics import AlignmentMetrics, Histogram


def make_alignment(**fields: Any) -> AlignmentMetrics:
    """Those of a dictionary that is aligned, with some fields as given."""
    scores = dict.fromkeys(("min", "median", "max", "p1", "p10", "p50", "p90", "p99", "mean_cosine"), 1.0)
    rest = {"fraction_below_half": 0.0, "max_deviation": 0.0, "mean_encoder_norm": 1.0}
    histogram = Histogram(edges=(0.5, 1.5), counts=(8.0,))
    return AlignmentMetrics.read({**scores, **rest, "histogram": histogram, **fields})
