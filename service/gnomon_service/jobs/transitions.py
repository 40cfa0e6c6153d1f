"""Changes of a job's state: a statement, the event beside it, and all that follows, in one transaction.

Whoever changes a job first locks its row, so that on PostgreSQL too all changes of one job come one after
the other and the numbers of its events are given without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, insert, select, update

from gnomon.errors import Conflict
from gnomon.events import TERMINAL_STATES, EventData, JobState, Logged, StateChanged, event_json
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import attempts, job_dependencies, job_events, jobs, legal_transitions
from gnomon_service.jobs.artifacts import (
    attach_metrics,
    check_store_is_there,
    fail_store,
    keep_dictionaries,
    keep_store,
    resume_store,
)

BY_USER = "cancelled by the user"

_ENDED_BY_ITS_SOURCE = frozenset(
    {"bad_text", "empty_corpus", "no_special_token", "token_not_embedded", "too_many_bad_documents", "unknown_field"}
)
"""Codes of harvests that nothing but another text or spec helps; of a changed source, the former may come back."""
_NO_LEASE: Mapping[str, Any] = {
    "lease_owner": None,
    "lease_until": None,
    "places": None,
    "places_wanted": None,
    "guest_until": None,
    "leave_why": None,
}
"""What a job no longer has once no attempt of it runs."""


def move(
    connection: Connection,
    where: ColumnElement[bool],
    to: JobState,
    *,
    data: Mapping[str, Any],
    **values: Any,
) -> RowMapping | None:
    """Give the one job that matches a new state; None where none matches or the change is not legal."""
    held = select(jobs.c.id, jobs.c.state).where(where).with_for_update()
    old = connection.execute(held).one_or_none()
    if old is None:
        return None
    legal = exists().where(legal_transitions.c.from_state == jobs.c.state, legal_transitions.c.to_state == to)
    statement = (
        update(jobs)
        .where(jobs.c.id == old.id, legal)
        .values({"state": to, "n_events": jobs.c.n_events + 1, **values})
        .returning(jobs)
    )
    row = connection.execute(statement).mappings().one_or_none()
    if row is not None:
        _insert_events(connection, row, [as_row(StateChanged(before=old.state, to=to, **data))])
    return row


def as_row(told: EventData) -> tuple[str, dict[str, Any]]:
    """An event as (kind, data)."""
    return told.kind, event_json(told)


def add_events(
    connection: Connection,
    where: ColumnElement[bool],
    events: Sequence[tuple[str, Mapping[str, Any]]],
    **values: Any,
) -> RowMapping | None:
    """Write events, as (kind, data), of the one job that matches; None where none matches."""
    changes = {"n_events": jobs.c.n_events + len(events), **values}
    statement = update(jobs).where(where).values(changes).returning(jobs)
    row = connection.execute(statement).mappings().one_or_none()
    if row is not None:
        _insert_events(connection, row, events)
    return row


def _insert_events(connection: Connection, row: RowMapping, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    if not events:
        return
    first = row["n_events"] - len(events) + 1
    statement = insert(job_events).values(created_at=database_now())
    values = [
        {
            "job_id": row["id"],
            "id": first + index,
            "attempt": row["attempt"],
            "kind": kind,
            "data": clean(dict(data)),
        }
        for index, (kind, data) in enumerate(events)
    ]
    connection.execute(statement, values)


def end(
    connection: Connection,
    where: ColumnElement[bool],
    to: JobState,
    *,
    code: str | None = None,
    message: str | None = None,
    result: Mapping[str, Any] | None = None,
) -> RowMapping | None:
    """Bring the one job that matches to a terminal state, with all that follows; None where none matches.

    `result` is an Outcome's: its `record` or `records` become the activation store or the dictionaries that the
    job made.
    """
    assert to in TERMINAL_STATES
    code, message = clean(code), clean(message)
    shown = {key: value for key, value in (result or {}).items() if key not in ("record", "records")}
    row = move(
        connection,
        where,
        to,
        data={"code": code, "message": message} if code else {},
        finished_at=database_now(),
        error_code=code,
        error_message=message,
        result=clean(shown) if to == "succeeded" else None,
        **_NO_LEASE,
    )
    if row is None:
        return None
    close_attempt(connection, row, to, code=code, message=message)
    if to == "succeeded":
        _keep_result(connection, row, result or {})
    else:
        _give_up(connection, row, to)
    return row


def requeue(
    connection: Connection, where: ColumnElement[bool], *, message: str, delay_s: float, n_losses: int
) -> RowMapping | None:
    """Put the one job that matches back into the queue after an infrastructure loss."""
    data = {"code": "attempt_lost", "message": clean(message), "retry_in_s": round(delay_s, 3)}
    not_before = database_now() + delay_s
    row = move(connection, where, "queued", data=data, not_before=not_before, n_losses=n_losses, **_NO_LEASE)
    if row is not None:
        close_attempt(connection, row, "lost", code="attempt_lost", message=clean(message))
    return row


def put_back(connection: Connection, where: ColumnElement[bool], *, message: str) -> RowMapping | None:
    """Put the one job that matches back into the queue, as its attempt was asked to end: that is no loss of its own."""
    row = move(connection, where, "queued", data={"code": "put_back", "message": clean(message)}, **_NO_LEASE)
    if row is not None:
        close_attempt(connection, row, "left", code="put_back", message=clean(message))
    return row


def close_attempt(
    connection: Connection, row: RowMapping, state: str, *, code: str | None, message: str | None
) -> None:
    """Note how the job's current attempt ended, if it had begun one that is still open."""
    connection.execute(
        update(attempts)
        .where(attempts.c.job_id == row["id"], attempts.c.attempt == row["attempt"], attempts.c.state == "live")
        .values(state=state, ended_at=database_now(), code=code, message=message)
    )


