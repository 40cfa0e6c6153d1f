"""What is deleted: first a state, in a transaction; the bytes go later, by the collector, and then the next state.

Where it is cut off between the two, the state says what is still to do.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, exists, select, update

from gnomon.errors import Conflict, NotFound
from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import activation_stores, attempts, dictionaries, jobs
from gnomon_service.jobs.artifacts import lock_store


def begin_store_deletion(
    connection: Connection, project: str, store_id: str, *, why: str, found_in: str | None = None
) -> bool:
    """Note that a store is to be deleted; no harvest of it begins until it is.

    found_in: the state that it must be in, or nothing is done. Returns whether it is to be deleted by now; one that is
    deleted already stays as it is. Raises NotFound, and Conflict, code "store_in_use", while a job that has not ended
    reads or makes it.
    """
    store = lock_store(connection, project, store_id)
    if store is None:
        raise NotFound(f"no activation store {store_id!r} in this project", code="store_not_found")
    user = connection.execute(select(jobs.c.id).where(uses_store(project, store_id)).limit(1)).scalar()
    if user is not None:
        raise Conflict(
            f"activation store {store_id!r} is in use by job {user!r}; wait for it, or cancel it",
            code="store_in_use",
        )
    if found_in is not None and store["state"] != found_in:
        return False
    if store["state"] not in ("deleting", "deleted"):
        _set_store(connection, project, store_id, state="deleting", deleted_why=why)
    return True


def end_store_deletion(connection: Connection, project: str, store_id: str) -> None:
    """Note that a store's bytes are gone: the same harvest makes it anew."""
    _set_store(connection, project, store_id, state="deleted", n_rows=None, n_held_out_rows=None, n_bytes=None)


def uses_store(project: str, store_id: str) -> ColumnElement[bool]:
    """Jobs that have not ended and make or read a store."""
    return (jobs.c.project == project) & (jobs.c.store_id == store_id) & jobs.c.state.not_in(TERMINAL_STATES)


def begin_dictionary_deletion(
    connection: Connection, project: str, dictionary_id: str, *, why: str, grace_s: float
) -> None:
    """Note that a dictionary's files are to be deleted in so many seconds; until then it can be restored.

    Raises NotFound, and Conflict, code "dictionary_in_use", while an evaluation of it has not ended. One whose deletion
    has begun stays as it is.
    """
    found = _lock_dictionary(connection, project, dictionary_id)
    user = connection.execute(select(jobs.c.id).where(_evaluates(dictionary_id)).limit(1)).scalar()
    if user is not None:
        raise Conflict(
            f"dictionary {dictionary_id!r} is being evaluated by job {user!r}; wait for it, or cancel it",
            code="dictionary_in_use",
        )
    if found["state"] == "published":
        values = {"state": "deleting", "deleted_why": why, "purge_at": database_now() + grace_s}
        _set_dictionary(connection, dictionary_id, **values)


def restore_dictionary(connection: Connection, project: str, dictionary_id: str) -> None:
    """Undo a deletion; raises NotFound, and Conflict, code "dictionary_deleted", where its files may be gone."""
    found = _lock_dictionary(connection, project, dictionary_id)
    if found["state"] == "published":
        return
    if found["state"] == "deleted" or found["purge_at"] <= found["now"]:
        raise gone(dictionary_id)
    _set_dictionary(connection, dictionary_id, state="published", deleted_why=None, purge_at=None)


def gone(dictionary_id: str) -> Conflict:
    """What is answered to whoever wants something of a dictionary that was deleted."""
    return Conflict(
        f"dictionary {dictionary_id!r} was deleted; restore it while its files are there, or clone the job that "
        "trained it, which trains it again",
        code="dictionary_deleted",
    )


def may_purge(connection: Connection, project: str, dictionary_id: str) -> bool:
    """Whether the files of a dictionary may be deleted now: its grace is over, and it cannot be restored any more."""
    found = _lock_dictionary(connection, project, dictionary_id)
    is_used = connection.execute(select(exists().where(_evaluates(dictionary_id)))).scalar()
    return found["state"] == "deleting" and found["purge_at"] <= found["now"] and not is_used


def end_dictionary_deletion(connection: Connection, dictionary_id: str) -> None:
    """Note that a dictionary's files are gone."""
    _set_dictionary(connection, dictionary_id, state="deleted")


def begin_leftovers(connection: Connection, job_id: str) -> bool:
    """Note that what an ended job left in the store is being deleted; False where it runs again, or anything of it."""
    job = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).mappings().one()
    if job["leftovers"] == "deleting":
        return True
    if job["state"] not in TERMINAL_STATES or connection.execute(select(is_unreleased(job_id))).scalar():
        return False
    _set_job(connection, job_id, leftovers="deleting")
    return True


def end_leftovers(connection: Connection, job_id: str) -> None:
    """Note that nothing of them is left."""
    _set_job(connection, job_id, leftovers="deleted")


def is_unreleased(job_id: Any) -> ColumnElement[bool]:
    """Whether something of a job's attempts may still be at work on the cluster."""
    return exists().where(attempts.c.job_id == job_id, ~attempts.c.released)


def _evaluates(dictionary_id: str) -> ColumnElement[bool]:
    return (jobs.c.dictionary_id == dictionary_id) & (jobs.c.kind == "evaluate") & jobs.c.state.not_in(TERMINAL_STATES)


def _lock_dictionary(connection: Connection, project: str, dictionary_id: str) -> RowMapping:
    mine = (dictionaries.c.id == dictionary_id) & (dictionaries.c.project == project)
    statement = select(dictionaries, database_now().label("now")).where(mine).with_for_update()
    found = connection.execute(statement).mappings().one_or_none()
    if found is None:
        raise NotFound(f"no dictionary {dictionary_id!r} in this project", code="dictionary_not_found")
    return found


def _set_store(connection: Connection, project: str, store_id: str, **values: Any) -> None:
    mine = (activation_stores.c.project == project) & (activation_stores.c.id == store_id)
    connection.execute(update(activation_stores).where(mine).values(**values))


def _set_dictionary(connection: Connection, dictionary_id: str, **values: Any) -> None:
    connection.execute(update(dictionaries).where(dictionaries.c.id == dictionary_id).values(**values))


def _set_job(connection: Connection, job_id: str, **values: Any) -> None:
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))
