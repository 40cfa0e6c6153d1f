"""Transactions that meet: what one has locked, and what comes between two statements of another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, bindparam, func, select, update

from gnomon.errors import Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import cluster, jobs, projects
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.jobs import submission, transitions
from gnomon_service.jobs.held import HeldJob
from gnomon_service.jobs.steering import Steering
from gnomon_workers.runtime.protocol import ClusterSnapshot, NodeSnapshot
from tests.support.databases import fresh_database
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench, train_spec
from tests.support.waiting import LIMIT_S, wait_until

NODE = NodeSnapshot(id="n", name="node", n_cpus=4, n_gpus=0)


def test_a_dispatcher_that_stands_still_in_a_transaction_does_not_hold_up_the_others(tmp_path: Path) -> None:
    with fresh_database("postgresql", tmp_path) as url:
        database, frozen = Database(url), Database(url, standstill_s=0.2)
        database.migrate()
        bench = Bench(database)
        job = bench.submit()
        bench.claim("a")
        bench.let_lease_pass(job.id)
        with pytest.raises(Unavailable), frozen.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(priority=1))
            (held,) = wait_until(lambda: bench.leases.adopt("b"), "the lock of the one that stands still")
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(priority=2))
        assert (held.lease.owner, bench.job(job.id).priority) == ("b", 0)
        database.close()
        frozen.close()


def test_a_dispatcher_that_stands_still_between_two_rows_of_a_statement_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver would send them as one pipeline, in which PostgreSQL counts no time."""
    with fresh_database("postgresql", tmp_path) as url:
        database, frozen = Database(url), Database(url, standstill_s=0.2)
        database.migrate()
        bench = Bench(database)
        job = bench.submit()
        bench.claim("a")
        bench.let_lease_pass(job.id)
        adopted: list[HeldJob] = []
        execute = psycopg.Cursor.execute

        def then_stand_still(cursor: psycopg.Cursor[Any], *args: Any, **fields: Any) -> object:
            done = execute(cursor, *args, **fields)
            monkeypatch.setattr(psycopg.Cursor, "execute", execute)
            adopted.extend(wait_until(lambda: bench.leases.adopt("b"), "the lock of the one that stands still"))
            return done

        both = update(jobs).where(jobs.c.id == bindparam("job")).values(priority=bindparam("to"))
        with pytest.raises(Unavailable), frozen.write() as connection:
            connection.execute(select(jobs.c.id)).all()
            monkeypatch.setattr(psycopg.Cursor, "execute", then_stand_still)
            connection.execute(both, [{"job": job.id, "to": 1}, {"job": job.id, "to": 2}])
        assert (adopted[0].lease.owner, bench.job(job.id).priority) == ("b", 0)
        database.close()
        frozen.close()


def test_a_cancel_that_meets_a_loss_is_kept(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(database)
    job = bench.submit()
    lost = threading.Thread(target=bench.leases.lose, args=(bench.claim().lease, "node died"))
    end = transitions.end

    def end_while_the_attempt_is_lost(connection: Connection, *args: Any, **fields: Any) -> object:
        ended = end(connection, *args, **fields)
        if lost.ident is None:
            lost.start()
            lost.join(1.0)  # it waits for this transaction, or has come between two of its statements
        return ended

    monkeypatch.setattr(transitions, "end", end_while_the_attempt_is_lost)
    bench.queue.cancel(PROJECT, job.id)
    lost.join()
    assert bench.job(job.id).state == "cancelled"


MADE = (cluster, projects)
UPSERTS: dict[str, Callable[[Database], object]] = {
    "note": lambda database: Observations(database).note(ClusterSnapshot(nodes=(NODE,))),
    "drain": lambda database: Steering(database).drain(by="ann"),
    "hold": lambda database: Steering(database).hold(PROJECT, by="ann"),
    "set_project": lambda database: Steering(database).set_project(
        PROJECT, weight=2.0, n_jobs_most=None, n_devices_most=None
    ),
}


@pytest.mark.parametrize("write", UPSERTS.values(), ids=UPSERTS.keys())
def test_rows_that_many_make_at_once_are_made_once(database: Database, write: Callable[[Database], object]) -> None:
    """Two dispatchers of a new service, say."""
    n_writers = 16
    barrier = threading.Barrier(n_writers)

    def make(_: int) -> None:
        barrier.wait(LIMIT_S)
        write(database)

    with ThreadPoolExecutor(n_writers) as pool:
        list(pool.map(make, range(n_writers)))
    with database.read() as connection:
        n_rows = [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in MADE]
    assert n_rows in ([1, 0], [0, 1])


def test_a_submit_that_meets_the_end_of_its_harvest_waits_for_no_one_that_waits_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(database)
    harvest = bench.submit()
    with ThreadPoolExecutor(1) as pool:
        ends: list[Future[None]] = []
        lease, look = bench.claim().lease, submission._live_job

        def look_while_it_ends(connection: Connection, job_id: str) -> str | None:
            ends.append(pool.submit(bench.leases.succeed, lease, STORE_RESULT))
            wait(ends, timeout=0.5)
            return look(connection, job_id)

        monkeypatch.setattr(submission, "_live_job", look_while_it_ends)
        job = bench.submit(train_spec())
        ends[0].result()
    assert (job.depends_on, bench.job(harvest.id).state) == ((harvest.id,), "succeeded")
