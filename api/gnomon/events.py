"""What happens to a job, by kind: one model for what each kind of event tells.

Workers and the service make these; a client reads them with `event.told`. A kind that this release does not know, or
one of which it cannot read what is told, is an UnknownEvent: never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, ValidationError

from gnomon.metrics import Costs, Measured, StepMetrics

JobState = Literal["queued", "scheduled", "running", "succeeded", "failed", "cancelled"]
TERMINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class EventData(Measured):
    """Base of what events tell; what is None is left out of JSON."""

    kind: ClassVar[str]
    """Kind of the events that tell this."""


class StateChanged(EventData):
    """The job is in another state."""

    kind = "state"
    before: JobState | str | None = Field(
        default=None, validation_alias=AliasChoices("from", "before"), serialization_alias="from"
    )
    """State before; None for the first. "from" in JSON."""
    to: JobState | str
    """State now."""
    code: str | None = None
    """Why, for programs."""
    message: str | None = None
    """Why, for people."""
    retry_in_s: float | None = None
    """When the job may run again after its attempt was lost."""
    owner: str | None = None
    """Dispatcher that took the job."""


class PhaseBegan(EventData):
    """The job does something else from now on."""

    kind = "phase"
    phase: Literal["harvest", "train", "evaluate", "export", "waiting"] | str
    """What it does; "waiting" for a store that is away or full, or for room on the cluster."""
    total: int | None = None
    """Units in this phase, where known."""
    unit: str = "tokens"
    """What is counted."""
    variant: str | None = None
    """Whose phase it is, where a training has variants and the phase is of one alone."""


class Progressed(PhaseBegan):
    """How far the phase is."""

    kind = "progress"
    done: int
    """Units done in this phase."""
    rate: float | None = None
    """Units per second, lately."""
    code: str | None = None
    """What is waited for, for programs: "store_unavailable", "store_full", "no_room" and others."""
    message: str | None = None
    """What is waited for, for people."""


class TrainingMeasured(EventData, StepMetrics, Costs):
    """Metrics of a step, and what the steps since the last report took."""

    kind = "metrics"
    variant: str | None = None
    """The variant that they are of."""


class CheckpointSaved(EventData):
    """A checkpoint is committed: an attempt that comes after goes on from there."""

    kind = "checkpoint"
    step: int
    """Steps made."""
    max_alignment_deviation: float | None = None
    """Largest |score - 1|; None for a transcoder."""
    n_bytes: int
    copy_s: float
    """Seconds for which training stood still."""
    duration_s: float
    """Seconds from the step's end to the commit."""
    variant: str | None = None
    """The variant that it is of."""


class ProfileWritten(EventData):
    """A trace of some steps can be looked at."""

    kind = "profile"
    url: str
    first_step: int
    n_steps: int


class SegmentCommitted(EventData):
    """A segment is part of the activation store."""

    kind = "segment"
    name: str
    split: str
    attempt: int
    """Attempt that harvested it."""
    n_rows: int
    n_tokens: int
    kept: bool
    """Whether it is kept from an earlier attempt."""


class Logged(EventData):
    """Something to read."""

    kind = "log"
    level: Literal["info", "warning", "error"] | str = "info"
    message: str
    owner: str | None = None
    """Dispatcher that the message is about."""


class UnknownEvent(EventData):
    """An event of a kind, or of a form, that this release does not know."""

    kind = "unknown"
    fields: dict[str, Any]
    """What it tells, unread."""


EVENTS: Mapping[str, type[EventData]] = {
    each.kind: each
    for each in (
        *(StateChanged, PhaseBegan, Progressed, TrainingMeasured),
        *(CheckpointSaved, ProfileWritten, SegmentCommitted, Logged),
    )
}
"""What events tell, by their kind."""


def read_event(kind: str, data: Mapping[str, Any]) -> EventData:
    """What an event of any release tells."""
    known = EVENTS.get(kind)
    if known is not None:
        try:
            return known.read(data)
        except ValidationError:
            pass
    return UnknownEvent(fields=dict(data))


def event_json(told: EventData) -> dict[str, Any]:
    """What an event tells, as JSON."""
    return told.model_dump(mode="json", by_alias=True)
