"""Processes whose clocks are hours off and jump: leases and ages are the database's, and nobody else's."""

from __future__ import annotations

from typing import Final

from sqlalchemy import select

from gnomon_service.db.engine import Database, database_now
from tests.chaos.counts import count, tell
from tests.chaos.reading import History
from tests.chaos.scene import Scene, counts_of
from tests.support.waiting import wait_until

LONG_LEASE_S: Final = 300.0
"""Far beyond what a busy machine delays a renewal, and far below what the clocks are off."""
AHEAD: Final = (7.0, -11.0, 0.5, 400.0)
BEHIND: Final = (-9.0, -400.0, 13.0)


def test_clocks_that_are_off_and_jump_take_no_job_away_and_give_no_wrong_time(scene: Scene) -> None:
    began = now_of(scene.bench.database)
    dispatchers = [scene.new_dispatcher(LONG_LEASE_S, off_h=AHEAD), scene.new_dispatcher(LONG_LEASE_S, off_h=BEHIND)]
    client = scene.new_client(0.05, off_h=BEHIND)
    wanted = count(20, 60, 600)
    wait_until(lambda: scene.n_ended() >= wanted, "jobs to end")
    assert (scene.n_adopted(), scene.n_refused()) == (0, 0), "a lease of a dispatcher that lives was taken for passed"
    for child in (client, *dispatchers):
        child.stop()
    history = scene.drain()
    ended = now_of(scene.bench.database)
    times = times_of(history)
    assert all(began <= at <= ended for at in times), (began, min(times), max(times), ended)
    tell(times=len(times), taken=0, **counts_of(scene, history))


def test_a_dispatcher_that_is_killed_is_followed_by_one_whose_clock_is_behind(scene: Scene) -> None:
    """By its own clock, no lease of the first will pass for days."""
    for _ in range(count(1, 5, 50)):
        scene.submit(4)
        first = scene.new_dispatcher(off_h=AHEAD)
        scene.wait_for_work(scene.n_held)
        first.kill()
        held, n_adopted = scene.n_held(), scene.n_adopted()
        second = scene.new_dispatcher(off_h=(-100.0,))
        wait_until(lambda n=n_adopted, h=held: scene.n_adopted() >= n + h, f"{held} jobs to be adopted")  # type: ignore[misc]
        second.stop()
    history = scene.drain()
    tell(adopted=scene.n_adopted(), **counts_of(scene, history))


def now_of(database: Database) -> float:
    """The database's clock."""
    with database.read() as connection:
        return float(connection.execute(select(database_now())).scalar_one())


def times_of(history: History) -> list[float]:
    """Every moment that is written down of anything that happened."""
    rows = [*history.jobs.values(), *history.stores.values(), *history.dictionaries]
    rows += [row for of_job in (*history.events.values(), *history.attempts.values()) for row in of_job]
    names = ("created_at", "started_at", "ended_at", "finished_at")
    return [row[name] for row in rows for name in names if row.get(name) is not None]
