"""Specs of activations: which features of a dictionary are active, and what it takes to train them so."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeGuard

from pydantic import Field, model_validator

from gnomon.specs.base import Spec


class AuxK(Spec):
    """Auxiliary loss that lets dead features reconstruct the residual (arXiv:2406.04093)."""

    coefficient: Annotated[float, Field(gt=0, le=10)] = 1 / 32
    """Weight of the auxiliary loss."""
    k: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Dead features used per token; None = the power of two nearest d_in / 2."""


class TopK(Spec):
    """Keep the k largest activations of every token (arXiv:2406.04093)."""

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Active features per token."""
    aux: AuxK | None = None
    """Auxiliary loss; off by default because alignment already keeps features alive."""


class BatchTopK(Spec):
    """Keep the k * batch largest activations of the whole batch (arXiv:2412.06410)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Active features per token, on average."""
    threshold_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the smallest kept activation, the threshold used at inference.

    Early in a run the average forgets faster: its memory is at most a tenth of the steps so far.
    """
    aux: AuxK | None = None
    """Auxiliary loss; off by default because alignment already keeps features alive."""


class Matryoshka(Spec):
    """BatchTopK whose first features alone must reconstruct, too: nested dictionaries (Bussmann et al. 2025)."""

    kind: Literal["matryoshka"] = "matryoshka"
    k: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Active features per token, on average."""
    group_fractions: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1, max_length=32)] = (
        1 / 32,
        1 / 16,
        1 / 8,
        1 / 4,
        17 / 32,
    )
    """Shares of the features, in order, that each nested dictionary adds to the one before; they sum to 1."""
    threshold_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the smallest kept activation, as for "batchtopk"."""
    aux: AuxK | None = None
    """Auxiliary loss; off by default because alignment already keeps features alive."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(sum(self.group_fractions) - 1) > 1e-6:
            raise ValueError(f"group_fractions sum to {sum(self.group_fractions):.6g}; they must sum to 1")
        return self

    def group_bounds(self, d_sae: int) -> tuple[int, ...]:
        """End of every group, the last being d_sae; raises ValueError where a group would be empty."""
        ends = [round(sum(self.group_fractions[: i + 1]) * d_sae) for i in range(len(self.group_fractions))]
        if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
            raise ValueError(f"group_fractions leave a group of d_sae={d_sae} features empty; raise d_sae")
        return tuple(ends)


class JumpReLU(Spec):
    """Keep what exceeds a threshold that every feature learns (Rajamanoharan et al. 2024, arXiv:2407.14435).

    Thresholds are trained through a straight-through estimator: a rectangle of width `bandwidth` around them.
    """

    kind: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: Annotated[float, Field(ge=0, le=1e4)] | None = None
    """lambda: of the number of active features per token, or of (L0 / target_l0 - 1)^2 where target_l0 is given.

    None = 0.001 without target_l0, and 1 with it.
    """
    target_l0: Annotated[float, Field(gt=0, le=2**24)] | None = None
    """Active features per token to aim at; None = the plain penalty on their number."""
    bandwidth: Annotated[float, Field(gt=0, le=1)] = 0.001
    """Width of the rectangle, in units of normalised activations (Gemma Scope, arXiv:2408.05147)."""
    initial_threshold: Annotated[float, Field(gt=0, le=10)] = 0.001
    """Threshold that every feature starts from, in the same units (Gemma Scope)."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps over which lambda rises from 0; None = 10,000, or a quarter of a run shorter than 40,000 steps."""


class Gated(Spec):
    """A gate decides which features are active, a magnitude how strongly (Rajamanoharan et al., arXiv:2404.16014)."""

    kind: Literal["gated"] = "gated"
    l1_coefficient: Annotated[float, Field(ge=0, le=1e4)] = 0.04
    """lambda of the sum of positive gates, for normalised inputs; .012 to .08 in the source."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps over which lambda rises from 0; None = a twentieth of the run."""


class ReLU(Spec):
    """Every positive pre-activation is active; a penalty on the activations makes them sparse."""

    kind: Literal["relu"] = "relu"
    l1_coefficient: Annotated[float, Field(ge=0, le=1e4)] = 0.04
    """lambda, for normalised inputs."""
    penalty: Literal["l1", "decoder_norm_l1"] = "l1"
    """"l1": the sum of activations (Bricken et al. 2023); "decoder_norm_l1": of activation times decoder norm
    (Anthropic, April 2024). Decoder rows have norm 1, so the two agree up to rounding."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps over which lambda rises from 0; None = a twentieth of the run (Anthropic, April 2024)."""


class PAnneal(Spec):
    """ReLU with a penalty on the sum of f^p, where p falls during the run (Karvonen et al., arXiv:2408.00113)."""

    kind: Literal["p_anneal"] = "p_anneal"
    l1_coefficient: Annotated[float, Field(ge=0, le=1e4)] = 0.04
    """lambda at p = 1, for normalised inputs; rescaled at every update of p so that the penalty of the
    ten steps before is unchanged."""
    final_p: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The last value of p."""
    n_updates: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Equal steps in which p falls to final_p, spread evenly from start_step to the end of the run."""
    start_step: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Step of the first update; None = 10,000, or a quarter of a run shorter than 40,000 steps."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps over which lambda rises from 0; None = a twentieth of the run."""


Activation = Annotated[
    TopK | BatchTopK | Matryoshka | JumpReLU | Gated | ReLU | PAnneal,
    Field(discriminator="kind"),
]
DEFAULT_LR: dict[str, float] = {"jumprelu": 7e-5, "gated": 5e-5}
"""Peak learning rates that their sources give; those of other activations follow the size of the dictionary."""
LONG_RUN_STEPS = 400_000
"""Steps from which on the peak learning rate no longer depends on the length of the run."""
LARGEST_DEFAULT_LR = 7e-3
"""From here on features die, however short the run."""
DEFAULT_BETAS: dict[str, tuple[float, float]] = {
    "topk": (0.0, 0.99),
    "batchtopk": (0.0, 0.99),
    "matryoshka": (0.0, 0.99),
    "jumprelu": (0.0, 0.999),
    "gated": (0.9, 0.999),
    "relu": (0.9, 0.999),
    "p_anneal": (0.9, 0.999),
}
"""Decays of Adam's moments: by ablation (docs/method.md) where k features are chosen, else those of the sources."""


def chooses_k(activation: Activation) -> TypeGuard[TopK | BatchTopK | Matryoshka]:
    """Whether a given number of features is chosen, by order alone."""
    return isinstance(activation, TopK | BatchTopK | Matryoshka)
