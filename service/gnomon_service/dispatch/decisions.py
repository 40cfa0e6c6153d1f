"""What the scheduler is told of running jobs, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from gnomon_service.dispatch.reasons import Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A job that holds devices."""

    job_id: str
    project: str
    tier: int
    priority: int
    places: tuple[str, ...]
    """The node of each member."""
    n_most: int | None = None
    """Of an elastic job, the devices it can make use of; it can go on with one."""
    ends_in_s: float | None = None
    ran_s: float = 0.0
    is_leaving: bool = False
    """It was asked to, and will soon have."""
    gives: tuple[str, ...] = ()
    """Of an elastic job that was told to shrink: devices that it still uses, beside its places."""
    guest_for_s: float | None = None
    """It took room that is promised to another, for so long; negative once it should have gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A job to start."""

    job_id: str
    places: tuple[str, ...]
    guest_for_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """A gang to send away: it saves what it has and is queued again, which costs it no attempt."""

    job_id: str
    why: str


@dataclass(slots=True)
class Decisions:
    """What to do now, and what to say."""

    starts: list[Start] = field(default_factory=list)
    sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Elastic jobs that run -> the places they shall have."""
    leaves: list[Leave] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    """Jobs that stay in the queue, next one first."""
    reasons: dict[str, Reason] = field(default_factory=dict)
    """Why the first of them do."""
