"""Jobs that are cancelled at any moment of their lives."""

from __future__ import annotations

import threading
import time

from gnomon.resources import TERMINAL_STATES
from tests.chaos.counts import count, tell
from tests.chaos.scene import Scene, counts_of
from tests.support.chaos_children import pause_at_random
from tests.support.service_jobs import PROJECT
from tests.support.waiting import wait_until
from tests.support.working_cluster import Habits

STOPS_IN_S = 10.0
TICK_S = 0.02


class MachineClock:
    """Seconds in which a thread that does nothing got its turn: on a machine that stands still, they do too."""

    def __init__(self) -> None:
        self.now_s = 0.0
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.now_s += TICK_S


def test_a_job_that_is_cancelled_stops_and_is_not_lost(scene: Scene) -> None:
    """Also one that does not stop by itself, which is ended after two seconds."""
    scene.cluster.habits = Habits(n_reports_most=20, report_s=0.1, p_stubborn=0.2)
    n_rounds, clock = count(4, 30, 200), MachineClock()
    dispatcher = scene.new_dispatcher()
    slowest_s, n_cancelled, n_busy = 0.0, 0, 0
    for _ in range(n_rounds):
        scene.submit(4)
        chosen = [job_id for _, job_id in scene.diary.sent().answers[-4:]]
        pause_at_random(1.0)
        n_busy += scene.n_held() > 0
        asked = {}
        for job_id in chosen:
            scene.bench.queue.cancel(PROJECT, job_id)
            asked[job_id] = clock.now_s
        for job_id, asked_s in asked.items():
            wait_until(lambda j=job_id: scene.bench.job(j).state in TERMINAL_STATES, f"the end of {job_id}")  # type: ignore[misc]
            slowest_s = max(slowest_s, clock.now_s - asked_s)
            n_cancelled += scene.bench.job(job_id).state == "cancelled"
    # a harvest that nobody cancelled, as others want it, would go on for ever where it does not stop by itself
    scene.cluster.habits = Habits()
    dispatcher.stop()
    history = scene.drain()
    tell(cancels=4 * n_rounds, cancelled=n_cancelled, slowest_s=round(slowest_s, 2), **counts_of(scene, history))
    assert min(n_cancelled, n_busy) > 0, "nothing that ran was cancelled"
    assert slowest_s <= STOPS_IN_S
