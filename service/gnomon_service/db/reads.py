"""Rows as the resources that REST returns; every query is confined to one project."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, RowMapping, Select, Table, func, literal, select, tuple_

from gnomon.errors import InvalidRequest, NotFound
from gnomon.resources import (
    ActivationStoreRecord,
    ClusterState,
    DictionaryRecord,
    Event,
    Job,
    JobState,
    Page,
    ProjectState,
)
from gnomon.specs.base import Document
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import (
    activation_stores,
    cluster,
    dictionaries,
    job_dependencies,
    job_events,
    jobs,
    nodes,
    projects,
)

SILENT_S = 20.0
"""A dispatcher that was not seen for so long is taken to be gone; its loop comes round every second."""
R = TypeVar("R", bound=Document)
MAX_PAGE = 200

_LAST_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
"""What lies behind it, as rows of earlier releases may, has no date: one such row would hide all others."""
_TIMES = ("created_at", "started_at", "finished_at", "expires_at", "revoked_at", "seen_at", "purge_at", "collected_at")


def with_times(row: RowMapping) -> dict[str, Any]:
    """A row's columns, with times as datetimes in UTC."""
    values = dict(row)
    for name in _TIMES:
        if values.get(name) is not None:
            values[name] = datetime.fromtimestamp(min(values[name], _LAST_S), UTC)
    return values


# ---------------------------------------------------------------------------------------------- jobs


def read_job(connection: Connection, project: str, job_id: str) -> Job:
    """One job; raises NotFound, also for another project's."""
    row = (
        connection.execute(select(jobs).where(jobs.c.id == job_id, jobs.c.project == project)).mappings().one_or_none()
    )
    if row is None:
        raise _absent("job", job_id)
    return _as_jobs(connection, [row])[0]


def list_jobs(
    connection: Connection,
    project: str,
    *,
    state: JobState | None = None,
    kind: str | None = None,
    cursor: str | None,
    limit: int,
) -> Page[Job]:
    """Jobs, newest first."""
    statement = select(jobs).where(jobs.c.project == project)
    if state is not None:
        statement = statement.where(jobs.c.state == state)
    if kind is not None:
        statement = statement.where(jobs.c.kind == kind)
    rows, next_cursor = _page(connection, statement, jobs, cursor=cursor, limit=limit)
    return Page[Job](items=_as_jobs(connection, rows), next_cursor=next_cursor)


def job_tag(connection: Connection, project: str, job_id: str) -> str:
    """A tag that changes with every change of the job that a user could see; raises NotFound."""
    columns = (jobs.c.n_events, jobs.c.state, jobs.c.waits_in_queue, jobs.c.places, jobs.c.leave_why, jobs.c.paused_by)
    row = connection.execute(select(*columns).where(jobs.c.id == job_id, jobs.c.project == project)).one_or_none()
    if row is None:
        raise _absent("job", job_id)
    no_dispatcher = row.state == "queued" and _no_dispatcher(connection)
    shown = json.dumps([*row[2:], bool(no_dispatcher)], sort_keys=True)
    return f'"{row.n_events}.{zlib.crc32(shown.encode()):08x}"'


def list_events(
    connection: Connection, project: str, job_id: str, *, after: int, limit: int
) -> tuple[list[Event], bool]:
    """Events with an id above `after`, oldest first, and whether the job has ended and these are its last."""
    statement = select(jobs.c.finished_at, jobs.c.n_events).where(jobs.c.id == job_id, jobs.c.project == project)
    job = connection.execute(statement).one_or_none()
    if job is None:
        raise _absent("job", job_id)
    rows = connection.execute(
        select(job_events)
        .where(job_events.c.job_id == job_id, job_events.c.id > after)
        .order_by(job_events.c.id)
        .limit(limit)
    )
    events = [Event.read(with_times(row)) for row in rows.mappings()]
    last = events[-1].id if events else after
    return events, job.finished_at is not None and last >= job.n_events


