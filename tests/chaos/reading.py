"""All that one database tells of its jobs, and what its clients know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Table, select, text

from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import activation_stores, attempts, dictionaries, job_dependencies, job_events, jobs

Row = dict[str, Any]
HELD: Final = ("scheduled", "running")
OF_HOLDERS: Final = ("lease_owner", "lease_until", "places", "places_wanted", "guest_until", "leave_why")
"""Columns that are empty but while an attempt holds the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What clients know: the keys that they sent, and each answer as (key, job)."""

    keys: frozenset[str]
    answers: tuple[tuple[str, str], ...]


@dataclass(slots=True, kw_only=True)
class History:
    """All that one database tells, and what its clients know."""

    jobs: dict[str, Row]
    events: dict[str, list[Row]]
    """By job, in their order."""
    attempts: dict[str, list[Row]]
    """By job, in their order."""
    stores: dict[tuple[str, str], Row]
    """By project and id."""
    dictionaries: list[Row]
    needs: list[tuple[str, str]]
    """(job, what it depends on)."""
    sent: Sent | None
    """None where nobody kept what was sent."""
    read_at: float
    """By the database's clock."""

    def changes(self, job_id: str) -> list[Row]:
        """Events of a job that changed its state."""
        return [event for event in self.events[job_id] if event["kind"] == "state"]

    def has_gaps(self, job_id: str) -> bool:
        """Whether some of the job's events have gone."""
        return len(self.events[job_id]) < int(self.jobs[job_id]["n_events"])


def read_history(database: Database, sent: Sent | None = None) -> History:
    """Read all of a database as it is at one moment, also while it is written to."""
    with database.read() as connection:
        if database.dialect == "postgresql":
            connection.execution_options(isolation_level="REPEATABLE READ")
            # to take in a table of many jobs may take longer than a process may stand still in a transaction
            connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        stores = _rows(connection, activation_stores)
        return History(
            jobs={row["id"]: row for row in _rows(connection, jobs)},
            events=_by_job(_rows(connection, job_events)),
            attempts=_by_job(_rows(connection, attempts)),
            stores={(row["project"], row["id"]): row for row in stores},
            dictionaries=_rows(connection, dictionaries),
            needs=[(row["job_id"], row["depends_on"]) for row in _rows(connection, job_dependencies)],
            sent=sent,
            read_at=connection.execute(select(database_now())).scalar_one(),
        )


def _rows(connection: Connection, table: Table) -> list[Row]:
    statement = select(table).order_by(*table.primary_key.columns)
    return [dict(row) for row in connection.execute(statement).mappings()]


def _by_job(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
