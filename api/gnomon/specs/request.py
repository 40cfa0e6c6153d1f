"""What is submitted: a spec of any kind, and what may be said about its job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from gnomon.specs.base import Spec
from gnomon.specs.evaluate import EvaluateSpec
from gnomon.specs.harvest import HarvestSpec
from gnomon.specs.train import TrainSpec

JobSpec = Annotated[HarvestSpec | TrainSpec | EvaluateSpec, Field(discriminator="kind")]


class JobRequest(Spec):
    """Body of POST /v1/jobs."""

    spec: JobSpec
    """What to do."""
    name: Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00-\x1f]*$")] = ""
    """A label for people."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher runs first."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Attempts before infrastructure losses fail the job; an error in the job itself is never retried."""
    deadline_s: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Seconds from submission after which the job is failed; None = no deadline."""
