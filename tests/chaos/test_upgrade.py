"""A database of the previous release that is brought up to date while its processes go on writing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Final

import pytest

from gnomon.specs import HarvestSpec, TrainSpec
from gnomon_service.db.engine import Database
from gnomon_service.db.upgrading import upgrade
from tests.chaos.counts import count, tell
from tests.chaos.scene import LEASE_S, N_STORES, Scene, counts_of, scene_of
from tests.support.chaos_children import Child, pause_at_random
from tests.support.databases import DIALECTS, fresh_database
from tests.support.old_children import assignment_of, dispatch_as_before, migrate_once, submit_as_before
from tests.support.old_release import REVISION, OldRelease
from tests.support.waiting import LIMIT_S, wait_until
from tests.support.working_cluster import DIED

FORGOTTEN: Final = "the cluster no longer knows the attempt"
ENDS: Final = ("succeeded", "failed", "cancelled")
FATES: Final = (*ENDS, "running", "forgotten", "scheduled")
N_BEFORE: Final = 40


@pytest.fixture(params=DIALECTS)
def old_scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """One on a database of the previous release."""
    with fresh_database(request.param, tmp_path) as url:
        database = Database(url)
        upgrade(database, to=REVISION)
        database.close()
        with scene_of(url, tmp_path) as made:
            yield made


def test_a_database_that_is_migrated_under_load_loses_nothing(old_scene: Scene) -> None:
    scene = old_scene
    queue = OldRelease(scene.bench.database)
    fill(scene, queue)
    ended = {job_id: row for job_id, row in queue.rows().items() if row["finished_at"] is not None}
    clients, dispatchers = begin_old(scene, n=count(2, 4, 8))
    for _ in range(count(2, 10, 60)):
        kill_an_upgrade(scene)
    upgrades = [Child.begin(f"upgrade-{number}", migrate_once, scene.url) for number in range(2)]
    for child in upgrades:
        child.process.join(LIMIT_S)
        assert child.process.exitcode == 0
    wait_until(lambda: len(refusals(scene)) == len(dispatchers), "each old dispatcher's claim to be refused")
    n_answers = len(scene.diary.sent().answers)
    wait_until(lambda: len(scene.diary.sent().answers) > n_answers + 5, "old clients to go on")
    for index, child in enumerate((*clients, *dispatchers)):
        child.kill() if index % 2 else child.stop()
    assert all("stop_it_and_start_the_present_one" in words[2] for words in refusals(scene))
    history = scene.drain(may_lose={DIED, FORGOTTEN})
    now = queue.rows()
    assert {job_id: now[job_id] for job_id in ended} == ended
    assert all(isinstance(scene.bench.job(job_id).spec, HarvestSpec | TrainSpec) for job_id in history.jobs)
    n_retried = sum(row["message"] == FORGOTTEN for tries in history.attempts.values() for row in tries)
    tell(refused=len(dispatchers), adopted=scene.n_adopted(), retried=n_retried, **counts_of(scene, history))
    assert min(n_retried, scene.n_adopted()) > 0, "nothing that ran went on after the upgrade"


def fill(scene: Scene, queue: OldRelease) -> None:
    """Jobs in each state, as they were made and moved by the previous release."""
    for number in range(N_BEFORE):
        key = f"before-{number}"
        scene.diary.write("sent", key)
        scene.diary.write("answer", key, queue.submit(key, N_STORES // 4))
    fates = cycle(FATES)
    n_done = dict.fromkeys(FATES, 0)
    while min(n_done.values()) == 0:
        taken = queue.claim("gone", 5 * LEASE_S)
        assert taken is not None, n_done
        fate = next(fates) if taken.kind == "train" else "succeeded"
        n_done[fate] += taken.kind == "train"
        if fate == "scheduled":
            continue
        queue.start(taken)
        if fate in ENDS:
            queue.end(taken, fate, code=None if fate == "succeeded" else fate)
            queue.release(taken)
        elif fate == "running":
            scene.cluster.call("start", assignment_of(taken))


def begin_old(scene: Scene, n: int) -> tuple[list[Child], list[Child]]:
    """Clients and dispatchers of the previous release, which are at work."""
    clients = [
        Child.begin(f"old-{i}", submit_as_before, scene.url, scene.diary.path, f"old-{i}", N_STORES, 0.02)
        for i in range(n)
    ]
    dispatchers = [
        Child.begin(f"old-d-{i}", dispatch_as_before, scene.url, scene.port, scene.diary.path, f"old-d-{i}", LEASE_S)
        for i in range(n)
    ]
    scene.children += (*clients, *dispatchers)
    n_before = len(scene.cluster.attempts)
    wait_until(lambda: len(scene.cluster.attempts) > n_before + n, "old dispatchers at work")
    return clients, dispatchers


def kill_an_upgrade(scene: Scene) -> None:
    """At any moment of it; afterwards the schema is either of the two, and whole."""
    child = Child.begin("upgrade", migrate_once, scene.url)
    pause_at_random(0.1)
    if child.process.is_alive():
        child.send(signal.SIGKILL)
    child.process.join(LIMIT_S)
    assert child.process.exitcode in (0, -signal.SIGKILL)


def refusals(scene: Scene) -> list[list[str]]:
    """What old dispatchers were told when they claimed."""
    return [words for words in scene.diary.lines() if words[0] == "refused"]