def read_ends(connection: Connection, job_ids: Collection[str]) -> dict[str, tuple[int, bool]]:
    """How many events each job has, of any project, and whether it has ended; one that is not there is left out."""
    statement = select(jobs.c.id, jobs.c.n_events, jobs.c.finished_at).where(jobs.c.id.in_(job_ids))
    return {row.id: (row.n_events, row.finished_at is not None) for row in connection.execute(statement)}


def _as_jobs(connection: Connection, rows: Sequence[RowMapping]) -> list[Job]:
    needs: dict[str, list[str]] = {}
    statement = (
        select(job_dependencies)
        .where(job_dependencies.c.job_id.in_([row["id"] for row in rows]))
        .order_by(job_dependencies.c.depends_on)
    )
    for job_id, depends_on in connection.execute(statement):
        needs.setdefault(job_id, []).append(depends_on)
    silence = _no_dispatcher(connection) if any(row["state"] == "queued" for row in rows) else None
    return [_as_job(row, needs.get(row["id"], []), silence) for row in rows]


def _no_dispatcher(connection: Connection) -> dict[str, Any] | None:
    """Why every job waits, where no dispatcher was seen for SILENT_S."""
    age_s = dispatcher_age_s(connection)
    if age_s is not None and age_s <= SILENT_S:
        return None
    # to the half minute: the answer is to change, but not with every question
    since = "was ever seen" if age_s is None else f"was seen for {30 * max(1, round(age_s / 30))} s"
    return {"code": "no_dispatcher", "message": f"no dispatcher {since}; start one: jobs wait for it"}


def _as_job(row: RowMapping, depends_on: Sequence[str], silence: Mapping[str, Any] | None) -> Job:
    error = {"code": row["error_code"], "message": row["error_message"] or ""} if row["error_code"] else None
    more: dict[str, Any] = {"depends_on": depends_on, "error": error, "n_devices": len(row["places"] or ())}
    if row["state"] == "queued":
        more["queue"] = silence or row["waits_in_queue"]
    return Job.read({**with_times(row), **more, "remaining_s": _remaining(row)})


def _remaining(row: RowMapping) -> dict[str, float] | None:
    """What is left of a running job's phase, at its last rate, and at the best and the worst that it had."""
    progress = row["progress"] or {}
    if row["state"] != "running" or not progress.get("rate") or not progress.get("total"):
        return None
    left = float(progress["total"] - progress["done"])
    rates = [float(progress.get(name) or progress["rate"]) for name in ("rate", "rate_most", "rate_least")]
    return dict(zip(("expected", "least", "most"), (left / rate for rate in rates), strict=True))


# ---------------------------------------------------------------------------------------------- the rest


def read_store(connection: Connection, project: str, store_id: str) -> ActivationStoreRecord:
    """One activation store; raises NotFound, code "store_not_found"."""
    row = _one(connection, activation_stores, project, store_id)
    if row is None:
        raise _absent("activation store", store_id, code="store_not_found")
    return ActivationStoreRecord.read(with_times(row))


def find_store(connection: Connection, project: str, store_id: str) -> ActivationStoreRecord | None:
    """One activation store, or None."""
    row = _one(connection, activation_stores, project, store_id)
    return None if row is None else ActivationStoreRecord.read(with_times(row))


def list_stores(connection: Connection, project: str, *, cursor: str | None, limit: int) -> Page[ActivationStoreRecord]:
    """Activation stores, newest first."""
    statement = select(activation_stores).where(activation_stores.c.project == project)
    rows, next_cursor = _page(connection, statement, activation_stores, cursor=cursor, limit=limit)
    return Page[ActivationStoreRecord](
        items=[ActivationStoreRecord.read(with_times(row)) for row in rows], next_cursor=next_cursor
    )


def read_dictionary(connection: Connection, project: str, dictionary_id: str) -> DictionaryRecord:
    """One dictionary; raises NotFound, code "dictionary_not_found"."""
    row = _one(connection, dictionaries, project, dictionary_id)
    if row is None:
        raise _absent("dictionary", dictionary_id, code="dictionary_not_found")
    return DictionaryRecord.read(with_times(row))


