"""What users do to jobs: submit, cancel and resume. What dispatchers do is in `leases`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, text

from gnomon.errors import Conflict
from gnomon.events import StateChanged
from gnomon.resources import TERMINAL_STATES, Job
from gnomon.specs import EvaluateSpec, HarvestSpec, JobRequest, TrainSpec
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.reads import read_job
from gnomon_service.db.tables import activation_stores, job_dependencies, job_events, jobs
from gnomon_service.jobs.artifacts import begin_store, check_not_deleting, lock_store, result_of_sealed
from gnomon_service.jobs.ids import make_id
from gnomon_service.jobs.steering import end_pause
from gnomon_service.jobs.transitions import as_row, cancel, end, resume
from gnomon_storage.digests import combine
from gnomon_storage.layout import ProjectLayout

_SUBMIT_LOCK = 7_600_002


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request that was checked: with these sources, on this store."""

    spec: HarvestSpec | TrainSpec | EvaluateSpec
    """The spec to run; revisions are pinned."""
    store_id: str
    """The store that is harvested, trained on or evaluated against."""
    expected_s: float | None = None
    """How long it is expected to run, once it has its devices; None where nothing is known."""

    @property
    def harvest(self) -> HarvestSpec | None:
        """How to make the store, where the request says so."""
        match self.spec:
            case HarvestSpec():
                return self.spec
            case TrainSpec(activations=HarvestSpec() as harvest):
                return harvest
            case _:
                return None


def hash_body(request: JobRequest) -> str:
    """SHA-256 of what the request asks for; order and spelling of its JSON do not matter."""
    return combine(request.model_dump(mode="json"))


class Queue:
    """Jobs seen from the users' side; every method is confined to one project."""

    def __init__(self, database: Database, *, project_root: str) -> None:
        self._database = database
        self._project_root = project_root

    def find_by_key(self, project: str, idempotency_key: str, request: JobRequest) -> Job | None:
        """The job that this very request made before; raises Conflict if the key came with another."""
        with self._database.read() as connection:
            return _find_by_key(connection, project, idempotency_key, hash_body(request))

    def submit(self, project: str, request: JobRequest, plan: Plan, *, idempotency_key: str | None = None) -> Job:
        """Queue a job, and the harvest it needs where that is neither done nor under way.

        The same idempotency key with the same request gives the same job, also under parallel sends; with
        another request it raises Conflict, code "idempotency_conflict".
        """
        body_hash = hash_body(request)
        with self._database.write() as connection:
            _take_turn(connection, self._database.dialect)
            if idempotency_key is not None:
                same = _find_by_key(connection, project, idempotency_key, body_hash)
                if same is not None:
                    return same
            known = {"idempotency_key": idempotency_key, "body_hash": body_hash}
            job_id = self._insert(connection, project, request, plan, **known)
            return read_job(connection, project, job_id)

    def cancel(self, project: str, job_id: str) -> Job:
        """Stop a job, at once if it waits; a finished job stays as it is. Raises NotFound."""
        with self._database.write() as connection:
            read_job(connection, project, job_id)
            cancel(connection, (jobs.c.id == job_id) & (jobs.c.project == project))
            return read_job(connection, project, job_id)

    def resume(self, project: str, job_id: str) -> Job:
        """Let a paused job go on, or queue one again that failed or was cancelled: it goes on from what it committed.

        Any other job stays as it is. Raises NotFound; Conflict, code "job_succeeded", where there is
        nothing left to do, "store_in_use" where another job makes its activation store by now, or "not_resumable" where
        its text or spec made it, or the harvest that it needs, fail.
        """
        with self._database.write() as connection:
            _take_turn(connection, self._database.dialect)
            read_job(connection, project, job_id)
            row = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).mappings().one()
            if row["state"] == "succeeded":
                raise Conflict(f"job {job_id!r} has succeeded; there is nothing left to do", code="job_succeeded")
            if row["state"] in TERMINAL_STATES:
                resume(connection, row)
            elif row["paused_by"] is not None:
                end_pause(connection, row)
            return read_job(connection, project, job_id)

    def _insert(self, connection: Connection, project: str, request: JobRequest, plan: Plan, **values: Any) -> str:
        job_id = make_id("job")
        common = {
            "project": project,
            "store_id": plan.store_id,
            "job_class": request.job_class,
            "priority": request.priority,
            "max_attempts": request.max_attempts,
            "deadline_at": None if request.deadline_s is None else database_now() + request.deadline_s,
        }
        _lock_maker(connection, project, plan.store_id)
        store = lock_store(connection, project, plan.store_id)
        check_not_deleting(store)
        is_sealed = store is not None and store["state"] == "sealed"
        live = None if store is None or is_sealed else _live_job(connection, store["job_id"])
        _insert_job(
            connection,
            common,
            id=job_id,
            kind=plan.spec.kind,
            name=request.name,
            spec=plan.spec.model_dump(mode="json"),
            dictionary_id=_dictionary_id(plan),
            expected_s=plan.expected_s,
            **values,
        )
        if isinstance(plan.spec, HarvestSpec) and store is not None and is_sealed:
            end(connection, jobs.c.id == job_id, "succeeded", result=result_of_sealed(store))
        elif live is not None:
            _depend(connection, job_id, live)
        elif not is_sealed and plan.harvest is not None:
            self._make_store(connection, common, plan.harvest, job_id, is_harvest=plan.spec is plan.harvest)
        return job_id

    def _make_store(
        self,
        connection: Connection,
        common: Mapping[str, Any],
        harvest: HarvestSpec,
        job_id: str,
        *,
        is_harvest: bool,
    ) -> None:
        """Let the job itself harvest the store, or make a harvest that it depends on."""
        project, store_id = common["project"], common["store_id"]
        harvest_id = job_id
        if not is_harvest:
            harvest_id = make_id("job")
            spec = harvest.model_dump(mode="json")
            _insert_job(connection, common, id=harvest_id, kind="harvest", spec=spec, made_for=job_id)
            _depend(connection, job_id, harvest_id)
        location = ProjectLayout.of(self._project_root, project).store(store_id).url
        begin_store(connection, project, store_id, harvest_id, spec=harvest, location=location)


