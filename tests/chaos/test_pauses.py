"""Dispatchers that stand still for longer than their leases hold, and then go on as if nothing had happened."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.counts import count, tell
from tests.chaos.history import check
from tests.chaos.reading import read_history
from tests.chaos.scene import Scene, counts_of, scene_of
from tests.support.chaos_children import Child, pause_at_random
from tests.support.waiting import wait_until
from tests.support.working_cluster import Habits


@pytest.fixture
def slow_scene(postgresql: str, tmp_path: Path) -> Iterator[Scene]:
    """One whose jobs take a second or two; on SQLite, who is stopped in a transaction stops all others too."""
    with scene_of(postgresql, tmp_path, habits=Habits(n_reports_most=40, report_s=0.05)) as made:
        yield made


def test_a_dispatcher_that_stands_still_past_its_leases_writes_nothing_stale(slow_scene: Scene) -> None:
    scene, wanted = slow_scene, count(5, 50, 300)
    dispatchers = [scene.new_dispatcher(), scene.new_dispatcher()]
    n_pauses = n_taken = 0
    while n_pauses < wanted:
        if scene.n_in("queued") < 8:
            scene.submit(8)
        sleeper = scene.wait_for_work(lambda: _holder(scene, dispatchers))
        pause_at_random(0.2)
        sleeper.send(signal.SIGSTOP)
        held = scene.held_by(sleeper.name)
        if held:
            wait_until(lambda s=sleeper: not scene.held_by(s.name), f"another to take {held}")  # type: ignore[misc]
            n_pauses += 1
            n_taken += len(held)
        sleeper.send(signal.SIGCONT)
        _look_for_a_while(scene)
    for dispatcher in dispatchers:
        dispatcher.stop()
    n_refused = scene.n_refused()
    history = scene.drain()
    tell(pauses=n_pauses, jobs_taken=n_taken, stale_writes=0, refused=n_refused, **counts_of(scene, history))
    assert min(n_taken, scene.n_adopted(), n_refused) > 0, "no dispatcher came back to jobs that were no longer its own"


def _look_for_a_while(scene: Scene) -> None:
    """A stale renewal would give the lease back without a word: that is seen only while the job is held."""
    for _ in range(8):
        check(read_history(scene.bench.database))
        pause_at_random(0.05)


def _holder(scene: Scene, dispatchers: list[Child]) -> Child | None:
    return next((dispatcher for dispatcher in dispatchers if scene.held_by(dispatcher.name)), None)
