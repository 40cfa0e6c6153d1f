"""A cluster that never was: jobs come, run and leave as the scheduler decides, and every rule is watched."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gnomon_service.dispatch.decisions import Decisions, Gang
from gnomon_service.dispatch.order import Ask, Share
from gnomon_service.dispatch.room import FreeDevices, Node, Shape
from gnomon_service.dispatch.scheduling import decide

LEAVE_S = 5.0
"""What a job takes to save what it has and leave, or to shrink."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a workload."""

    job_id: str
    project: str
    comes_at: float
    work_s: float
    """Device-seconds of an elastic job; else seconds."""
    shapes: tuple[Shape, ...]
    n_most: int | None = None
    tier: int = 1
    priority: int = 0
    guess: float | None = 1.0
    """What its duration is taken to be, as a factor; None where nothing is said of it."""


@dataclass
class Life:
    """What became of a job."""

    job: Job
    left: float
    places: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    gives_at: float = 0.0
    leaves_at: float | None = None
    since: float = 0.0
    first_start: float | None = None
    done_at: float | None = None
    guest_until: float | None = None
    n_starts: int = 0

    @property
    def is_running(self) -> bool:
        return bool(self.places) and self.done_at is None

    @property
    def speed(self) -> float:
        """Work done a second."""
        return float(len(self.places)) if self.job.n_most is not None else 1.0

    def expected_s(self) -> float | None:
        """What is said about how long it will go on."""
        if self.job.guess is None:
            return None
        return self.left / (self.speed if self.places else 1.0) * self.job.guess


@dataclass
class Simulation:
    """Runs a workload to its end."""

    nodes: list[Node]
    jobs: Sequence[Job]
    shares: dict[str, Share] = field(default_factory=dict)
    used_s: Counter[str] = field(default_factory=Counter)
    """Device-seconds by project."""
    now: float = 0.0
    n_decisions: int = 0
    n_leaves: int = 0
    n_resizes: int = 0
    n_guests: int = 0
    stop_at: float = float("inf")

    def __post_init__(self) -> None:
        self.lives = {job.job_id: Life(job, job.work_s) for job in self.jobs}
        self._coming = sorted(self.jobs, key=lambda job: job.comes_at)

    def run(self) -> None:
        """Until every job is done, or it is time to stop."""
        while any(life.done_at is None for life in self.lives.values()) and self.now < self.stop_at:
            self._apply(self._decide())
            self._advance(self._next_event())

    # ------------------------------------------------------------------------------------------ decisions

    def _decide(self) -> Decisions:
        asks = [self._ask(life) for life in self.lives.values() if self._waits(life)]
        gangs = [self._gang(life) for life in self.lives.values() if life.is_running]
        used = {
            project: Share(
                weight=share.weight,
                used_s=self.used_s[project],
                n_jobs_most=share.n_jobs_most,
                n_devices_most=share.n_devices_most,
            )
            for project, share in self.shares.items()
        }
        self.n_decisions += 1
        decisions = decide(asks, gangs, self.nodes, used)
        started = {start.job_id for start in decisions.starts}
        assert started | set(decisions.order) == {ask.job_id for ask in asks}, "every job starts or waits"
        assert len(decisions.order) + len(decisions.starts) == len(asks)
        assert all(decisions.reasons[job_id].message for job_id in decisions.order[:500])
        return decisions

    def _waits(self, life: Life) -> bool:
        return life.done_at is None and not life.places and life.job.comes_at <= self.now

    def _ask(self, life: Life) -> Ask:
        job = life.job
        return Ask(
            job_id=job.job_id,
            project=job.project,
            tier=job.tier,
            priority=job.priority,
            waited_s=self.now - job.comes_at,
            shapes=job.shapes,
            n_most=job.n_most,
            expected_s=life.expected_s(),
        )

    def _gang(self, life: Life) -> Gang:
        job = life.job
        return Gang(
            job_id=job.job_id,
            project=job.project,
            tier=job.tier,
            priority=job.priority,
            places=life.places,
            gives=life.gives,
            n_most=job.n_most,
            ends_in_s=life.expected_s(),
            ran_s=self.now - life.since,
            is_leaving=life.leaves_at is not None,
            guest_for_s=None if life.guest_until is None else life.guest_until - self.now,
        )

    def _apply(self, decisions: Decisions) -> None:
        for leave in decisions.leaves:
            life = self.lives[leave.job_id]
            assert life.leaves_at is None, "nobody is asked twice"
            life.leaves_at = self.now + LEAVE_S
            self.n_leaves += 1
        for job_id, places in decisions.sizes.items():
            life = self.lives[job_id]
            assert life.job.n_most is not None
            assert 1 <= len(places) <= life.job.n_most
            gone = Counter(life.places) - Counter(places)
            if gone:
                life.gives += tuple(gone.elements())
                life.gives_at = self.now + LEAVE_S
            life.places = places
            self.n_resizes += 1
        for start in decisions.starts:
            life = self.lives[start.job_id]
            self._check_shape(life.job, start.places)
            life.places, life.since = start.places, self.now
            life.first_start = self.now if life.first_start is None else life.first_start
            life.guest_until = None if start.guest_for_s is None else self.now + start.guest_for_s
            life.n_starts += 1
            self.n_guests += start.guest_for_s is not None
        self._check_nodes()

    def _check_shape(self, job: Job, places: tuple[str, ...]) -> None:
        if job.n_most is not None:
            assert 1 <= len(places) <= job.n_most
            return
        shape = next(shape for shape in job.shapes if shape.n_devices == len(places))
        for first in range(0, len(places), shape.group_size):
            assert len(set(places[first : first + shape.group_size])) == 1, "a group is on one node"

    def _check_nodes(self) -> None:
        held = Counter(
            node for life in self.lives.values() if life.done_at is None for node in life.places + life.gives
        )
        for node in self.nodes:
            assert held[node.id] <= node.n_devices, f"{node.id} is overcommitted"

    # ------------------------------------------------------------------------------------------ time

    def _next_event(self) -> float:
        times = [job.comes_at for job in self._coming if job.comes_at > self.now][:1]
        for life in self.lives.values():
            if life.is_running:
                times.append(self.now + life.left / life.speed)
                times += [] if life.leaves_at is None else [life.leaves_at]
                times += [life.gives_at] if life.gives else []
                if life.guest_until is not None and life.guest_until > self.now:
                    times.append(life.guest_until + 1e-3)
        assert times, f"nothing runs, and these wait: {[j for j, life in self.lives.items() if life.done_at is None]}"
        return min(times)

    def _advance(self, then: float) -> None:
        passed = then - self.now
        self.now = then
        for life in self.lives.values():
            if life.done_at is not None:
                continue
            self.used_s[life.job.project] += passed * len(life.places + life.gives)  # type: ignore[assignment]
            if life.places:
                life.left -= passed * life.speed
            if life.gives and life.gives_at <= self.now:
                life.gives = ()
            if life.places and life.left <= 1e-6:
                life.done_at, life.places, life.gives = self.now, (), ()
            elif life.leaves_at is not None and life.leaves_at <= self.now:
                life.places, life.gives, life.leaves_at, life.guest_until = (), (), None, None


