"""What a dispatcher does to jobs: claim, renew, record, end. Every write is fenced.

A lease is (job, attempt, owner). Each write names all three and changes nothing once any of them is stale: it
raises LeaseLost, and whoever gets that must stop. Times are the database's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    and_,
    case,
    insert,
    not_,
    or_,
    select,
    update,
)

from gnomon.errors import LeaseLost
from gnomon.events import CheckpointSaved, Logged, Progressed, SegmentCommitted
from gnomon.resources import JobKind
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import attempts, jobs
from gnomon_service.jobs.held import HeldJob, Lease, Placement, RetryPolicy, Wish
from gnomon_service.jobs.transitions import BY_USER, add_events, as_row, clean, end, move, put_back, requeue
from gnomon_service.jobs.waiting import is_ready

_HELD_STATES = ("scheduled", "running")


class Leases:
    """Jobs seen from the dispatcher's side."""

    def __init__(self, database: Database, *, lease_s: float, retry: RetryPolicy) -> None:
        self._database = database
        self._lease_s = lease_s
        self._retry = retry

    def claim(self, owner: str, job_id: str, placement: Placement) -> HeldJob | None:
        """Take a job that is ready to be started somewhere; its attempt grows by one. None if it no longer is ready."""
        guest_until = None if placement.guest_for_s is None else database_now() + placement.guest_for_s
        with self._database.write() as connection:
            ready = select(jobs.c.id).where(jobs.c.id == job_id, is_ready()).with_for_update(of=jobs, skip_locked=True)
            if connection.execute(ready).scalar() is None:
                return None
            row = move(
                connection,
                jobs.c.id == job_id,
                "scheduled",
                data={"owner": owner},
                attempt=jobs.c.attempt + 1,
                places=list(placement.places),
                guest_until=guest_until,
                mesh=None if placement.mesh is None else list(placement.mesh),
                waits_in_queue=None,
                **self._lease_values(owner),
            )
            assert row is not None, "a queued row that this transaction locked"
            values = {"job_id": row["id"], "attempt": row["attempt"], "lease_owner": owner}
            values |= {"state": "live", "started_at": database_now(), "n_devices": len(placement.places)}
            connection.execute(insert(attempts).values(values))
            return _held(row, owner, last_report_seq=0)

    def adopt(self, owner: str, held: Collection[str] = ()) -> list[HeldJob]:
        """Take over every job whose lease has passed, with its attempt: the gang may well be alive.

        Also one of the owner's own that it does not hold: the answer to its claim was lost on the way.
        """
        passed = (
            select(jobs.c.id)
            .where(jobs.c.state.in_(_HELD_STATES), jobs.c.lease_until < database_now())
            .where(or_(jobs.c.lease_owner != owner, jobs.c.id.not_in(held)))
            .with_for_update(skip_locked=True)
        )
        with self._database.write() as connection:
            job_ids = connection.execute(passed).scalars().all()
            return [self._adopt_one(connection, job_id, owner) for job_id in job_ids]

    def _adopt_one(self, connection: Connection, job_id: str, owner: str) -> HeldJob:
        event = Logged(message="taken over by another dispatcher", owner=owner)
        row = add_events(connection, jobs.c.id == job_id, [as_row(event)], **self._lease_values(owner))
        assert row is not None, "a row that this transaction locked"
        seq = connection.execute(
            update(attempts)
            .where(attempts.c.job_id == job_id, attempts.c.attempt == row["attempt"])
            .values(lease_owner=owner)
            .returning(attempts.c.last_report_seq)
        ).scalar_one()
        return _held(row, owner, last_report_seq=seq)

    def renew(self, lease: Lease) -> None:
        """Keep the lease for another lease_s."""
        statement = update(jobs).where(_fence(lease)).values(self._lease_values(lease.owner))
        with self._database.write() as connection:
            if not connection.execute(statement).rowcount:
                raise _lost(connection, lease)

    def wishes(self, owner: str) -> dict[str, Wish]:
        """What is wanted of the jobs that this owner holds, by job."""
        is_late = case((jobs.c.deadline_at < database_now(), True), else_=False).label("is_late")
        wanted = (jobs.c.id, jobs.c.cancel_requested, jobs.c.leave_why, jobs.c.places_wanted)
        statement = select(*wanted, is_late).where(jobs.c.lease_owner == owner, jobs.c.state.in_(_HELD_STATES))
        with self._database.read() as connection:
            return {
                row.id: Wish(
                    cancel_requested=row.cancel_requested,
                    deadline_passed=bool(row.is_late),
                    leave_why=row.leave_why,
                    places=None if row.places_wanted is None else tuple(row.places_wanted),
                )
                for row in connection.execute(statement)
            }

    def hand_back(self, lease: Lease) -> None:
        """Let the lease pass now, so that the next dispatcher need not wait; the gang goes on."""
        statement = update(jobs).where(_fence(lease)).values(lease_until=database_now() - 1)
        with self._database.write() as connection:
            if not connection.execute(statement).rowcount:
                raise _lost(connection, lease)

    def put_back(self, lease: Lease, why: str) -> None:
        """Queue the job again at once, as its attempt was asked to end; that is no loss of the job's."""
        with self._database.write() as connection:
            row = self._check(connection, lease)
            if row["cancel_requested"]:
                end(connection, _fence(lease), "cancelled", code="cancelled", message=BY_USER)
                return
            put_back(connection, _fence(lease), message=why)

    def place(self, lease: Lease, places: Sequence[str]) -> None:
        """Note which devices the attempt holds by now."""
        with self._database.write() as connection:
            wanted = self._check(connection, lease)["places_wanted"]
            is_done = wanted is not None and len(wanted) == len(places)  # on other nodes perhaps: then there
            values = {"places": list(places), "places_wanted": None if is_done else wanted}
            connection.execute(update(jobs).where(_fence(lease)).values(values))

    def mark_running(self, lease: Lease) -> None:
        """Note that the attempt was started on the cluster; harmless if that was noted before."""
        now = database_now()
        with self._database.write() as connection:
            started_at = case((jobs.c.started_at.is_(None), now), else_=jobs.c.started_at)
            scheduled = _fence(lease) & (jobs.c.state == "scheduled")
            if move(connection, scheduled, "running", data={}, started_at=started_at) is None:
                self._check(connection, lease)

    def record(self, lease: Lease, reports: Sequence[tuple[int, str, Mapping[str, Any]]]) -> int:
        """Store reports, as (seq, kind, data), each once; returns the last seq now stored.

        Reports and their last number are one transaction: after a crash the cut-off poll comes again,
        and what it had stored is skipped.
        """
        with self._database.write() as connection:
            row = self._check(connection, lease)
            stored = int(connection.execute(_attempt_of(lease)).scalar_one())
            fresh = [report for report in reports if report[0] > stored]
            if not fresh:
                return stored
            values = self._lease_values(lease.owner) | _progress(fresh, row["progress"])
            if any(map(_is_kept, fresh)):
                values["n_losses"] = 0
            events = [(kind, data) for _, kind, data in fresh]
            add_events(connection, _fence(lease), events, **values)
            last = fresh[-1][0]
            key = (attempts.c.job_id == lease.job_id, attempts.c.attempt == lease.attempt)
            connection.execute(update(attempts).where(*key).values(last_report_seq=last))
            return last

    def succeed(self, lease: Lease, result: Mapping[str, Any]) -> None:
        """End the job with its result, and add the store or dictionary that it made.

        Raises CorruptArtifact, and changes nothing, if the result's record does not describe one.
        """
        with self._database.write() as connection:
            if end(connection, _fence(lease), "succeeded", result=result) is None:
                raise _lost(connection, lease)

    def fail(self, lease: Lease, *, code: str, message: str) -> None:
        """End the job for good: the fault is its own."""
        with self._database.write() as connection:
            if end(connection, _fence(lease), "failed", code=code, message=message) is None:
                raise _lost(connection, lease)

    def cancelled(self, lease: Lease) -> None:
        """End the job as cancelled: its attempt has stopped."""
        with self._database.write() as connection:
            if end(connection, _fence(lease), "cancelled", code="cancelled", message=BY_USER) is None:
                raise _lost(connection, lease)

    def lose(self, lease: Lease, message: str) -> None:
        """Note an infrastructure loss: the job runs again after a pause, or fails.

        It fails after max_attempts losses in a row, among which nothing was committed.
        """
        with self._database.write() as connection:
            row = self._check(connection, lease)
            n_losses = row["n_losses"] + 1
            if row["cancel_requested"]:
                end(connection, _fence(lease), "cancelled", code="cancelled", message=BY_USER)
            elif n_losses >= row["max_attempts"]:
                exhausted = f"{n_losses} attempts in a row were lost and committed nothing; the last one: {message}"
                end(connection, _fence(lease), "failed", code="attempts_exhausted", message=exhausted)
            else:
                delay_s = self._retry.delay_s(n_losses)
                requeue(connection, _fence(lease), message=message, delay_s=delay_s, n_losses=n_losses)

    def sweep_deadlines(self) -> int:
        """Fail every waiting job whose deadline has passed; returns how many."""
        late = select(jobs.c.id).where(jobs.c.state == "queued", jobs.c.deadline_at < database_now())
        with self._database.read() as connection:
            job_ids = connection.execute(late).scalars().all()
        for job_id in job_ids:
            still = (jobs.c.id == job_id) & (jobs.c.state == "queued")
            with self._database.write() as connection:
                message = "the deadline passed before the job could start"
                end(connection, still, "failed", code="deadline_exceeded", message=message)
        return len(job_ids)

    def unreleased(self, *, limit: int = 32) -> list[tuple[str, int]]:
        """Ended attempts, as (job, attempt), of which something may be left on the cluster."""
        statement = (
            select(attempts.c.job_id, attempts.c.attempt)
            .where(not_(attempts.c.released), attempts.c.ended_at.is_not(None))
            .order_by(attempts.c.ended_at)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [(row.job_id, row.attempt) for row in connection.execute(statement)]

    def mark_released(self, released: Collection[tuple[str, int]]) -> None:
        """Note that nothing of these ended attempts is left on the cluster."""
        for job_id, attempt in released:
            key = (attempts.c.job_id == job_id, attempts.c.attempt == attempt)
            with self._database.write() as connection:
                connection.execute(update(attempts).where(*key, attempts.c.ended_at.is_not(None)).values(released=True))

    def _lease_values(self, owner: str) -> dict[str, Any]:
        return {"lease_owner": owner, "lease_until": database_now() + self._lease_s}

    def _check(self, connection: Connection, lease: Lease) -> RowMapping:
        """The job's row, locked until the transaction ends; raises LeaseLost."""
        row = connection.execute(select(jobs).where(_fence(lease)).with_for_update()).mappings().one_or_none()
        if row is None:
            raise _lost(connection, lease)
        return row


def _fence(lease: Lease) -> ColumnElement[bool]:
    return and_(
        jobs.c.id == lease.job_id,
        jobs.c.attempt == lease.attempt,
        jobs.c.lease_owner == lease.owner,
        jobs.c.state.in_(_HELD_STATES),
    )


def _lost(connection: Connection, lease: Lease) -> LeaseLost:
    row = connection.execute(select(jobs).where(jobs.c.id == lease.job_id)).mappings().one_or_none()
    state, attempt = (row["state"], row["attempt"]) if row else ("absent", 0)
    return LeaseLost(
        f"attempt {lease.attempt} of job {lease.job_id!r} is not {lease.owner!r}'s: the job is {state}, "
        f"at attempt {attempt}; stop working on it",
        is_adopted=state in _HELD_STATES and attempt == lease.attempt,
    )


def _attempt_of(lease: Lease) -> Select[Any]:
    return select(attempts.c.last_report_seq).where(
        attempts.c.job_id == lease.job_id, attempts.c.attempt == lease.attempt
    )


def _is_kept(report: tuple[int, str, Mapping[str, Any]]) -> bool:
    """Whether a report says that something was committed, which no later attempt does again."""
    _, kind, data = report
    return kind == CheckpointSaved.kind or (kind == SegmentCommitted.kind and not data.get("kept"))


def _progress(
    reports: Sequence[tuple[int, str, Mapping[str, Any]]], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The last report of progress, with the best and worst rate of its phase beside it."""
    shown = [data for _, kind, data in reports if kind == Progressed.kind]
    if not shown:
        return {}
    last = clean(dict(shown[-1]))
    if before is not None and before.get("phase") == last.get("phase"):
        last |= {name: before[name] for name in ("rate_most", "rate_least") if before.get(name)}
    if last.get("rate"):
        last["rate_most"] = max(last["rate"], last.get("rate_most", 0.0))
        last["rate_least"] = min(last["rate"], last.get("rate_least", last["rate"]))
    return {"progress": last}


def _held(row: RowMapping, owner: str, *, last_report_seq: int) -> HeldJob:
    return HeldJob(
        lease=Lease(job_id=row["id"], attempt=row["attempt"], owner=owner),
        project=row["project"],
        kind=cast("JobKind", row["kind"]),
        spec=row["spec"],
        store_id=row["store_id"],
        dictionary_id=row["dictionary_id"],
        is_running=row["state"] == "running",
        last_report_seq=last_report_seq,
        places=tuple(row["places"] or ()),
        mesh=None if row["mesh"] is None else (row["mesh"][0], row["mesh"][1]),
    )
