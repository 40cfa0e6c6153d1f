"""Specs of an evaluation: which dictionary is measured, and on how much held-out text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gnomon.specs.base import DictionaryId, Spec


class Evaluation(Spec):
    """What is measured on held-out text once a dictionary is trained."""

    n_tokens: Annotated[int, Field(ge=256, le=10**9)] = 65_536
    """Held-out activations to use at most."""
    ce: bool = True
    """Patch the reconstruction into the model and measure the CE loss score and KL (causal models only)."""
    n_ce_tokens: Annotated[int, Field(ge=256, le=10**9)] = 8_192
    """Held-out tokens to use at most for the CE loss score and KL."""


class EvaluateSpec(Spec):
    """Measure a published dictionary on the held-out text of its own store."""

    kind: Literal["evaluate"] = "evaluate"
    dictionary: DictionaryId
    """The dictionary."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""