def _dictionary_id(plan: Plan) -> str | None:
    match plan.spec:
        case TrainSpec():
            return make_id("dict")
        case EvaluateSpec(dictionary=dictionary_id):
            return dictionary_id
        case _:
            return None


def _take_turn(connection: Connection, dialect: str) -> None:
    # SQLite has one writer anyway. Here two requests for one new store, or with one key, must see each other.
    if dialect == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SUBMIT_LOCK})


def _find_by_key(connection: Connection, project: str, key: str, body_hash: str) -> Job | None:
    statement = select(jobs.c.id, jobs.c.body_hash).where(jobs.c.project == project, jobs.c.idempotency_key == key)
    row = connection.execute(statement).one_or_none()
    if row is None:
        return None
    if row.body_hash != body_hash:
        raise Conflict(
            f"Idempotency-Key {key!r} came before with another request, which made job {row.id!r}; "
            "use a new key for a new request",
            code="idempotency_conflict",
        )
    return read_job(connection, project, row.id)


def _lock_maker(connection: Connection, project: str, store_id: str) -> None:
    """Lock the job that makes a store before the store itself: in the order of whoever ends that job."""
    is_it = (activation_stores.c.project == project) & (activation_stores.c.id == store_id)
    maker = select(activation_stores.c.job_id).where(is_it)
    connection.execute(select(jobs.c.id).where(jobs.c.id.in_(maker)).with_for_update())


def _live_job(connection: Connection, job_id: str) -> str | None:
    """The job if it will go on, locked so that it cannot end before a job that depends on it is in."""
    statement = select(jobs.c.state, jobs.c.cancel_requested).where(jobs.c.id == job_id).with_for_update()
    row = connection.execute(statement).one()
    return None if row.state in TERMINAL_STATES or row.cancel_requested else job_id


def _insert_job(connection: Connection, common: Mapping[str, Any], **values: Any) -> RowMapping:
    statement = insert(jobs).values(
        {**common, **values, "state": "queued", "created_at": database_now(), "n_events": 1}
    )
    row = connection.execute(statement.returning(jobs)).mappings().one()
    kind, data = as_row(StateChanged(to="queued"))
    connection.execute(
        insert(job_events).values(job_id=row["id"], id=1, attempt=0, kind=kind, created_at=database_now(), data=data)
    )
    return row


def _depend(connection: Connection, job_id: str, on: str) -> None:
    connection.execute(insert(job_dependencies).values(job_id=job_id, depends_on=on))
