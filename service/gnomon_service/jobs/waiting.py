"""Jobs that wait, and what each of them waits for but room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sqlalchemy import ColumnElement, Connection, Select, and_, exists, func, not_, or_, select, tuple_

from gnomon.resources import JobKind
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import attempts, job_dependencies, jobs, projects


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A queued job, as the scheduler looks at it."""

    id: str
    project: str
    kind: str
    job_class: str
    priority: int
    waited_s: float
    retry_in_s: float
    """Until it may run again after a loss; not positive where it may."""
    waits_for: str | None
    """A job that must succeed first."""
    is_clearing: bool
    """Whether something is left of its last attempt, or of another harvest of its store."""
    paused_by: str | None
    held_by: str | None
    """Who holds its project."""
    mesh: tuple[int, int] | None
    """(dp, features) that its first attempt had."""
    expected_s: float | None
    """How long it is expected to run from its beginning."""
    told: dict[str, Any] | None
    """What was said last of why it waits."""


def read_waiting(connection: Connection) -> list[Waiting]:
    """Every queued job of a kind that this release knows; a newer one's are left to its dispatcher."""
    unmet = _unmet().subquery()
    statement = (
        select(
            jobs.c.id,
            jobs.c.project,
            jobs.c.kind,
            jobs.c.job_class,
            jobs.c.priority,
            (database_now() - jobs.c.created_at).label("waited_s"),
            (jobs.c.not_before - database_now()).label("retry_in_s"),
            unmet.c.waits_for,
            _is_unreleased().label("is_clearing"),
            jobs.c.paused_by,
            projects.c.held_by,
            jobs.c.mesh,
            jobs.c.expected_s,
            jobs.c.waits_in_queue.label("told"),
        )
        .select_from(
            jobs.outerjoin(projects, projects.c.name == jobs.c.project).outerjoin(unmet, unmet.c.job_id == jobs.c.id)
        )
        .where(jobs.c.state == "queued", jobs.c.kind.in_(get_args(JobKind)))
        .order_by(jobs.c.created_at, jobs.c.id)
    )
    return [
        Waiting(**{**row, "is_clearing": bool(row["is_clearing"]), "mesh": _pair(row["mesh"])})
        for row in connection.execute(statement).mappings()
    ]


def is_ready() -> ColumnElement[bool]:
    """Whether a job waits for nothing but room."""
    held = select(projects.c.held_by).where(projects.c.name == jobs.c.project).scalar_subquery()
    return and_(
        jobs.c.kind.in_(get_args(JobKind)),
        jobs.c.state == "queued",
        jobs.c.not_before <= database_now(),
        jobs.c.paused_by.is_(None),
        held.is_(None),
        not_(_needs_any()),
        not_(_is_unreleased()),
    )


def _unmet() -> Select[Any]:
    """Of each job that waits for others, the first of them: asked once for all jobs."""
    needed = jobs.alias()
    return (
        select(job_dependencies.c.job_id, func.min(needed.c.id).label("waits_for"))
        .select_from(job_dependencies.join(needed, job_dependencies.c.depends_on == needed.c.id))
        .where(needed.c.state != "succeeded")
        .group_by(job_dependencies.c.job_id)
    )


def _needs_any() -> ColumnElement[bool]:
    """Whether one job waits for another."""
    needed = jobs.alias()
    return exists().where(
        job_dependencies.c.job_id == jobs.c.id,
        job_dependencies.c.depends_on == needed.c.id,
        needed.c.state != "succeeded",
    )


def _is_unreleased() -> ColumnElement[bool]:
    """Whether anything is left of the last attempt, or of another harvest of the store.

    They would want the same devices and write the same paths. Neither query looks at the job: both are made once, and
    not for each of ten thousand.
    """
    other = jobs.alias()
    of_jobs = select(attempts.c.job_id).where(not_(attempts.c.released))
    of_stores = (
        select(other.c.project, other.c.store_id)
        .select_from(attempts.join(other, other.c.id == attempts.c.job_id))
        .where(not_(attempts.c.released), other.c.kind == "harvest")
    )
    store = tuple_(jobs.c.project, jobs.c.store_id)
    return or_(jobs.c.id.in_(of_jobs), and_(jobs.c.kind == "harvest", store.in_(of_stores)))


def _pair(mesh: Sequence[int] | None) -> tuple[int, int] | None:
    return None if mesh is None else (mesh[0], mesh[1])
