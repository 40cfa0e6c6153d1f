"""What the release before the scheduler (schema 0002) reads and writes, in plain SQL and in its columns alone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, text

from gnomon.resources import TERMINAL_STATES
from gnomon_service.db.engine import Database
from gnomon_service.jobs.ids import make_id
from tests.support.service_jobs import DICTIONARY_RECORD, PROJECT, STORE_RECORD, store_id

REVISION: Final = "0002"
COLUMNS: Final = (
    "id, project, kind, name, state, priority, spec, store_id, dictionary_id, made_for, attempt, max_attempts, "
    "n_losses, not_before, deadline_at, cancel_requested, lease_owner, lease_until, created_at, started_at, "
    "finished_at, progress, error_code, error_message, result, n_events, idempotency_key, body_hash"
)
_BEFORE: Final = {"scheduled": "queued", "running": "scheduled"} | dict.fromkeys(TERMINAL_STATES, "running")
_GOLDEN: Final = Path(__file__).parents[1] / "golden" / "0.1"
_NOW: Final = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "(extract(epoch from clock_timestamp())::double precision)",
}
_READY: Final = """
    SELECT id FROM jobs WHERE state = 'queued' AND not_before <= :now
    AND NOT EXISTS (SELECT 1 FROM job_dependencies AS d JOIN jobs AS n ON n.id = d.depends_on
                    WHERE d.job_id = jobs.id AND n.state <> 'succeeded')
    AND NOT EXISTS (SELECT 1 FROM attempts AS a JOIN jobs AS o ON o.id = a.job_id WHERE NOT a.released
                    AND (o.id = jobs.id OR (o.kind = 'harvest' AND jobs.kind = 'harvest'
                         AND o.project = jobs.project AND o.store_id = jobs.store_id)))
    ORDER BY priority DESC, created_at LIMIT 1
"""


def spec_of(kind: str) -> dict[str, Any]:
    """A spec as that release wrote it, on the smallest mesh."""
    spec: dict[str, Any] = json.loads((_GOLDEN / f"{kind}_spec.json").read_text())
    return spec | {"mesh": {"dp": 1, "features": 1}} if kind == "train" else spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A job as it was claimed."""

    id: str
    attempt: int
    kind: str
    store_id: str
    dictionary_id: str | None


