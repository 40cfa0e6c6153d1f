"""The database is gone for a while, or its answer is lost on the way: no job is lost, and none made twice."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from sqlalchemy import func, select

from gnomon_service.db.engine import Database
from gnomon_service.db.tables import jobs
from tests.chaos.counts import count, tell
from tests.chaos.history import check
from tests.chaos.reading import Sent, read_history
from tests.chaos.scene import N_BETWEEN_DRAINS, N_STORES, Scene, counts_of, scene_of
from tests.support.chaos_children import submit_one
from tests.support.databases import socket_of, through
from tests.support.proxy import Proxy
from tests.support.service_api import running_service
from tests.support.service_jobs import Bench
from tests.support.serving import serving
from tests.support.waiting import LIMIT_S, wait_until


@contextmanager
def distant_scene(url: str, home: Path) -> Iterator[tuple[Scene, Proxy]]:
    """A scene whose children reach the database through a proxy."""
    with Proxy(socket_of(url)) as proxy, scene_of(url, home, their_url=through(url, proxy.port)) as scene:
        yield scene, proxy


def test_an_outage_of_the_database_loses_nothing(postgresql: str, tmp_path: Path) -> None:
    outages_s = [0.0, 1.0] * count(1, 0, 0) + [0.0, 1.0, 5.0] * count(0, 3, 20)
    with distant_scene(postgresql, tmp_path) as (scene, proxy):
        client, *dispatchers = scene.new_client(0.03), scene.new_dispatcher(), scene.new_dispatcher()
        for outage_s in outages_s:
            n_cut = proxy.n_cut
            wait_until(scene.n_held, "a job that is held")
            with proxy.away():
                time.sleep(outage_s)  # the outage itself
            assert proxy.n_cut > n_cut, "nobody was connected"
            n_answers, n_ended = len(scene.diary.sent().answers), scene.n_ended()
            wait_until(lambda n=n_answers: len(scene.diary.sent().answers) > n, "the next answer")  # type: ignore[misc]
            wait_until(lambda n=n_ended: scene.n_ended() > n, "the next job's end")  # type: ignore[misc]
        for child in (client, *dispatchers):
            child.stop()
        n_cut_short = sum(path.read_text().count("turn cut short") for path in tmp_path.glob("dispatcher-*.log"))
        history = scene.drain()
        n_unanswered = sum(words[0] == "unavailable" for words in scene.diary.lines())
        counts = counts_of(scene, history)
        tell(outages=len(outages_s), cut=proxy.n_cut, unanswered=n_unanswered, turns_cut_short=n_cut_short, **counts)
    assert min(n_unanswered, n_cut_short) > 0, "neither a client nor a dispatcher met an outage"


def test_a_submit_of_which_the_database_s_answer_is_cut_off_makes_one_job(postgresql: str, tmp_path: Path) -> None:
    """At any byte, and between the commit and its answer: whoever asks again gets the job that was made."""
    wanted = count(30, 300, 3000)
    n_cuts = n_written = 0
    with distant_scene(postgresql, tmp_path) as (scene, proxy):
        n_bytes = _n_bytes_of_a_submit(scene, proxy)
        while n_cuts < wanted:
            key = f"key-{len(scene.diary.sent().keys)}"
            at_any_byte = proxy.cutting(random.randint(1, n_bytes))
            with at_any_byte if n_cuts % 2 else proxy.cutting_at(b"COMMIT\0"), _fresh_bench(scene.their_url) as bench:
                is_answered = submit_one(bench, scene.diary, key, N_STORES)
            n_cuts += not is_answered
            n_written += _is_there(scene, key) and not is_answered
            assert submit_one(scene.bench, scene.diary, key, N_STORES)
            if n_cuts % N_BETWEEN_DRAINS == 0:
                scene.drain()
        history = scene.drain()
        tell(cuts=n_cuts, after_the_write=n_written, **counts_of(scene, history))
    assert wanted // 2 <= n_written < n_cuts, "every cut came on the same side of the write"


def test_a_dispatcher_of_which_the_database_s_answers_are_cut_off_does_each_job_once(
    postgresql: str, tmp_path: Path
) -> None:
    """For a while nobody is told that anything was written: claims, reports and ends are."""
    n_rounds = count(4, 30, 300)
    with distant_scene(postgresql, tmp_path) as (scene, proxy):
        dispatchers = [scene.new_dispatcher(), scene.new_dispatcher()]
        for _ in range(n_rounds):
            scene.submit(4)
            scene.wait_for_work(scene.n_held)
            with proxy.cutting_at(b"COMMIT\0"):
                with proxy.away():
                    pass  # connections that were there before would tell
                n_cut = proxy.n_cut_at
                wait_until(lambda n=n_cut: proxy.n_cut_at >= n + 4, "answers that are cut off", every_s=0.01)  # type: ignore[misc]
        for dispatcher in dispatchers:
            dispatcher.stop()
        history = scene.drain()
        tell(rounds=n_rounds, answers_cut=proxy.n_cut_at, adopted=scene.n_adopted(), **counts_of(scene, history))
    assert proxy.n_cut_at >= 4 * n_rounds


def test_a_submit_of_which_the_service_s_answer_is_cut_off_makes_one_job(tmp_path: Path) -> None:
    n_keys = count(10, 100, 1000)
    answers, n_cuts = [], 0
    with running_service(tmp_path, requests_per_s=1e6) as service, serving(service.app) as url, Proxy(url) as proxy:
        for number in range(n_keys):
            key = f"key-{number}"
            headers = {"Authorization": f"Bearer {service.key}", "Idempotency-Key": key}
            body = {"spec": service.harvest(token_budget=1024 * (number + 1))}
            with proxy.cutting(1):  # the answer has begun: whatever was to be written was
                try:
                    httpx2.post(f"{proxy.url}/v1/jobs", headers=headers, json=body, timeout=LIMIT_S)
                except httpx2.TransportError:
                    n_cuts += 1
            n_jobs = service.count_jobs() if number < 100 else None
            again = httpx2.post(f"{proxy.url}/v1/jobs", headers=headers, json=body, timeout=LIMIT_S)
            assert again.status_code in (200, 201), again.text
            assert n_jobs in (None, number + 1), "it was not written before it was answered"
            answers.append((key, str(again.json()["id"])))
        sent = Sent(keys=frozenset(key for key, _ in answers), answers=tuple(answers))
        history = read_history(service.bench.database, sent)
    check(history)
    tell(keys=n_keys, cuts=n_cuts, jobs=len(history.jobs))
    assert (n_cuts, len(history.jobs)) == (n_keys, n_keys)


def _n_bytes_of_a_submit(scene: Scene, proxy: Proxy) -> int:
    before = proxy.n_bytes_back
    with _fresh_bench(scene.their_url) as bench:
        assert submit_one(bench, scene.diary, "key-0", N_STORES)
    return proxy.n_bytes_back - before


@contextmanager
def _fresh_bench(url: str) -> Iterator[Bench]:
    """With a connection that begins under what the proxy does now."""
    database = Database(url)
    try:
        yield Bench(database)
    finally:
        database.close()


def _is_there(scene: Scene, key: str) -> bool:
    with scene.bench.database.read() as connection:
        statement = select(func.count()).select_from(jobs).where(jobs.c.idempotency_key == key)
        return bool(connection.execute(statement).scalar_one())
