"""What the scheduler has before it, counted: one project's jobs, and the devices of the whole cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import Connection, Select, func, select

from gnomon_service.db.engine import database_now
from gnomon_service.db.reads import SILENT_S, dispatcher_age_s, read_cluster
from gnomon_service.db.tables import attempts, cluster, jobs

DAY_S: Final = 86_400.0
UNSEEN: Final = "unseen"
"""Why a job waits that the scheduler has not looked at yet."""
_HELD: Final = ("scheduled", "running")


class Queued(NamedTuple):
    """Jobs of one class that wait for the same reason."""

    job_class: str
    code: str
    n_jobs: int
    longest_s: float
    """The longest that one of them has waited, since it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """GPUs, or cores where the cluster has no GPU, whoever has them."""

    device: str
    n_free: int
    n_held: int
    n_drained: int
    """On nodes on which nothing is started, and held by nobody."""
    n_of_project: int
    """Of those that are held."""


def read_queued(connection: Connection, project: str) -> list[Queued]:
    """Queued jobs of a project by class and reason."""
    code = jobs.c.waits_in_queue["code"].as_string().label("code")
    longest = func.max(database_now() - jobs.c.created_at).label("longest_s")
    statement = (
        select(jobs.c.job_class, code, func.count().label("n_jobs"), longest)
        .where(jobs.c.project == project, jobs.c.state == "queued")
        .group_by(jobs.c.job_class, code)
    )
    age_s = dispatcher_age_s(connection)
    is_silent = age_s is None or age_s > SILENT_S
    found: dict[tuple[str, str], Queued] = {}
    for row in connection.execute(statement):
        key = (row.job_class, "no_dispatcher" if is_silent else row.code or UNSEEN)
        other = found.get(key, Queued(*key, 0, 0.0))
        found[key] = Queued(*key, other.n_jobs + row.n_jobs, max(other.longest_s, row.longest_s))
    return list(found.values())


def count_gangs(connection: Connection, project: str) -> dict[tuple[str, str], int]:
    """Jobs of a project that hold devices, by (kind, class)."""
    statement = (
        select(jobs.c.kind, jobs.c.job_class, func.count())
        .where(jobs.c.project == project, jobs.c.state.in_(_HELD))
        .group_by(jobs.c.kind, jobs.c.job_class)
    )
    return {(kind, job_class): n_jobs for kind, job_class, n_jobs in connection.execute(statement)}


def read_devices(connection: Connection, project: str) -> Devices | None:
    """Devices of the cluster as it was last seen; None where none ever was."""
    seen = read_cluster(connection)
    if seen.seen_at is None:
        return None
    held: Counter[str] = Counter()
    n_of_project = 0
    for row in connection.execute(select(jobs.c.project, jobs.c.places).where(jobs.c.state.in_(_HELD))):
        held.update(row.places or ())
        n_of_project += len(row.places or ()) if row.project == project else 0
    idle: Counter[bool] = Counter()
    for node in seen.nodes:
        n_devices = int(node.n_gpus if seen.n_gpus > 0 else node.n_cpus)
        idle[node.drained_by is not None] += max(0, n_devices - held[node.id])
    return Devices(
        device="gpu" if seen.n_gpus > 0 else "cpu",
        n_free=idle[False],
        n_held=held.total(),
        n_drained=idle[True],
        n_of_project=n_of_project,
    )


def leader_lease_s(connection: Connection) -> float | None:
    """Seconds until the lead passes to another dispatcher, negative where it has; None where none leads."""
    statement = select(cluster.c.leader_until - database_now()).where(cluster.c.leader.is_not(None))
    return connection.execute(statement).scalar()


def count_ended_attempts(connection: Connection, project: str) -> dict[str, int]:
    """Attempts of a project that ended within the last day, by how they did."""
    return {row.state: row.n_attempts for row in connection.execute(ended_attempts(project))}


def ended_attempts(project: str) -> Select[tuple[str, int]]:
    """The question for these."""
    lately = attempts.c.ended_at > database_now() - DAY_S
    return (
        select(attempts.c.state, func.count().label("n_attempts"))
        .select_from(attempts.join(jobs, jobs.c.id == attempts.c.job_id))
        # both values are named, so that the index by them serves
        .where(attempts.c.released.in_((True, False)), lately, jobs.c.project == project)
        .group_by(attempts.c.state)
    )
