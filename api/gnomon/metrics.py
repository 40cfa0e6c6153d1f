"""What is measured, by name: of a step while a dictionary is trained, and of a dictionary on held-out text.

A number that was not measured, or means nothing where it would stand, is None, and is left out of JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Self, cast

from pydantic import GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from gnomon.specs.base import Document


class Measured(Document):
    """Base of all that may have gaps: in JSON, and where it is shown, what is None is not there."""

    def known(self) -> dict[str, Any]:
        """What was measured, by name."""
        return {name: value for name, value in self if value is not None}

    def also(self, other: Self) -> Self:
        """This, and what the other knows besides, or knows better."""
        return type(self)(**{**self.known(), **other.known()})

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return [(name, _rounded(value)) for name, value in self.known().items()]

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """That of the fields, for leaving some out changes none of them."""
        fields = {name: part for name, part in schema.items() if name != "serialization"}
        return super().__get_pydantic_json_schema__(cast("CoreSchema", fields), handler)

    @model_serializer(mode="wrap")
    def _without_gaps(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class StepMetrics(Measured):
    """One step of a training: of its batch alone, but for the alignment scores and running numbers."""

    step: int
    """Steps made, this one included."""
    tokens: int | None = None
    """Activations trained on so far, repeats included."""
    loss: float | None = None
    """Mean over tokens of |x - x_hat|^2, of normalised inputs, without penalties; None if it is no number."""
    objective: float | None = None
    """What is minimised: the loss with all penalties."""
    fvu: float | None = None
    """Fraction of variance unexplained."""
    explained_variance: float | None = None
    """1 - fvu"""
    l0: float | None = None
    """Active features of a token, on average."""
    dead_fraction: float | None = None
    """Share of features that have not fired for dead_after_tokens; None until as many tokens were seen."""
    lr: float | None = None
    """Learning rate of the step."""
    grad_norm: float | None = None
    """Norm of the gradient before clipping."""
    aux_loss: float | None = None
    """The auxiliary loss: of dead features with AuxK, of the gates with "gated"."""
    penalty: float | None = None
    """The sparsity penalty, with its coefficient."""
    threshold: float | None = None
    """"batchtopk" and "matryoshka": moving average of the smallest activation kept, the threshold at inference."""
    density: float | None = None
    """"relu", "jumprelu", "gated" and "p_anneal": share of the features that was active in the step."""
    p: float | None = None
    """"p_anneal": the power of the penalty."""
    l1_coefficient: float | None = None
    """"p_anneal": the penalty's coefficient, rescaled at every change of p."""
    p_penalty: float | None = None
    """"p_anneal": sum of f^p over the steps since p was changed that count for the next change."""
    next_p_penalty: float | None = None
    """"p_anneal": the same with the next p."""
    alignment_min: float | None = None
    """Lowest alignment score <w, d> of any feature."""
    alignment_median: float | None = None
    """Median alignment score."""
    alignment_max: float | None = None
    """Highest alignment score."""


class Costs(Measured):
    """What the steps since the last report took of rank 0."""

    tokens_per_s: float | None = None
    """Activations trained on a second."""
    loader_stall_fraction: float | None = None
    """Share of the time that was spent waiting for activations."""
    times_s: dict[str, float] | None = None
    """Seconds by class of work: gemm, selection, sparse, optimizer, communication, loader."""
    peak_memory_bytes: int | None = None
    """Most memory that the rank ever held."""


class Histogram(Document):
    """Counts between edges, of which there is one more."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return _spread(self.edges, self.counts)


class DensityHistogram(Document):
    """Features by the decimal logarithm of how often they fire; those that never do are left out."""

    log10_edges: tuple[float, ...]
    counts: tuple[float, ...]

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return _spread(self.log10_edges, self.counts)


def _spread(edges: Sequence[float], counts: Sequence[float]) -> list[tuple[str, Any]]:
    """The gist of a histogram, in place of its hundred numbers: how many, and from where to where."""
    filled = [index for index, count in enumerate(counts) if count]
    if not filled or len(edges) != len(counts) + 1:
        return [("count", _rounded(sum(counts)))]
    half = next(index for index, so_far in enumerate(accumulate(counts)) if so_far >= sum(counts) / 2)
    found = {
        "count": sum(counts),
        "low": edges[filled[0]],
        "median": (edges[half] + edges[half + 1]) / 2,
        "high": edges[filled[-1] + 1],
    }
    return [(name, _rounded(value)) for name, value in found.items()]


def _rounded(value: Any) -> Any:
    """A value with at most six digits of each number in it."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


