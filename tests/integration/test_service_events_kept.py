"""Events of long jobs are thinned and of old jobs forgotten, on both databases, and followers notice nothing."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from gnomon.resources import Event
from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.reads import list_events
from gnomon_service.db.tables import job_events, jobs
from gnomon_service.dispatch.event_keeping import EventKeeper
from gnomon_service.dispatch.thinning import Bounds
from gnomon_service.jobs.held import HeldJob
from tests.chaos.history import check
from tests.chaos.reading import read_history
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench
from tests.support.waiting import wait_until

DAY_S = 86_400.0
BOUNDS = Bounds(n_recent=40, n_old=8, n_first_logs=2, n_last_logs=3, forget_after_s=90 * DAY_S)
N_STEPS = 100


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def run(bench: Bench, store: int = 1) -> HeldJob:
    """A job that has told much, and goes on."""
    bench.submit(store=store)
    held = bench.claim()
    told: list[tuple[str, dict[str, object]]] = []
    for step in range(1, N_STEPS + 1):
        told += [("metrics", {"step": step, "variant": name, "loss": 1 / step}) for name in ("a", "b")]
        told.append(("progress", {"phase": "train", "done": step, "unit": "tokens"}))
        told.append(("log", {"level": "info", "message": f"step {step}"}))
    told.append(("checkpoint", {"step": N_STEPS, "n_bytes": 1, "copy_s": 0.0, "duration_s": 0.0}))
    bench.leases.record(held.lease, [(seq, kind, data) for seq, (kind, data) in enumerate(told, 1)])
    return held


def grow_old(bench: Bench, days: float) -> None:
    """Let all that has happened so far have happened earlier: the rule that nothing is changed is away meanwhile."""
    is_sqlite = bench.database.dialect == "sqlite"
    with bench.database.write() as connection:
        if is_sqlite:
            rule = "SELECT sql FROM sqlite_master WHERE name = 'job_events_stay'"
            rule = str(connection.exec_driver_sql(rule).scalar_one())
            connection.exec_driver_sql("DROP TRIGGER job_events_stay")
        else:
            connection.exec_driver_sql("ALTER TABLE job_events DISABLE TRIGGER job_events_stay")
            rule = "ALTER TABLE job_events ENABLE TRIGGER job_events_stay"
        connection.execute(update(job_events).values(created_at=job_events.c.created_at - days * DAY_S))
        connection.execute(update(jobs).values(finished_at=jobs.c.finished_at - days * DAY_S))
        connection.exec_driver_sql(rule)


def keeper(bench: Bench) -> EventKeeper:
    return EventKeeper(bench.database, BOUNDS)


def of_kind(events: list[Event], kind: str, variant: str | None = None) -> list[Event]:
    return [event for event in events if event.kind == kind and event.data.get("variant") == variant]


def test_what_is_young_stays(bench: Bench) -> None:
    held = run(bench)
    before = bench.events(held.lease.job_id)
    assert keeper(bench).keep() == 0
    assert bench.events(held.lease.job_id) == before


@pytest.mark.parametrize(("days", "n_most"), [(0.1, BOUNDS.n_recent), (2.0, BOUNDS.n_old)])
def test_a_long_job_keeps_a_few_points_of_every_curve(bench: Bench, days: float, n_most: int) -> None:
    held = run(bench)
    grow_old(bench, days)
    before = bench.events(held.lease.job_id)
    assert keeper(bench).keep() > 0
    after = bench.events(held.lease.job_id)
    for kind, variant, name in (("metrics", "a", "step"), ("metrics", "b", "step"), ("progress", None, "done")):
        points = [event.data[name] for event in of_kind(after, kind, variant)]
        assert points[0] == 1 and points[-1] == N_STEPS
        assert n_most / 2 <= len(points) <= n_most + 1
    for kind in ("state", "log", "checkpoint"):
        assert of_kind(after, kind) == of_kind(before, kind)
    assert all(event in before for event in after)
    assert keeper(bench).keep() == 0


def test_a_long_log_is_cut_once_its_job_has_ended(bench: Bench) -> None:
    held = run(bench)
    bench.leases.succeed(held.lease, STORE_RESULT)
    keeper(bench).keep()
    told = [event.data["message"] for event in of_kind(bench.events(held.lease.job_id), "log")]
    assert told == ["step 1", "step 2", "step 98", "step 99", "step 100"]


def test_of_a_job_that_ended_long_ago_its_states_result_and_last_progress_stay(bench: Bench) -> None:
    held, failed = run(bench), run(bench, store=2)
    bench.leases.succeed(held.lease, STORE_RESULT)
    bench.leases.fail(failed.lease, code="x", message="y")
    forever = EventKeeper(bench.database, replace(BOUNDS, forget_after_s=None))
    grow_old(bench, 91.0)
    before = [bench.job(each.lease.job_id) for each in (held, failed)]
    states = [bench.states(each.lease.job_id) for each in (held, failed)]
    forever.keep()
    assert all(of_kind(bench.events(each.lease.job_id), "checkpoint") for each in (held, failed))
    keeper(bench).keep()
    for each in (held, failed):
        assert [event.kind for event in bench.events(each.lease.job_id)] == [*["state"] * 3, "progress", "state"]
    assert states == [bench.states(each.lease.job_id) for each in (held, failed)]
    assert [bench.job(each.lease.job_id) for each in (held, failed)] == before
    check(read_history(bench.database))


def test_a_job_that_is_resumed_after_that_goes_on_and_is_looked_at_again(bench: Bench) -> None:
    failed = run(bench)
    bench.leases.fail(failed.lease, code="x", message="y")
    bench.release()
    grow_old(bench, 91.0)
    ours = keeper(bench)
    ours.keep()
    bench.queue.resume(PROJECT, failed.lease.job_id)
    held = bench.claim()
    bench.leases.record(held.lease, [(1, "log", {"level": "info", "message": "again"})])
    events = bench.events(failed.lease.job_id)
    assert [event.data["message"] for event in of_kind(events, "log")] == ["again"]
    bench.leases.succeed(held.lease, STORE_RESULT)
    grow_old(bench, 91.0)
    assert ours.keep() == 1
    check(read_history(bench.database))


def test_a_follower_goes_on_from_an_event_that_has_gone(bench: Bench) -> None:
    held = run(bench)
    grow_old(bench, 2.0)
    keeper(bench).keep()
    bench.leases.succeed(held.lease, STORE_RESULT)
    events = bench.events(held.lease.job_id)
    ids = [event.id for event in events]
    assert ids != list(range(1, ids[-1] + 1))
    for after in range(ids[-1] + 1):
        with bench.database.read() as connection:
            found, is_over = list_events(connection, PROJECT, held.lease.job_id, after=after, limit=1_000)
        assert ([event.id for event in found], is_over) == ([event_id for event_id in ids if event_id > after], True)


def test_several_keepers_at_once_leave_what_one_leaves(bench: Bench) -> None:
    for store in (1, 2, 3):
        run(bench, store)
    grow_old(bench, 2.0)
    errors: list[BaseException] = []

    def keep() -> None:
        try:
            keeper(bench).keep()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and keeper(bench).keep() == 0
    check(read_history(bench.database))


def test_the_thread_thins_while_a_job_goes_on(bench: Bench) -> None:
    held = run(bench)
    grow_old(bench, 2.0)
    with keeper(bench).running(every_s=0.02):
        wait_until(lambda: len(bench.events(held.lease.job_id)) < 200, "the thinning")
        bench.leases.record(held.lease, [(1_000, "metrics", {"step": N_STEPS + 1, "variant": "a"})])
    bench.leases.succeed(held.lease, STORE_RESULT)
    check(read_history(bench.database))


def test_the_database_keeps_states_whoever_deletes_them(bench: Bench) -> None:
    held = run(bench)
    mine = job_events.c.job_id == held.lease.job_id
    with pytest.raises(IntegrityError), bench.database.write() as connection:
        connection.execute(job_events.delete().where(mine, job_events.c.kind == "state"))
    with pytest.raises(IntegrityError), bench.database.write() as connection:
        connection.execute(update(job_events).where(mine).values(created_at=database_now()))