def list_dictionaries(
    connection: Connection, project: str, *, cursor: str | None, limit: int
) -> Page[DictionaryRecord]:
    """Dictionaries whose files are there, newest first."""
    statement = select(dictionaries).where(dictionaries.c.project == project, dictionaries.c.state != "deleted")
    rows, next_cursor = _page(connection, statement, dictionaries, cursor=cursor, limit=limit)
    return Page[DictionaryRecord](
        items=[DictionaryRecord.read(with_times(row)) for row in rows], next_cursor=next_cursor
    )


def read_cluster(connection: Connection) -> ClusterState:
    """What the dispatcher last saw of the cluster; `seen_at` is None if it never saw one."""
    row = connection.execute(select(cluster)).mappings().one_or_none()
    if row is None:
        return ClusterState()
    found = connection.execute(select(nodes).order_by(nodes.c.name, nodes.c.id)).mappings().all()
    # one that is drained is remembered after it has gone
    there = [dict(node) for node in found if row["seen_at"] is None or node["seen_at"] >= row["seen_at"] - 1.0]
    return ClusterState.read({**with_times(row), "nodes": there})


def read_project(connection: Connection, name: str) -> ProjectState:
    """What a project is owed and may take; one of which nothing was said has what all have."""
    row = connection.execute(select(projects).where(projects.c.name == name)).mappings().one_or_none()
    return ProjectState(name=name) if row is None else ProjectState.read(dict(row))


def dispatcher_age_s(connection: Connection) -> float | None:
    """Seconds since a dispatcher's loop last came round; None if none ever did."""
    return connection.execute(select(database_now() - cluster.c.dispatcher_at)).scalar()


def count_jobs(connection: Connection, project: str) -> dict[tuple[str, str], int]:
    """Number of jobs by (kind, state)."""
    statement = (
        select(jobs.c.kind, jobs.c.state, func.count())
        .where(jobs.c.project == project)
        .group_by(jobs.c.kind, jobs.c.state)
    )
    return {(kind, state): count for kind, state, count in connection.execute(statement)}


def oldest_queued_s(connection: Connection, project: str) -> float:
    """Seconds the oldest waiting job has waited; 0 if none waits."""
    statement = select(func.max(database_now() - jobs.c.created_at)).where(
        jobs.c.project == project, jobs.c.state == "queued"
    )
    return float(connection.execute(statement).scalar() or 0.0)


# ---------------------------------------------------------------------------------------------- pages


def _one(connection: Connection, table: Table, project: str, row_id: str) -> RowMapping | None:
    statement = select(table).where(table.c.id == row_id, table.c.project == project)
    return connection.execute(statement).mappings().one_or_none()


def _page(
    connection: Connection, statement: Select[Any], table: Table, *, cursor: str | None, limit: int
) -> tuple[Sequence[RowMapping], str | None]:
    """Rows, newest first, and the cursor of the next page."""
    place = tuple_(table.c.created_at, table.c.id)
    if cursor is not None:
        created_at, row_id = _decode(cursor)
        statement = statement.where(place < tuple_(literal(created_at), literal(row_id)))
    ordered = statement.order_by(table.c.created_at.desc(), table.c.id.desc())
    rows = connection.execute(ordered.limit(limit + 1)).mappings().all()
    return rows[:limit], _encode(rows[limit - 1]) if len(rows) > limit else None


def _encode(last: RowMapping) -> str:
    place = f"{last['created_at']!r} {last['id']}"
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def _decode(cursor: str) -> tuple[float, str]:
    try:
        place = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError, ValueError):
        place = ""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,20})?) ([a-z]+_[0-9a-z]{1,40})", place)
    if match is None:
        raise InvalidRequest(
            "cursor is not one that this API gave out; pass next_cursor of the page before, or none",
            code="invalid_cursor",
        )
    return float(match.group(1)), match.group(2)


def _absent(what: str, row_id: str, *, code: str | None = None) -> NotFound:
    return NotFound(f"no {what} {row_id!r} in this project; list what there is", code=code)
