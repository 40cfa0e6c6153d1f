"""In which order waiting jobs are looked at: by class, what their projects are owed, priority and age."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gnomon_service.dispatch.room import Shape

AGE_S: Final = 600.0
"""Waiting for so long counts as one step of priority: of two jobs of a project, the older one's turn comes."""
LIFT_S: Final = 86_400.0
"""Waiting for so long lifts a job by one class in the order (it preempts as what it is): no class waits for ever."""
QUANTUM_S: Final = 3_600.0
"""What a start is taken to cost its project before it is known, by device: a project with as much running waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A job that could be started."""

    job_id: str
    project: str
    tier: int
    """Its class as a number: the higher goes first, and may preempt the lower."""
    priority: int
    waited_s: float
    shapes: tuple[Shape, ...]
    """What it can run on, preferred first; of an elastic job the least that it needs."""
    n_most: int | None = None
    """Of an elastic job, the devices it can make use of; None where it keeps what it started with."""
    expected_s: float | None = None
    """How long it is expected to run; None where nothing is known."""

    @property
    def n_devices(self) -> int:
        """What it would like to start with."""
        return self.shapes[0].n_devices

    @property
    def urgency(self) -> tuple[float, float, str]:
        """Sorts the jobs of one class and project; the least comes first."""
        return (-(self.priority + self.waited_s / AGE_S), -self.waited_s, self.job_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a project is owed, and what it may take at most."""

    weight: float = 1.0
    used_s: float = 0.0
    """Device-seconds that its attempts took in the window."""
    n_jobs_most: int | None = None
    """Jobs that may run at once."""
    n_devices_most: int | None = None
    """Devices that it may hold at once."""


def in_order(asks: Iterable[Ask], shares: Mapping[str, Share], held: Mapping[str, int]) -> Iterator[Ask]:
    """The jobs, each class whole before the next; within one, the project that took least for its weight goes next.

    held: devices that each project holds now.
    """
    tiers: dict[int, dict[str, list[Ask]]] = defaultdict(lambda: defaultdict(list))
    for ask in asks:
        tiers[ask.tier + int(ask.waited_s // LIFT_S)][ask.project].append(ask)
    taken = {project: share.used_s + held.get(project, 0) * QUANTUM_S for project, share in shares.items()}
    for tier in sorted(tiers, reverse=True):
        yield from _fairly(tiers[tier], shares, taken)


def _fairly(by_project: Mapping[str, list[Ask]], shares: Mapping[str, Share], taken: dict[str, float]) -> Iterator[Ask]:
    queues = {project: sorted(asks, key=lambda ask: ask.urgency, reverse=True) for project, asks in by_project.items()}
    turns = [(_owed(project, shares, taken), project) for project in queues]
    heapq.heapify(turns)
    while turns:
        _, project = heapq.heappop(turns)
        ask = queues[project].pop()
        yield ask
        taken[project] = taken.get(project, 0.0) + ask.n_devices * QUANTUM_S
        if queues[project]:
            heapq.heappush(turns, (_owed(project, shares, taken), project))


def _owed(project: str, shares: Mapping[str, Share], taken: Mapping[str, float]) -> float:
    """What a project has taken for its weight: the least is owed most."""
    return taken.get(project, 0.0) / shares.get(project, Share()).weight
