"""What is submitted: a spec of any kind, and what may be said about its job."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast, get_args

from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

from gnomon.specs.base import Document, Spec
from gnomon.specs.evaluate import EvaluateSpec
from gnomon.specs.harvest import HarvestSpec
from gnomon.specs.train import TrainSpec

JobSpec = Annotated[HarvestSpec | TrainSpec | EvaluateSpec, Field(discriminator="kind")]


class UnknownSpec(Document):
    """A spec that this release cannot read: of a kind, or with a value, that a newer one has."""

    kind: str
    fields: dict[str, Any]
    """The spec as it was submitted, unread."""

    @model_serializer
    def _as_submitted(self) -> dict[str, Any]:
        return self.fields


def _read(data: Any, read: ValidatorFunctionWrapHandler) -> HarvestSpec | TrainSpec | EvaluateSpec | UnknownSpec:
    try:
        return cast("HarvestSpec | TrainSpec | EvaluateSpec | UnknownSpec", read(data))
    except ValidationError:
        if not (isinstance(data, dict) and isinstance(data.get("kind"), str)):
            raise
        return UnknownSpec(kind=data["kind"], fields=data)


AnySpec = Annotated[HarvestSpec | TrainSpec | EvaluateSpec | UnknownSpec, WrapValidator(_read)]
"""The spec of a job that may be of another release."""


JobClass = Literal["spare", "normal", "urgent"]
CLASSES: tuple[JobClass, ...] = get_args(JobClass)
"""From the lowest on: a job of a higher one goes first, and may make those of a lower one give their devices back."""
Priority = Annotated[int, Field(ge=-100, le=100)]


class JobRequest(Spec):
    """Body of POST /v1/jobs."""

    spec: JobSpec
    """What to do."""
    name: Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00-\x1f]*$")] = ""
    """A label for people."""
    job_class: JobClass = "normal"
    """A job of a higher class goes first, and preempts those of lower ones; "urgent" needs a key of scope admin."""
    priority: Priority = 0
    """Of a project's jobs of one class, the higher goes first; 10 minutes of waiting make up for one."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Attempts before infrastructure losses fail the job; an error in the job itself is never retried."""
    deadline_s: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Seconds from submission after which the job is failed; None = no deadline."""


class JobChange(Spec):
    """Body of PATCH /v1/jobs/{id}: what is left out stays as it is."""

    job_class: JobClass | None = None
    priority: Priority | None = None


class ProjectChange(Spec):
    """Body of PATCH /v1/project."""

    is_held: bool
    """Whether nothing of the project is to be started."""


class ClusterChange(Spec):
    """Body of PATCH /v1/cluster and of PATCH /v1/cluster/nodes/{id}."""

    is_drained: bool
    """Whether nothing is to be started there."""