class AlignmentMetrics(Measured):
    """Alignment scores <w, d> over all features, from the weights alone."""

    min: float
    median: float
    max: float
    p1: float
    """First percentile."""
    p10: float
    p50: float
    p90: float
    p99: float
    fraction_below_half: float
    """Share of features with a score below .5."""
    max_deviation: float
    """Largest |score - 1|."""
    sarle_coefficient: float | None = None
    """Sarle's bimodality coefficient; None where all scores are equal up to rounding."""
    mean_cosine: float
    """Mean cosine between encoder and decoder of a feature."""
    mean_encoder_norm: float
    histogram: Histogram

    def __str__(self) -> str:
        return f"{self.min:.7f} to {self.max:.7f}, median {self.median:.7f}"


class RowFvu(Measured):
    """FVU of single activations, |x - x_hat|^2 / |x - mean|^2 with the mean of those trained on: its quantiles.

    Where a few activations are hundreds of times as long as the others, the FVU of all is that of those few.
    """

    p10: float
    median: float
    p90: float


class DictionaryMetrics(Measured):
    """What is known of a dictionary; everything but `dead_fraction` and `alignment` on held-out activations."""

    dead_fraction: float | None = None
    """Share of features that had not fired for dead_after_tokens when training ended; None where that is unknown."""
    n_tokens: int | None = None
    """Held-out activations that were used."""
    fvu: float | None = None
    """Fraction of variance unexplained."""
    explained_variance: float | None = None
    """1 - fvu"""
    mse: float | None = None
    """Mean squared error of an element."""
    cosine: float | None = None
    """Mean cosine between an activation and its reconstruction."""
    l2_ratio: float | None = None
    """Mean of the reconstruction's norm over the activation's."""
    relative_reconstruction_bias: float | None = None
    """sum |x_hat|^2 / sum <x, x_hat>; below 1 where reconstructions are too short."""
    l0: float | None = None
    """Active features of a token, on average."""
    l1: float | None = None
    """Sum of a token's activations, on average."""
    l0_over_k: float | None = None
    """l0 over the k that training aimed at."""
    n_never_fired: int | None = None
    """Features that fired on none of the held-out activations."""
    fraction_alive: float | None = None
    """Share of features that fired."""
    fraction_rare: float | None = None
    """Share of features that fire on less than one activation in 10,000."""
    density_histogram: DensityHistogram | None = None
    """Features by how often they fire."""
    fvu_by_hook: dict[str, float | None] | None = None
    """Of a crosscoder: the FVU of each hook."""
    row_fvu: RowFvu | None = None
    """FVU of single activations, to tell whether a few of them carry the variance."""
    n_predictions: int | None = None
    """Next-token predictions that cross-entropy and KL are means over."""
    ce_original: float | None = None
    """Cross-entropy of the model, nats."""
    ce_patched: float | None = None
    """With reconstructions in place of activations."""
    ce_ablated: float | None = None
    """With zeros in their place."""
    ce_loss_score: float | None = None
    """(ce_ablated - ce_patched) / (ce_ablated - ce_original)"""
    kl: float | None = None
    """KL(original || patched), nats."""
    kl_score: float | None = None
    """1 - kl over the same with zeros."""
    skipped: str | None = None
    """Why there are no metrics of held-out activations."""
    ce_skipped: str | None = None
    """Why there is no cross-entropy."""
    alignment: AlignmentMetrics | None = None
    """None for a transcoder, whose score is undefined."""
    tokens_per_s: dict[str, float | None] | None = None
    """Tokens a second by phase."""