class OldRelease:
    """Both sides of the old queue."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(self, key: str, n_stores: int) -> str:
        """Queue the one request that comes with a key; the same key gives the same job."""
        choice = random.Random(key)
        store = store_id(choice.randint(1, n_stores))
        kind = choice.choice(("harvest", "train"))
        with self._database.write() as connection:
            if self._database.dialect == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(7600002)"))
            same = {"project": PROJECT, "key": key}
            found = self._ask(
                connection, "SELECT id FROM jobs WHERE project = :project AND idempotency_key = :key", same
            )
            if found:
                return str(found[0]["id"])
            return self._insert(connection, kind, store, key)

    def claim(self, owner: str, lease_s: float, *, job_id: str | None = None) -> Taken | None:
        """Take the first job that is ready, or one that must be; None where none is."""
        with self._database.write() as connection:
            found = self._ask(connection, _READY + self._locking("SKIP LOCKED")) if job_id is None else [{"id": job_id}]
            if not found:
                return None
            values = {"owner": owner, "lease_s": lease_s}
            sets = "attempt = attempt + 1, lease_owner = :owner, lease_until = :now + :lease_s"
            row = self._move(connection, found[0]["id"], "scheduled", sets, values, told={"owner": owner})
            key = {"id": row["id"], "attempt": row["attempt"], "owner": owner}
            self._ask(
                connection,
                "INSERT INTO attempts (job_id, attempt, lease_owner, state, last_report_seq, started_at, released) "
                "VALUES (:id, :attempt, :owner, 'live', 0, :now, FALSE)",
                key,
            )
            names = ("id", "attempt", "kind", "store_id", "dictionary_id")
            return Taken(**{name: row[name] for name in names})

    def start(self, taken: Taken) -> None:
        """Note that the attempt runs."""
        with self._database.write() as connection:
            self._move(connection, taken.id, "running", "started_at = :now", {})

    def renew(self, taken: Taken, owner: str, lease_s: float) -> bool:
        """Keep the lease; whether it was this owner's."""
        fence = {"id": taken.id, "attempt": taken.attempt, "owner": owner, "lease_s": lease_s}
        with self._database.write() as connection:
            statement = "UPDATE jobs SET lease_until = :now + :lease_s WHERE id = :id AND attempt = :attempt"
            statement += " AND lease_owner = :owner AND state IN ('scheduled', 'running') RETURNING id"
            return bool(self._ask(connection, statement, fence))

    def hand_back(self, taken: Taken, owner: str) -> None:
        """Let a lease pass now."""
        self.renew(taken, owner, -1.0)

    def record(self, taken: Taken, owner: str, told: list[dict[str, Any]], after: int) -> bool:
        """Append what an attempt told after so many reports, if the job is still this owner's; whether it was."""
        fence = {"id": taken.id, "attempt": taken.attempt, "owner": owner, "n": len(told), "last": json.dumps(told[-1])}
        with self._database.write() as connection:
            statement = (
                "UPDATE jobs SET n_events = n_events + :n, progress = :last WHERE id = :id AND attempt = :attempt"
            )
            statement += " AND lease_owner = :owner AND state = 'running' RETURNING n_events"
            found = self._ask(connection, statement, fence)
            if not found:
                return False
            for index, data in enumerate(told, found[0]["n_events"] - len(told) + 1):
                self._event(connection, taken.id, index, taken.attempt, "progress", data)
            seq = {"id": taken.id, "attempt": taken.attempt, "seq": after + len(told)}
            self._ask(
                connection, "UPDATE attempts SET last_report_seq = :seq WHERE job_id = :id AND attempt = :attempt", seq
            )
            return True

    def end(self, taken: Taken, state: str, *, code: str | None = None) -> None:
        """End a job that runs, with what it made."""
        with self._database.write() as connection:
            sets = "finished_at = :now, lease_owner = NULL, lease_until = NULL, error_code = :code"
            self._move(connection, taken.id, state, sets, {"code": code}, told={"code": code} if code else {})
            key = {"id": taken.id, "attempt": taken.attempt, "state": state, "code": code}
            self._ask(
                connection,
                "UPDATE attempts SET state = :state, ended_at = :now, code = :code "
                "WHERE job_id = :id AND attempt = :attempt",
                key,
            )
            if taken.kind == "harvest":
                self._end_store(connection, taken, "sealed" if state == "succeeded" else "failed")
            elif state == "succeeded":
                self._publish(connection, taken)

    def release(self, taken: Taken) -> None:
        """Note that nothing is left of an attempt."""
        key = {"id": taken.id, "attempt": taken.attempt}
        with self._database.write() as connection:
            self._ask(connection, "UPDATE attempts SET released = TRUE WHERE job_id = :id AND attempt = :attempt", key)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every job as that release sees it, by id."""
        with self._database.read() as connection:
            return {row["id"]: row for row in self._ask(connection, f"SELECT {COLUMNS} FROM jobs")}

    # ------------------------------------------------------------------------------------------ statements

    def _insert(self, connection: Connection, kind: str, store: str, key: str) -> str:
        of_store = {"project": PROJECT, "store": store}
        statement = "SELECT state, job_id FROM activation_stores WHERE project = :project AND id = :store"
        known = self._ask(connection, statement + self._locking(), of_store)
        state = known[0]["state"] if known else None
        kind = "train" if known else kind  # no second harvest of what is made already
        job_id = make_id("job")
        self._insert_job(connection, job_id, kind, store, key=key)
        maker = known[0]["job_id"] if state == "harvesting" else job_id
        if kind == "train" and state in (None, "failed"):
            maker = make_id("job")
            self._insert_job(connection, maker, "harvest", store, made_for=job_id)
        if kind == "train" and state != "sealed":
            statement = "INSERT INTO job_dependencies (job_id, depends_on) VALUES (:id, :needed)"
            self._ask(connection, statement, {"id": job_id, "needed": maker})
        if state in (None, "failed"):
            self._ask(
                connection,
                "INSERT INTO activation_stores (project, id, state, job_id, created_at, hooks, location, spec) "
                "VALUES (:project, :store, 'harvesting', :id, :now, '{}', 'file:///store/x', :spec) "
                "ON CONFLICT (project, id) DO UPDATE SET state = 'harvesting', job_id = :id",
                of_store | {"id": maker, "spec": json.dumps(spec_of("harvest"))},
            )
        return job_id

    def _insert_job(
        self,
        connection: Connection,
        job_id: str,
        kind: str,
        store: str,
        *,
        key: str | None = None,
        made_for: str | None = None,
    ) -> None:
        values = {
            "id": job_id,
            "project": PROJECT,
            "kind": kind,
            "spec": json.dumps(spec_of(kind)),
            "store": store,
            "dictionary": make_id("dict") if kind == "train" else None,
            "made_for": made_for,
            "key": key,
            "hash": None if key is None else "0" * 64,
        }
        self._ask(
            connection,
            "INSERT INTO jobs (id, project, kind, name, state, priority, spec, store_id, dictionary_id, made_for, "
            "attempt, max_attempts, not_before, cancel_requested, created_at, n_events, idempotency_key, body_hash) "
            "VALUES (:id, :project, :kind, '', 'queued', 0, :spec, :store, :dictionary, :made_for, "
            "0, 10, 0.0, FALSE, :now, 1, :key, :hash)",
            values,
        )
        self._event(connection, job_id, 1, 0, "state", {"to": "queued"})

    def _move(
        self,
        connection: Connection,
        job_id: str,
        to: str,
        sets: str,
        values: dict[str, Any],
        told: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        key = {"id": job_id, "to": to, "before": _BEFORE[to]}
        statement = f"UPDATE jobs SET n_events = n_events + 1, state = :to, {sets} WHERE id = :id AND state = :before"
        (row,) = self._ask(connection, f"{statement} RETURNING {COLUMNS}", key | values)
        data = {"from": _BEFORE[to], "to": to, **(told or {})}
        self._event(connection, job_id, row["n_events"], row["attempt"], "state", data)
        return row

    def _event(
        self, connection: Connection, job_id: str, number: int, attempt: int, kind: str, data: dict[str, Any]
    ) -> None:
        values = {"id": job_id, "number": number, "attempt": attempt, "kind": kind, "data": json.dumps(data)}
        self._ask(
            connection,
            "INSERT INTO job_events (job_id, id, attempt, kind, created_at, data) "
            "VALUES (:id, :number, :attempt, :kind, :now, :data)",
            values,
        )

    def _end_store(self, connection: Connection, taken: Taken, state: str) -> None:
        values = {
            "project": PROJECT,
            "store": taken.store_id,
            "state": state,
            "hooks": json.dumps(STORE_RECORD["hooks"]),
        }
        self._ask(
            connection,
            "UPDATE activation_stores SET state = :state, hooks = :hooks WHERE project = :project AND id = :store",
            values,
        )

    def _publish(self, connection: Connection, taken: Taken) -> None:
        names = ("hook_name", "d_in", "d_sae", "activation", "alignment", "location")
        values = {name: DICTIONARY_RECORD[name] for name in names}
        values |= {"project": PROJECT, "job": taken.id, "store": taken.store_id}
        for number in range(len(spec_of("train")["variants"])):
            of_variant = {"id": taken.dictionary_id if number == 0 else make_id("dict"), "name": f"variant {number}"}
            self._ask(
                connection,
                "INSERT INTO dictionaries (id, project, job_id, name, created_at, store_id, hook_name, d_in, d_sae, "
                "activation, alignment, location, files, metrics) VALUES (:id, :project, :job, :name, :now, :store, "
                ":hook_name, :d_in, :d_sae, :activation, :alignment, :location, '{}', '{}')",
                values | of_variant,
            )

    def _locking(self, how: str = "") -> str:
        return "" if self._database.dialect == "sqlite" else f" FOR UPDATE {how}"

    def _ask(
        self, connection: Connection, statement: str, values: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        result = connection.execute(text(statement.replace(":now", _NOW[self._database.dialect])), values or {})
        return [dict(row) for row in result.mappings()] if result.returns_rows else []
