"""Transactions that meet: what one has locked, and what comes between two statements of another."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, update

from gnomon.errors import Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import jobs
from gnomon_service.jobs import transitions
from tests.support.databases import fresh_database
from tests.support.service_jobs import PROJECT, Bench
from tests.support.waiting import wait_until


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
