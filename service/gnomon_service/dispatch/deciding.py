"""One turn of the scheduler: from what the database and the cluster say to what is started, moved and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, bindparam, case, func, or_, select, update

from gnomon.errors import GnomonError
from gnomon.events import Logged
from gnomon.specs.request import CLASSES
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import activation_stores, attempts, cluster, jobs, nodes, projects
from gnomon_service.dispatch import reasons
from gnomon_service.dispatch.asks import Capacity, Demand, demand_of
from gnomon_service.dispatch.decisions import Decisions, Gang, Start
from gnomon_service.dispatch.order import Ask, Share
from gnomon_service.dispatch.reasons import Reason
from gnomon_service.dispatch.room import FreeDevices, Node, Shape
from gnomon_service.dispatch.scheduling import N_TOLD, decide
from gnomon_service.jobs.held import Placement
from gnomon_service.jobs.transitions import add_events, as_row
from gnomon_service.jobs.waiting import Waiting, read_waiting
from gnomon_workers.runtime.protocol import ClusterSnapshot, device_memory_bytes

WINDOW_S: Final = 86_400.0
"""What projects took is counted over so long."""
N_AHEAD: Final = 3
"""Jobs named to one that waits behind them."""
N_LOOKED_UP: Final = 500
"""Specs that are read in one turn: each takes about a millisecond."""
_HELD: Final = ("scheduled", "running")
_Size: TypeAlias = "tuple[int, float | None]"
"""Devices of a cluster on which may be started, and the memory of one."""


@dataclass(slots=True)
class Scheduler:
    """Decides for the whole cluster; only the dispatcher that leads asks it."""

    database: Database
    _demands: dict[tuple[str, _Size], Demand] = field(default_factory=dict)
    """By job and size of the cluster: specs do not change."""

    def turn(self, snapshot: ClusterSnapshot) -> list[tuple[str, Placement]]:
        """What to start, as (job, where); what is moved and told is written down."""
        with self.database.read() as connection:
            waiting = read_waiting(connection)
            seen = _Seen.of(connection, snapshot)
            blocked = {job.id: reason for job in waiting if (reason := reasons.hindrance(job)) is not None}
            open_jobs = {job.id: job for job in waiting if job.id not in blocked}
            in_haste = sorted(open_jobs.values(), key=_haste)
            self._look_up(connection, [*seen.running, *(job.id for job in in_haste)], seen)
        asks = [self._ask(job, seen) for job in open_jobs.values() if self._knows(job.id, seen)]
        gangs = [self._gang(row, seen) for row in seen.running.values()]
        stop = reasons.drained(seen.drained_by) if seen.drained_by else None
        decisions = decide(asks, gangs, seen.nodes, seen.shares, what=seen.what, starts_nothing=stop)
        self._write(decisions, seen)
        self._tell(waiting, decisions, blocked)
        for start in decisions.starts:  # it has a mesh now, which it keeps: what it asks for is another thing
            self._demands.pop((start.job_id, seen.size), None)
        shapes = {ask.job_id: ask.shapes for ask in asks}
        return [
            (start.job_id, _placement(shapes[start.job_id], start, open_jobs[start.job_id].kind))
            for start in decisions.starts
        ]

    # ------------------------------------------------------------------------------------------ what there is

    def _look_up(self, connection: Connection, job_ids: Sequence[str], seen: _Seen) -> None:
        """Read the specs of jobs that are seen for the first time, at most N_LOOKED_UP of them; forget those that went.

        The first of a long queue are known at once, the others some turns later.
        """
        size = seen.size
        self._demands = {key: demand for key, demand in self._demands.items() if key[1] == size}
        known = {job_id for job_id, _ in self._demands}
        for job_id in known.difference(job_ids):
            del self._demands[job_id, size]
        fresh = [job_id for job_id in job_ids if job_id not in known][:N_LOOKED_UP]
        hooks = activation_stores.c.hooks
        joined = jobs.outerjoin(
            activation_stores,
            (activation_stores.c.project == jobs.c.project) & (activation_stores.c.id == jobs.c.store_id),
        )
        columns = (jobs.c.id, jobs.c.kind, jobs.c.spec, jobs.c.mesh, hooks)
        for row in connection.execute(select(*columns).select_from(joined).where(jobs.c.id.in_(fresh))):
            mesh = None if row.mesh is None else (row.mesh[0], row.mesh[1])
            try:
                demand = demand_of(row.kind, row.spec, row.hooks or {}, mesh=mesh, capacity=seen.capacity)
            except (GnomonError, ValueError, LookupError):
                # it cannot be read, or never fits: its attempt says so, on one device, and harms no other job
                demand = Demand(shapes=(Shape(1),))
            self._demands[row.id, size] = demand

    def _knows(self, job_id: str, seen: _Seen) -> bool:
        return (job_id, seen.size) in self._demands

    def _ask(self, job: Waiting, seen: _Seen) -> Ask:
        demand = self._demand_of(job.id, seen)
        return Ask(
            job_id=job.id,
            project=job.project,
            tier=CLASSES.index(job.job_class),
            priority=job.priority,
            waited_s=job.waited_s,
            shapes=demand.shapes,
            n_most=demand.n_most,
            expected_s=job.expected_s,
        )

    def _gang(self, row: Mapping[str, Any], seen: _Seen) -> Gang:
        held, wanted = row["places"] or (), row["places_wanted"]
        places = tuple(held if wanted is None else wanted)
        gives = Counter(held) - Counter(places)
        return Gang(
            job_id=row["id"],
            project=row["project"],
            tier=CLASSES.index(row["job_class"]),
            priority=row["priority"],
            places=places,
            gives=tuple(gives.elements()),
            n_most=self._demand_of(row["id"], seen).n_most,
            ends_in_s=_ends_in_s(row["progress"]),
            ran_s=row["ran_s"] or 0.0,
            is_leaving=row["leave_why"] is not None,
            guest_for_s=row["guest_for_s"],
        )

    def _demand_of(self, job_id: str, seen: _Seen) -> Demand:
        # of what runs more than was looked up: what it holds is known all the same
        return self._demands.get((job_id, seen.size), Demand(shapes=(Shape(1),)))

    # ------------------------------------------------------------------------------------------ what is decided

    def _write(self, decisions: Decisions, seen: _Seen) -> None:
        """Let whoever holds the jobs know that they shall leave, or be of another size."""
        for leave in decisions.leaves:
            with self.database.write() as connection:
                add_events(
                    connection,
                    (jobs.c.id == leave.job_id) & jobs.c.state.in_(_HELD) & jobs.c.leave_why.is_(None),
                    [as_row(Logged(message=f"asked to leave: {leave.why}"))],
                    leave_why=leave.why,
                )
        for job_id, places in decisions.sizes.items():
            is_same = jobs.c.attempt == seen.running[job_id]["attempt"]
            with self.database.write() as connection:
                running = (jobs.c.id == job_id) & jobs.c.state.in_(_HELD) & is_same
                connection.execute(update(jobs).where(running).values(places_wanted=list(places)))

    def _tell(self, waiting: Sequence[Waiting], decisions: Decisions, blocked: Mapping[str, Reason]) -> None:
        """Say of every queued job where it is in the queue and why; only what has changed is written."""
        told = dict.fromkeys(decisions.order, _told(reasons.far_behind(N_TOLD)))
        for position, job_id in enumerate(decisions.order[: len(decisions.reasons)]):
            ahead = decisions.order[max(0, position - N_AHEAD) : position]
            told[job_id] = _told(decisions.reasons[job_id], position=position + 1, ahead=ahead)
        told |= {job_id: _told(reason) for job_id, reason in blocked.items()}
        before = {job.id: job.told for job in waiting}
        changed = [(job_id, words) for job_id, words in told.items() if before[job_id] != words]
        if not changed:
            return
        statement = (
            update(jobs)
            .where(jobs.c.id == bindparam("job"), jobs.c.state == "queued")
            .values(waits_in_queue=bindparam("words"))
        )
        with self.database.write() as connection:
            connection.execute(statement, [{"job": job_id, "words": words} for job_id, words in changed])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The cluster and what runs on it."""

    nodes: list[Node]
    capacity: Capacity
    running: dict[str, Mapping[str, Any]]
    shares: dict[str, Share]
    drained_by: str | None

    @property
    def what(self) -> str:
        """What devices are called."""
        return "GPUs" if self.capacity.device == "gpu" else "cores"

    @property
    def size(self) -> _Size:
        """What jobs' demands depend on."""
        return self.capacity.empty.n_devices, self.capacity.memory_bytes

    @classmethod
    def of(cls, connection: Connection, snapshot: ClusterSnapshot) -> _Seen:
        uses_gpus = snapshot.n_gpus > 0
        drained = select(nodes.c.id).where(nodes.c.drained_by.is_not(None))
        is_drained = set(connection.execute(drained).scalars())
        found = [
            Node(
                id=node.id,
                n_devices=int(node.n_gpus if uses_gpus else node.n_cpus),
                is_drained=node.id in is_drained,
            )
            for node in snapshot.nodes
        ]
        running = _read_running(connection)
        return cls(
            nodes=found,
            capacity=Capacity(
                empty=FreeDevices.of(found),
                device="gpu" if uses_gpus else "cpu",
                memory_bytes=device_memory_bytes(snapshot.nodes, uses_gpus=uses_gpus),
            ),
            running=running,
            shares=_read_shares(connection),
            drained_by=connection.execute(select(cluster.c.drained_by)).scalar(),
        )