def _keep_result(connection: Connection, row: RowMapping, result: Mapping[str, Any]) -> None:
    if row["kind"] == "train":
        keep_dictionaries(connection, row, clean(result.get("records", [])))
    if row["kind"] == "evaluate":
        attach_metrics(connection, row, clean(result.get("metrics") or {}))
    if row["kind"] != "harvest" or row["attempt"] == 0:
        return
    keep_store(connection, row, clean(dict(result.get("record", {}))))
    for twin in _waiting_for(connection, row["id"]):
        if twin["kind"] == "harvest":
            again = {**result, "n_tokens": 0, "tokens_per_s": None}
            end(connection, jobs.c.id == twin["id"], "succeeded", result=again)


def _give_up(connection: Connection, row: RowMapping, to: JobState) -> None:
    if row["kind"] == "harvest":
        fail_store(connection, row)
    for waiting in _waiting_for(connection, row["id"]):
        message = f"job {row['id']!r}, which this one needs, {'was cancelled' if to == 'cancelled' else 'failed'}"
        if row["error_message"]:
            message += f": {row['error_message']}"
        end(connection, jobs.c.id == waiting["id"], "failed", code="dependency_failed", message=message)
    _abandon(connection, row)


def _waiting_for(connection: Connection, job_id: str) -> Sequence[RowMapping]:
    statement = (
        select(jobs.c.id, jobs.c.kind)
        .join(job_dependencies, job_dependencies.c.job_id == jobs.c.id)
        .where(job_dependencies.c.depends_on == job_id, jobs.c.state == "queued")
        .order_by(jobs.c.id)
    )
    return connection.execute(statement).mappings().all()


def _abandon(connection: Connection, row: RowMapping) -> None:
    """Stop the harvests that were made for this job alone, and that nothing else waits for."""
    needed = jobs.alias()
    other = exists().where(
        job_dependencies.c.depends_on == jobs.c.id,
        job_dependencies.c.job_id == needed.c.id,
        needed.c.state.not_in(TERMINAL_STATES),
    )
    unneeded = select(jobs.c.id).where(jobs.c.made_for == row["id"], jobs.c.state.not_in(TERMINAL_STATES), ~other)
    for job_id in connection.execute(unneeded).scalars().all():
        cancel(connection, jobs.c.id == job_id)


def cancel(connection: Connection, where: ColumnElement[bool]) -> None:
    """Cancel the one job that matches: at once if it waits, else ask its dispatcher to stop it."""
    # or it could go back into the queue after it was found running, and before it was asked to stop
    connection.execute(select(jobs.c.id).where(where).with_for_update())
    waiting = where & (jobs.c.state == "queued")
    if end(connection, waiting, "cancelled", code="cancelled", message=BY_USER) is not None:
        return
    busy = jobs.c.state.in_(("scheduled", "running")) & ~jobs.c.cancel_requested
    add_events(connection, where & busy, [as_row(Logged(message="cancel requested"))], cancel_requested=True)


def resume(connection: Connection, row: RowMapping) -> None:
    """Put a job that failed or was cancelled back into the queue, and what it needs of other jobs before it.

    It goes on from what it had committed; its deadline begins anew. Raises Conflict where another job makes its store,
    and where the job would end again as it did.
    """
    _check_resumable(row)
    needed = select(job_dependencies.c.depends_on).where(job_dependencies.c.job_id == row["id"])
    statement = select(jobs).where(jobs.c.id.in_(needed), jobs.c.state.in_(("failed", "cancelled"))).order_by(jobs.c.id)
    for other in connection.execute(statement.with_for_update()).mappings().all():
        resume(connection, other)
    waits_for = connection.execute(select(jobs.c.id).where(jobs.c.id.in_(needed), jobs.c.state != "succeeded")).first()
    if row["kind"] == "harvest" and waits_for is None:  # else that one makes the store, for both
        resume_store(connection, row)
    if row["kind"] != "harvest" and waits_for is None:
        check_store_is_there(connection, row)
    deadline_at = None
    if row["deadline_at"] is not None:
        deadline_at = database_now() + (row["deadline_at"] - row["created_at"])
    move(
        connection,
        jobs.c.id == row["id"],
        "queued",
        data={"message": "resumed by the user"},
        n_losses=0,
        not_before=0.0,
        deadline_at=deadline_at,
        cancel_requested=False,
        finished_at=None,
        error_code=None,
        error_message=None,
        paused_by=None,
        leftovers="kept",
    )


def _check_resumable(row: RowMapping) -> None:
    """Raise Conflict, code "not_resumable", for a harvest that its own spec or text ended.

    The same ones end it again, and other ones are another store, of which this job has committed nothing. And while
    what the job left is being deleted, code "leftovers_deleting".
    """
    if row["leftovers"] == "deleting":
        raise Conflict(
            f"what job {row['id']!r} left is being deleted, long after it ended; resume it in a moment: it then "
            "begins anew",
            code="leftovers_deleting",
        )
    if row["kind"] == "harvest" and row["error_code"] in _ENDED_BY_ITS_SOURCE:
        raise Conflict(
            f"job {row['id']!r} would fail again as it did, with {row['error_code']!r}: {row['error_message']}; mend "
            "the text or the spec and submit it again, which harvests from the beginning",
            code="not_resumable",
        )


def clean(value: Any) -> Any:
    """The value as both databases and JSON can hold it: no NaN, no infinity, no NUL, no lone surrogate."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.replace("\x00", "").encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value
