"""Processes that are killed at any moment: what was acknowledged is kept, and each job is done once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.chaos.conftest import migrate
from tests.chaos.counts import count, tell
from tests.chaos.scene import N_BETWEEN_DRAINS, Scene, counts_of, scene_of
from tests.support.api_process import ApiProcess
from tests.support.chaos_children import pause_at_random
from tests.support.databases import MortalPostgreSQL
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


def test_an_api_that_is_killed_loses_no_job_that_was_answered(scene: Scene) -> None:
    """At any moment, and as soon as a job is written; its client sends each request until it is answered."""
    wanted, n_unanswered = count(3, 20, 200), 0
    api = ApiProcess.on(scene.url, scene.home)
    client, dispatcher = scene.new_api_client(api), scene.new_dispatcher()
    for n_kills in range(1, wanted + 1):
        n_answers = len(scene.diary.sent().answers)
        api.begin()
        if n_kills % 3:
            wait_until(lambda n=n_answers: len(scene.diary.sent().answers) > n, "an answer of this life")  # type: ignore[misc]
        if n_kills % 3 == 1:
            pause_at_random(0.3)
        else:
            n_written = scene.n_submitted()
            wait_until(lambda n=n_written: scene.n_submitted() > n, "a job that is written", every_s=0.0005)  # type: ignore[misc]
        api.kill()
        n_unanswered += scene.n_written(scene.diary.unanswered())
    with api:
        wait_until(lambda: not scene.diary.unanswered(), "the last answer")
        client.stop()
    dispatcher.stop()
    history = scene.drain()
    met = Counter(words[-1] for words in scene.diary.lines())
    n_cut_off = sum(n for word, n in met.items() if word.endswith("Error")) - met["ConnectError"]
    tell(kills=wanted, cut_off=n_cut_off, written_unanswered=n_unanswered, **counts_of(scene, history))
    assert n_cut_off > 0, "no kill came between a request and its answer"


def test_a_database_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """All of its processes at once, and one of them, which makes it end and recover by itself."""
    server, wanted = MortalPostgreSQL(), count(2, 20, 200)
    migrate(server.url)
    with scene_of(server.url, tmp_path) as scene:
        client, *dispatchers = scene.new_client(0.03), scene.new_dispatcher(), scene.new_dispatcher()
        for n_kills in range(1, wanted + 1):
            wait_until(scene.n_held, "a job that is held")
            pause_at_random(0.3)
            n_answers, n_ended = len(scene.diary.sent().answers), scene.n_ended()
            server.kill() if n_kills % 2 else server.kill_one()
            wait_until(lambda n=n_answers: len(scene.diary.sent().answers) > n, "the next answer")  # type: ignore[misc]
            wait_until(lambda n=n_ended: scene.n_ended() > n, "the next job's end")  # type: ignore[misc]
        for child in (client, *dispatchers):
            child.stop()
        history = scene.drain()
        n_unanswered = sum(words[0] == "unavailable" for words in scene.diary.lines())
        tell(kills=wanted, unanswered=n_unanswered, adopted=scene.n_adopted(), **counts_of(scene, history))
    assert n_unanswered > 0, "no client met a database that was away"
