"""Processes that are killed at any moment: what was acknowledged is kept, and each job is done once."""

from __future__ import annotations

from tests.chaos.counts import count, tell
from tests.chaos.scene import N_BETWEEN_DRAINS, Scene, counts_of
from tests.support.chaos_children import pause_at_random
from tests.support.waiting import wait_until


def test_a_client_that_is_killed_loses_no_job_that_was_acknowledged(scene: Scene) -> None:
    wanted = count(10, 100, 1000)
    n_kills = n_cut_off = 0
    while n_kills < wanted or (n_cut_off == 0 and n_kills < 20 * wanted):
        n_before = len(scene.diary.lines())
        client = scene.new_client(pause_s=0.0)
        wait_until(lambda n=n_before: len(scene.diary.lines()) > n, "a first request", every_s=0.005)  # type: ignore[misc]
        pause_at_random(0.2)
        client.kill()
        n_kills += 1
        n_cut_off += scene.diary.lines()[-1][0] == "sent"
        if n_kills % N_BETWEEN_DRAINS == 0:
            scene.drain()
    history = scene.drain()
    counts = counts_of(scene, history)
    tell(kills=n_kills, cut_off=n_cut_off, **counts)
    assert n_cut_off > 0, "no kill came between a request and its answer"
    assert counts["submitted"] > counts["acknowledged"] > 0


def test_a_dispatcher_that_is_killed_leaves_its_jobs_to_the_next(scene: Scene) -> None:
    wanted = count(5, 25, 200)
    n_kills = n_holding = 0
    while n_kills < wanted or (n_holding == 0 and n_kills < 20 * wanted):
        scene.submit(4)
        dispatcher = scene.new_dispatcher()
        scene.wait_for_work(scene.n_held)
        pause_at_random(1.5 if n_kills % 2 else 0.1)
        dispatcher.kill()
        n_kills += 1
        n_holding += scene.n_held() > 0
        if n_kills % N_BETWEEN_DRAINS == 0:
            scene.drain()
    history = scene.drain()
    tell(kills=n_kills, while_holding=n_holding, adopted=scene.n_adopted(), **counts_of(scene, history))
    assert min(n_holding, scene.n_adopted()) > 0, "no dispatcher was killed that held a job"
