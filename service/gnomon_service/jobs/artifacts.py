"""Rows of activation stores and dictionaries, written in the transaction of the job that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, RowMapping, insert, select, update

from gnomon.errors import Conflict, CorruptArtifact
from gnomon.resources import DictionaryRecord, HarvestResult
from gnomon.specs import HarvestSpec, TrainSpec
from gnomon.specs.base import Document
from gnomon_service.db.engine import database_now
from gnomon_service.db.tables import activation_stores, dictionaries
from gnomon_workers.runtime.protocol import dictionary_ids

_NAME_LENGTH: Final = 128
"""Of a dictionary's name, at most: the database's."""


class HarvestRecord(Document):
    """What a harvest says of the store it sealed."""

    n_rows: int
    n_held_out_rows: int
    n_bytes: int
    hooks: dict[str, int]


def lock_store(connection: Connection, project: str, store_id: str) -> RowMapping | None:
    """The row of a store, locked until the transaction ends; None if the project has no such store."""
    statement = (
        select(activation_stores)
        .where(activation_stores.c.project == project, activation_stores.c.id == store_id)
        .with_for_update()
    )
    return connection.execute(statement).mappings().one_or_none()


def begin_store(
    connection: Connection, project: str, store_id: str, job_id: str, *, spec: HarvestSpec, location: str
) -> None:
    """Note that a job harvests a store, for the first time or again after a failure."""
    values = {"state": "harvesting", "job_id": job_id, "deleted_why": None}
    matched = connection.execute(
        update(activation_stores)
        .where(activation_stores.c.project == project, activation_stores.c.id == store_id)
        .values(**values)
    )
    if matched.rowcount:
        return
    connection.execute(
        insert(activation_stores).values(
            project=project,
            id=store_id,
            created_at=database_now(),
            hooks={},
            location=location,
            spec=spec.model_dump(mode="json"),
            **values,
        )
    )


def keep_store(connection: Connection, job: RowMapping, record: Mapping[str, Any]) -> None:
    """Note what the job's harvest left; raises CorruptArtifact if the record is not one."""
    try:
        fields = HarvestRecord.read(record)
    except ValidationError as error:
        raise _unusable(job, _wrong_fields(error)) from error
    connection.execute(
        update(activation_stores)
        .where(activation_stores.c.project == job["project"], activation_stores.c.id == job["store_id"])
        .values(state="sealed", job_id=job["id"], **fields.model_dump())
    )


def fail_store(connection: Connection, job: RowMapping) -> None:
    """Note that the job that harvested a store came to nothing; a sealed store stays sealed."""
    connection.execute(
        update(activation_stores)
        .where(
            activation_stores.c.project == job["project"],
            activation_stores.c.id == job["store_id"],
            activation_stores.c.job_id == job["id"],
            activation_stores.c.state == "harvesting",
        )
        .values(state="failed")
    )


def check_store_is_there(connection: Connection, job: RowMapping) -> None:
    """Raise Conflict, code "store_deleted" or "store_deleting", where a job's store was sealed and is no more."""
    store = lock_store(connection, job["project"], job["store_id"])
    check_not_deleting(store)
    if store is not None and store["state"] == "deleted":
        raise Conflict(
            f"activation store {job['store_id']!r}, which job {job['id']!r} needs, is gone "
            f"({store['deleted_why'] or 'deleted by a user'}); make it again with 'gnomon clone {store['job_id']}', "
            "then resume",
            code="store_deleted",
        )


def resume_store(connection: Connection, job: RowMapping) -> None:
    """Note that a job which came to nothing harvests its store again; a sealed store stays sealed.

    Raises Conflict, code "store_in_use", where another job makes the store by now.
    """
    store = lock_store(connection, job["project"], job["store_id"])
    check_not_deleting(store)
    if store is None or store["state"] == "sealed":
        return
    if store["state"] == "harvesting" and store["job_id"] != job["id"]:
        raise Conflict(
            f"job {store['job_id']!r} harvests activation store {job['store_id']!r} by now; wait for it, then resume",
            code="store_in_use",
        )
    connection.execute(
        update(activation_stores)
        .where(activation_stores.c.project == job["project"], activation_stores.c.id == job["store_id"])
        .values(state="harvesting", job_id=job["id"])
    )


def check_not_deleting(store: Mapping[Any, Any] | None) -> None:
    """Raise Conflict, code "store_deleting", for a store whose bytes are on their way out."""
    if store is not None and store["state"] == "deleting":
        raise Conflict(
            f"activation store {store['id']!r} is being deleted, which a dispatcher does; try again in a moment",
            code="store_deleting",
        )


def result_of_sealed(store: RowMapping) -> dict[str, Any]:
    """The result of a harvest that had nothing left to do."""
    return HarvestResult(
        store_id=store["id"], n_rows=store["n_rows"], n_held_out_rows=store["n_held_out_rows"], n_tokens=0
    ).model_dump(mode="json")


def attach_metrics(connection: Connection, job: RowMapping, metrics: Mapping[str, Any]) -> None:
    """Add what an evaluate job measured to its dictionary; what was measured before and is not now stays."""
    mine = (dictionaries.c.id == job["dictionary_id"]) & (dictionaries.c.project == job["project"])
    before = connection.execute(select(dictionaries.c.metrics).where(mine).with_for_update()).scalar()
    if before is not None:
        connection.execute(update(dictionaries).where(mine).values(metrics={**before, **metrics}))


def keep_dictionaries(connection: Connection, job: RowMapping, records: Sequence[Mapping[str, Any]]) -> None:
    """Add the dictionaries that a job trained; raises CorruptArtifact if the records are not those of its variants."""
    variants = TrainSpec.read(job["spec"]).variant_names
    if len(records) != len(variants):
        raise _unusable(job, f"{len(records)} records for {len(variants)} dictionaries")
    ids = dictionary_ids(job["dictionary_id"], len(variants))
    for dictionary_id, variant, record in zip(ids, variants, records, strict=True):
        known = {
            "id": dictionary_id,
            "job_id": job["id"],
            "name": _dictionary_name(job["name"], variant),
            "store_id": job["store_id"],
        }
        try:
            fields = DictionaryRecord.read({"created_at": 0, **record, **known})
        except ValidationError as error:
            raise _unusable(job, _wrong_fields(error)) from error
        # the metrics as the workers gave them: those of a newer release may have more
        values = {
            **fields.model_dump(),
            "metrics": record["metrics"],
            "project": job["project"],
            "created_at": database_now(),
        }
        connection.execute(insert(dictionaries).values(values))


def _dictionary_name(job_name: str, variant: str) -> str:
    """The job's name, with the variant's behind it; as much of the former as fits into the column beside the latter."""
    if not (job_name and variant):
        return job_name or variant
    return f"{job_name[: _NAME_LENGTH - 1 - len(variant)]}/{variant}"


def _wrong_fields(error: ValidationError) -> str:
    return ", ".join(".".join(map(str, item["loc"])) for item in error.errors())


def _unusable(job: RowMapping, what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"job {job['id']!r} ended with a record that does not describe what it made (wrong: {what}); "
        "its workers run another version than the service",
        code="invalid_result",
    )