def lower_bound_s(nodes: Sequence[Node], jobs: Sequence[Job]) -> float:
    """No schedule, with all jobs known beforehand, is done sooner: work over devices, and each job for itself."""
    n_devices = sum(node.n_devices for node in nodes)
    work = sum(job.work_s * (1 if job.n_most is not None else _least(job)) for job in jobs)
    alone = max(job.comes_at + job.work_s / (job.n_most or 1) for job in jobs)
    return max(work / n_devices, alone)


def _least(job: Job) -> int:
    return min(shape.n_devices for shape in job.shapes)


def random_cluster(draw: random.Random) -> list[Node]:
    """One to eight machines of one to eight devices."""
    return [Node(id=f"n{index}", n_devices=draw.choice([1, 2, 4, 8])) for index in range(draw.randint(1, 8))]


def random_jobs(draw: random.Random, nodes: Sequence[Node], n: int) -> list[Job]:
    """Jobs that the cluster can hold, of three projects, of which some are elastic and some are badly guessed."""
    jobs: list[Job] = []
    empty = FreeDevices.of(nodes)
    while len(jobs) < n:
        is_elastic = draw.random() < 0.25
        shape = Shape(1, 1) if is_elastic else Shape(draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 1, 2, 4]))
        if empty.place(shape) is None:
            continue
        jobs.append(
            Job(
                job_id=f"j{len(jobs):04d}",
                project=draw.choice("abc"),
                comes_at=draw.uniform(0, 3000) if draw.random() < 0.7 else 0.0,
                work_s=draw.choice([30, 120, 600, 3000]) * draw.uniform(0.5, 1.5),
                shapes=(shape,),
                n_most=draw.randint(1, 8) if is_elastic else None,
                tier=draw.choices([0, 1, 2], [2, 6, 1])[0],
                priority=draw.choice([-10, 0, 0, 0, 10]),
                guess=draw.choice([None, 1.0, 1.0, 0.3, 2.0]),
            )
        )
    return jobs


def held_by_project(simulation: Simulation) -> dict[str, int]:
    """Devices held now."""
    held: dict[str, int] = defaultdict(int)
    for life in simulation.lives.values():
        if life.is_running:
            held[life.job.project] += len(life.places)
    return held


def backlog(projects: str, *, n: int) -> list[Job]:
    """n jobs of each project, of all sizes, there from the beginning."""
    draw = random.Random(7)
    return [
        Job(
            job_id=f"{project}{index:04d}",
            project=project,
            comes_at=0.0,
            work_s=draw.uniform(100, 900),
            shapes=(Shape(1, draw.choice([1, 1, 2, 4])),),
        )
        for project in projects
        for index in range(n)
    ]
