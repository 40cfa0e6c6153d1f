"""What a dispatcher holds: leases, the jobs under them, and how long a lost job waits."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gnomon.resources import JobKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to write for one attempt at one job."""

    job_id: str
    attempt: int
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldJob:
    """A job under lease, as it was when it was claimed or adopted."""

    lease: Lease
    project: str
    kind: JobKind
    spec: Mapping[str, Any]
    store_id: str
    dictionary_id: str | None
    is_running: bool
    """Whether its attempt was started on the cluster for certain."""
    last_report_seq: int
    """Reports up to this one are stored."""
    places: tuple[str, ...] = ()
    """The node of each device that it holds."""
    mesh: tuple[int, int] | None = None
    """(dp, features) of a training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is wanted of a job that runs."""

    cancel_requested: bool
    deadline_passed: bool
    leave_why: str | None = None
    """Why it shall save what it has and leave; None where it shall not."""
    places: tuple[str, ...] | None = None
    """Devices that it shall hold, where they are others than it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a job is to run."""

    places: tuple[str, ...] = ()
    """The node of each device."""
    mesh: tuple[int, int] | None = None
    """(dp, features) of a training."""
    guest_for_s: float | None = None
    """The devices are promised to another job after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Pauses between attempts: base_s * 2^(losses - 1), at most cap_s, times a random 0.5 to 1."""

    base_s: float = 1.0
    cap_s: float = 60.0

    def delay_s(self, n_losses: int) -> float:
        """Pause after so many losses in a row."""
        full = min(self.cap_s, self.base_s * 2.0 ** min(n_losses - 1, 32))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