def _read_running(connection: Connection) -> dict[str, Mapping[str, Any]]:
    """Jobs that hold devices, by id."""
    is_current = (attempts.c.job_id == jobs.c.id) & (attempts.c.attempt == jobs.c.attempt)
    statement = (
        select(
            jobs.c.id,
            jobs.c.project,
            jobs.c.attempt,
            jobs.c.job_class,
            jobs.c.priority,
            jobs.c.places,
            jobs.c.places_wanted,
            jobs.c.leave_why,
            jobs.c.progress,
            (database_now() - attempts.c.started_at).label("ran_s"),
            (jobs.c.guest_until - database_now()).label("guest_for_s"),
        )
        .select_from(jobs.outerjoin(attempts, is_current))
        .where(jobs.c.state.in_(_HELD))
    )
    return {row["id"]: dict(row) for row in connection.execute(statement).mappings()}


def _read_shares(connection: Connection) -> dict[str, Share]:
    """What projects are owed, and what they took in the window."""
    begin = database_now() - WINDOW_S
    began = case((attempts.c.started_at < begin, begin), else_=attempts.c.started_at)
    took = func.sum(attempts.c.n_devices * (func.coalesce(attempts.c.ended_at, database_now()) - began))
    statement = (
        select(jobs.c.project, took.label("used_s"))
        .select_from(attempts.join(jobs, jobs.c.id == attempts.c.job_id))
        .where(or_(attempts.c.ended_at.is_(None), attempts.c.ended_at > begin))
        .group_by(jobs.c.project)
    )
    used = {row.project: float(row.used_s or 0.0) for row in connection.execute(statement)}
    shares = {project: Share(used_s=used_s) for project, used_s in used.items()}
    for row in connection.execute(select(projects)):
        shares[row.name] = Share(
            weight=row.weight,
            used_s=used.get(row.name, 0.0),
            n_jobs_most=row.n_jobs_most,
            n_devices_most=row.n_devices_most,
        )
    return shares


def _haste(job: Waiting) -> tuple[int, int, float]:
    """Sorts the jobs that are looked up first to the front."""
    return (-CLASSES.index(job.job_class), -job.priority, -job.waited_s)


def _told(reason: Reason, *, position: int | None = None, ahead: Sequence[str] = ()) -> dict[str, Any]:
    return {"position": position, "ahead": list(ahead), "code": reason.code, "message": reason.message}


def _ends_in_s(progress: Mapping[str, Any] | None) -> float | None:
    """When a job will be done, as far as its present phase and its rate tell."""
    if not progress or not progress.get("rate") or not progress.get("total"):
        return None
    return max(0.0, float(progress["total"] - progress["done"]) / float(progress["rate"]))


def _placement(shapes: Sequence[Shape], start: Start, kind: str) -> Placement:
    shape = next((shape for shape in shapes if shape.n_devices == len(start.places)), None)
    mesh = (shape.n_groups, shape.group_size) if kind == "train" and shape is not None else None
    return Placement(places=start.places, mesh=mesh, guest_for_s=start.guest_for_s)
