"""What of the store nobody needs any more, and when: read off the database, which knows all that refers to anything.

What the database does not know is never named here: it may belong to another service.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import ColumnElement, Connection, and_, exists, func, or_, select

from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import activation_stores, dictionaries, jobs, projects
from gnomon_service.jobs.deletions import is_unreleased

DAY_S: Final = 86_400.0
Kind = Literal["leftovers", "store", "dictionary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """For how long is kept what somebody may still want."""

    resumable_days: float = 30.0
    """What jobs left that failed or were cancelled; 0 = for ever."""
    store_days: float = 0.0
    """Sealed stores after their last use; 0 = for ever."""
    settled_s: float = 300.0
    """What jobs left that succeeded: a process that was cut off may write for a moment yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Something that may be deleted once its time has come."""

    kind: Kind
    project: str
    id: str
    """Of the job, store or dictionary."""
    why: str
    due_at: float
    """By the database's clock; 0 where its deletion has begun."""
    n_bytes: int | None = None
    """None where the database does not know."""
    found_in: str = ""
    """State of a store; in another it is not what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unused:
    """A sealed store that no job needs."""

    id: str
    n_bytes: int
    used_at: float


def find_garbage(connection: Connection, rules: Rules, *, project: str | None = None) -> list[Garbage]:
    """All that goes, of all projects or of one, soonest first; what is used before its time goes later, or never."""
    now = float(connection.execute(select(database_now())).scalar_one())
    found = [
        *_leftovers(connection, rules, project),
        *_failed_stores(connection, rules, project),
        *_sealed_stores(connection, rules, project, now),
        *_dictionaries(connection, project),
    ]
    soonest: dict[tuple[str, str, str], Garbage] = {}
    for each in sorted(found, key=lambda each: (each.due_at, each.id)):
        soonest.setdefault((each.kind, each.project, each.id), each)
    return list(soonest.values())


def has_begun(connection: Connection) -> bool:
    """Whether there is anything whose deletion somebody waits for."""
    begun = or_(
        exists().where(activation_stores.c.state == "deleting"),
        exists().where(dictionaries.c.state == "deleting", dictionaries.c.purge_at <= database_now()),
        exists().where(jobs.c.leftovers == "deleting"),
    )
    return bool(connection.execute(select(begun)).scalar())


def _leftovers(connection: Connection, rules: Rules, project: str | None) -> Iterator[Garbage]:
    """What jobs that ran left beside their dictionary or store."""
    kept = and_(
        jobs.c.kind.in_(("train", "harvest")),
        jobs.c.leftovers != "deleted",
        jobs.c.state.in_(TERMINAL_STATES),
        jobs.c.attempt > 0,
        # of a harvest that came to nothing the store itself goes
        or_(jobs.c.kind == "train", jobs.c.state == "succeeded"),
        ~is_unreleased(jobs.c.id),
        *_of(jobs.c.project, project),
    )
    columns = (jobs.c.id, jobs.c.project, jobs.c.state, jobs.c.finished_at, jobs.c.leftovers)
    for job in connection.execute(select(*columns).where(kept)):
        wait_s = rules.settled_s if job.state == "succeeded" else _days(rules.resumable_days)
        due_at = 0.0 if job.leftovers == "deleting" else None if wait_s is None else job.finished_at + wait_s
        if due_at is not None:
            why = f"its job {_ended(job.state)}"
            yield Garbage(kind="leftovers", project=job.project, id=job.id, why=why, due_at=due_at)


def _failed_stores(connection: Connection, rules: Rules, project: str | None) -> Iterator[Garbage]:
    """Segments of harvests that came to nothing, and nobody went on with."""
    wait_s = _days(rules.resumable_days)
    if wait_s is None:
        return
    stores = activation_stores
    statement = (
        select(stores.c.id, stores.c.project, jobs.c.state, jobs.c.finished_at)
        .join(jobs, jobs.c.id == stores.c.job_id)
        .where(stores.c.state == "failed", jobs.c.state.in_(TERMINAL_STATES), ~is_unreleased(jobs.c.id))
        .where(*_of(stores.c.project, project))
    )
    for row in connection.execute(statement):
        due_at = row.finished_at + wait_s
        yield _store(row.project, row.id, why=f"its harvest {_ended(row.state)}", due_at=due_at, found_in="failed")


def _sealed_stores(connection: Connection, rules: Rules, project: str | None, now: float) -> Iterator[Garbage]:
    """Stores that are being deleted, that were not used for long, and that are more than their project may have."""
    stores = activation_stores
    sealed = stores.c.state.in_(("sealed", "deleting"))
    columns = (stores.c.id, stores.c.project, stores.c.state, stores.c.n_bytes, stores.c.deleted_why)
    uses = _uses(connection, rules, project, now)
    kept: dict[str, list[_Unused]] = defaultdict(list)
    for row in connection.execute(select(*columns, stores.c.created_at).where(sealed, *_of(stores.c.project, project))):
        used_at, is_needed = uses.get((row.project, row.id), (row.created_at, False))
        if row.state == "deleting":
            why = row.deleted_why or "deleted by a user"
            yield _store(row.project, row.id, row.n_bytes, why=why, due_at=0.0, found_in="deleting")
        elif not is_needed:
            kept[row.project].append(_Unused(id=row.id, n_bytes=row.n_bytes or 0, used_at=used_at))
    for name, unused in kept.items():
        yield from _unused_for_long(name, unused, _days(rules.store_days))
        yield from _above_quota(connection, name, unused, now)


def _unused_for_long(project: str, unused: Iterable[_Unused], wait_s: float | None) -> Iterator[Garbage]:
    if wait_s is None:
        return
    for store in unused:
        why, due_at = f"it was not used for {wait_s / DAY_S:g} days", store.used_at + wait_s
        yield _store(project, store.id, store.n_bytes, why=why, due_at=due_at, found_in="sealed")


def _above_quota(connection: Connection, project: str, unused: Iterable[_Unused], now: float) -> Iterator[Garbage]:
    """The stores used longest ago, until the rest is no more than the project may have."""
    stores = activation_stores
    most = connection.execute(select(projects.c.n_store_bytes_most).where(projects.c.name == project)).scalar()
    if most is None:
        return
    whole = select(func.sum(stores.c.n_bytes)).where(stores.c.project == project, stores.c.state == "sealed")
    n_bytes = int(connection.execute(whole).scalar() or 0)
    for store in sorted(unused, key=lambda store: (store.used_at, store.id)):
        if n_bytes <= most:
            return
        why = f"the project's stores have {n_bytes:,} bytes, and may have {most:,}; it was used longest ago"
        yield _store(project, store.id, store.n_bytes, why=why, due_at=now, found_in="sealed")
        n_bytes -= store.n_bytes


def _uses(
    connection: Connection, rules: Rules, project: str | None, now: float
) -> dict[tuple[str, str], tuple[float, bool]]:
    """When a job last used each store, and whether one still does, or may when it is resumed."""
    wait_s = _days(rules.resumable_days)
    since = 0.0 if wait_s is None else now - wait_s
    resumable = and_(
        jobs.c.kind == "train",
        jobs.c.state.in_(("failed", "cancelled")),
        jobs.c.finished_at > since,
        jobs.c.attempt > 0,
    )
    needed = or_(jobs.c.state.not_in(TERMINAL_STATES), resumable)
    columns = (jobs.c.project, jobs.c.store_id, func.max(func.coalesce(jobs.c.finished_at, now)))
    statement = select(*columns, func.count().filter(needed)).where(*_of(jobs.c.project, project))
    rows = connection.execute(statement.group_by(jobs.c.project, jobs.c.store_id))
    return {(name, store_id): (used_at, n_needing > 0) for name, store_id, used_at, n_needing in rows}


def _dictionaries(connection: Connection, project: str | None) -> Iterator[Garbage]:
    table = dictionaries
    columns = (table.c.id, table.c.project, table.c.deleted_why, table.c.purge_at, table.c.files)
    for row in connection.execute(select(*columns).where(table.c.state == "deleting", *_of(table.c.project, project))):
        yield Garbage(
            kind="dictionary",
            project=row.project,
            id=row.id,
            why=row.deleted_why or "deleted by a user",
            due_at=row.purge_at,
            n_bytes=sum(row.files.values()),
        )


def _store(project: str, store_id: str, n_bytes: int | None = None, **fields: Any) -> Garbage:
    return Garbage(kind="store", project=project, id=store_id, n_bytes=n_bytes, **fields)


def _ended(state: str) -> str:
    return "was cancelled" if state == "cancelled" else state


def _of(column: ColumnElement[str], project: str | None) -> tuple[ColumnElement[bool], ...]:
    return () if project is None else (column == project,)


def _days(days: float) -> float | None:
    return days * DAY_S if days > 0 else None
