"""A cluster in memory that does what the test says; it keeps the promises of the `Cluster` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gnomon_workers.runtime.protocol import (
    Assignment,
    ClusterSnapshot,
    ClusterUnreachable,
    NodeSnapshot,
    Outcome,
    Poll,
    Report,
)

Key = tuple[str, int]


@dataclass
class Attempt:
    """One attempt that the cluster knows."""

    assignment: Assignment
    reports: list[Report] = field(default_factory=list)
    outcome: Outcome | None = None
    cancel_asked: bool = False
    leave_asked: bool = False
    places: tuple[str, ...] | None = None
    """What an elastic attempt says that it holds."""
    wanted: tuple[str, ...] | None = None
    """What it was asked to hold."""
    is_silent: bool = False
    """Its supervisor stands still, while the cluster answers."""

    def report(self, kind: str, **data: Any) -> None:
        """Say something."""
        self.reports.append(Report(seq=len(self.reports) + 1, kind=kind, data=data))

    def end(self, status: Any = "succeeded", result: Mapping[str, Any] | None = None, **fields: str) -> None:
        """Be done."""
        self.outcome = Outcome(status=status, result=result or {}, **fields)


class MemoryCluster:
    """Attempts by (job, attempt)."""

    def __init__(self) -> None:
        self.attempts: dict[Key, Attempt] = {}
        self.killed: list[Key] = []
        self.n_started = 0
        self.is_reachable = True
        self.start_error: Exception | None = None
        self.nodes: tuple[NodeSnapshot, ...] = (NodeSnapshot(id="n", name="node", n_cpus=4, n_gpus=0),)

    @property
    def only(self) -> Attempt:
        """The one attempt that is on the cluster."""
        (attempt,) = self.attempts.values()
        return attempt

    def start(self, assignment: Assignment) -> None:
        self._answer()
        if self.start_error is not None:
            raise self.start_error
        key = (assignment.job_id, assignment.attempt)
        if key not in self.attempts:
            self.n_started += 1
            self.attempts[key] = Attempt(assignment)

    def poll(self, job_id: str, attempt: int, after: int) -> Poll | None:
        self._answer()
        known = self.attempts.get((job_id, attempt))
        if known is None:
            return None
        if known.is_silent:
            raise ClusterUnreachable("the supervisor does not answer")
        return Poll(reports=tuple(known.reports[after:]), outcome=known.outcome, places=known.places)

    def cancel(self, job_id: str, attempt: int) -> None:
        self._answer()
        if (job_id, attempt) in self.attempts:
            self.attempts[job_id, attempt].cancel_asked = True

    def leave(self, job_id: str, attempt: int) -> None:
        self._answer()
        if (job_id, attempt) in self.attempts:
            self.attempts[job_id, attempt].leave_asked = True

    def resize(self, job_id: str, attempt: int, places: tuple[str, ...]) -> None:
        self._answer()
        if (job_id, attempt) in self.attempts:
            self.attempts[job_id, attempt].wanted = places

    def kill(self, job_id: str, attempt: int) -> None:
        self._answer()
        self.attempts.pop((job_id, attempt), None)
        self.killed.append((job_id, attempt))

    def snapshot(self) -> ClusterSnapshot:
        self._answer()
        return ClusterSnapshot(nodes=self.nodes)

    def _answer(self) -> None:
        if not self.is_reachable:
            raise ClusterUnreachable("no answer")
