"""Bringing a schema up to date: what an upgrade meets, and what processes of earlier releases meet afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError

from gnomon.errors import Conflict, Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import attempts, cluster, jobs
from gnomon_service.db.upgrading import upgrade
from gnomon_service.jobs.steering import Steering
from tests.support.databases import DIALECTS, fresh_database
from tests.support.old_release import REVISION, OldRelease
from tests.support.service_jobs import PROJECT, Bench
from tests.support.waiting import LIMIT_S, wait_until

PRESENT: Final = "0006"


@pytest.fixture(params=DIALECTS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of the previous release."""
    with fresh_database(request.param, tmp_path) as url:
        made = Database(url, busy_timeout_s=0.1)
        upgrade(made, to=REVISION)
        yield made
        made.close()


def revision(database: Database) -> str | None:
    """The schema that a database has."""
    with database.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def test_an_upgrade_that_meets_somebody_who_stands_still_gives_up_and_has_changed_nothing(old: Database) -> None:
    other = Database(old.url)
    OldRelease(old).submit("a", 1)
    with other.write() as connection:
        connection.execute(text("UPDATE jobs SET priority = 1"))
        with pytest.raises(Unavailable, match="end it, then upgrade again") as caught:
            upgrade(old, patience_s=0.0)
    other.close()
    assert (caught.value.code, revision(old)) == ("database_in_use", REVISION)
    upgrade(old)
    assert revision(old) == PRESENT
    with old.read() as connection:
        assert connection.execute(select(jobs.c.priority)).scalar_one() == 1


@pytest.mark.parametrize("locked", ["attempts SET code = code", "legal_transitions SET to_state = to_state"])
def test_an_upgrade_waits_for_whoever_is_at_work_and_ends_nobody_s_transaction(old: Database, locked: str) -> None:
    """Somebody who has locked a part of what the upgrade needs, and then wants another."""
    other = Database(old.url, busy_timeout_s=LIMIT_S)
    OldRelease(old).submit("a", 1)
    with ThreadPoolExecutor(1) as pool:
        with other.write() as connection:
            connection.execute(text(f"UPDATE {locked}"))
            done = pool.submit(upgrade, old, patience_s=LIMIT_S)
            if old.dialect == "postgresql":
                wait_until(lambda: _n_waiting(other) == 1, "the upgrade to wait", every_s=0.01)
            connection.execute(text("UPDATE jobs SET priority = 1"))
        done.result(LIMIT_S)
    with other.read() as connection:
        assert connection.execute(select(jobs.c.priority)).scalar_one() == 1
    other.close()
    assert revision(old) == PRESENT


def _n_waiting(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar_one())


def test_whoever_starts_on_a_schema_that_is_up_to_date_waits_for_nobody(database: Database) -> None:
    other = Database(database.url, busy_timeout_s=0.0)
    with database.write() as connection:
        connection.execute(update(jobs).values(priority=1))
        other.migrate()
    other.close()


def test_a_schema_of_a_newer_release_is_not_touched(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(Conflict, match="'9999', and this one knows it up to '0006'") as caught:
        database.migrate()
    assert (caught.value.code, revision(database)) == ("database_newer", "9999")


def test_many_who_upgrade_at_once_do_it_once(old: Database) -> None:
    queue = OldRelease(old)
    made = [queue.submit(f"key-{number}", 40) for number in range(50)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: upgrade(old), range(8)))
    assert revision(old) == PRESENT
    assert set(made) <= {job_id for job_id, row in queue.rows().items() if row["state"] == "queued"}


def test_what_is_drained_and_paused_stays_so(old: Database) -> None:
    upgrade(old, to="0005")
    bench, steering = Bench(old), Steering(old)
    job = bench.submit()
    steering.drain(by="ann")
    steering.pause(PROJECT, job.id, by="ann")
    old.migrate()
    with old.read() as connection:
        assert connection.execute(select(cluster.c.drained_by)).scalar_one() == "ann"
    assert bench.claim_next() is None and bench.job(job.id).state == "queued"


def test_a_dispatcher_of_an_earlier_release_claims_nothing_and_is_told_why(database: Database) -> None:
    bench, queue = Bench(database), OldRelease(database)
    job_id = queue.submit("a", 1)
    Steering(database).pause(PROJECT, job_id, by="ann")
    with pytest.raises(IntegrityError, match="of an earlier release than the database; stop it"):
        queue.claim("old", 30.0, job_id=job_id)
    with database.read() as connection:
        assert connection.execute(select(attempts)).first() is None
    assert (bench.states(job_id), bench.job(job_id).attempt) == (["queued"], 0)


def test_what_such_a_dispatcher_ends_keeps_nothing_of_an_attempt(database: Database) -> None:
    bench, queue = Bench(database), OldRelease(database)
    queue.submit("a", 1)
    held = bench.claim("old")
    with database.write() as connection:
        leaving = {"leave_why": "paused", "places_wanted": ["n"], "guest_until": 1.0}
        connection.execute(update(jobs).where(jobs.c.id == held.lease.job_id).values(leaving))
        connection.execute(
            text("UPDATE jobs SET state = 'queued', lease_owner = NULL, lease_until = NULL WHERE id = :id"),
            {"id": held.lease.job_id},
        )
        row = connection.execute(select(jobs).where(jobs.c.id == held.lease.job_id)).mappings().one()
    assert [row[name] for name in ("places", "places_wanted", "guest_until", "leave_why")] == [None] * 4
