"""Nodes of Ray that go, and Ray's head itself: jobs go on from what they had committed, to the same bits."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx2

from gnomon.resources import Job
from gnomon_service.db.engine import Database
from tests.chaos.counts import count, tell
from tests.chaos.history import check
from tests.chaos.live import Live, Trained, live_service
from tests.chaos.reading import History, read_history
from tests.support.own_processes import own_programs
from tests.support.rays import two_machines
from tests.support.waiting import LIMIT_S, wait_until

N_STEPS, EVERY = 1000, 100
HEAD: Final = ("gcs_server", "raylet")
"""Programs without either of which a Ray of one node is gone."""


def test_a_node_that_is_lost_costs_no_job_and_no_bit(tmp_path: Path) -> None:
    """A harvest goes on on the other node; the gang has room on the second alone, and waits until there is another."""
    with (
        two_machines(n_cpus=1, n_cpus_of_second=2) as machines,
        live_service(tmp_path, ray_address=machines.address, retry_base_s=0.1) as live,
    ):
        undisturbed = live.trained(live.finish(submit(live)))
        made: list[str] = []
        n_untold = 0
        for _ in range(count(1, 2, 40)):
            live.forget_harvest()
            job_id = submit(live)
            harvest = when_harvesting(live, job_id)
            machines.lose_second()
            live.finish(harvest)
            machines.add_second()
            when_training(live, job_id)
            machines.lose_second()
            when_told_lost(live, job_id)
            machines.add_second()
            n_untold += untold(live, live.finish(job_id), undisturbed)
            made += [harvest, job_id]
        history = history_of(live, made)
    lost, replaced = losses_in(history, made), n_replaced(history, made)
    attempts = sum(len(history.attempts[job_id]) for job_id in made)
    counts = {"attempts": attempts, "replaced": replaced, "steps_untold": n_untold}
    tell(nodes_lost=len(made), jobs=len(made), **counts, reasons=sorted(lost))
    assert all(len(history.attempts[job_id]) > 1 for job_id in made[1::2]), "a node went that no gang was on"
    assert replaced + lost.total() >= len(made), "a node went that no worker was on"


def test_a_ray_that_is_killed_is_started_again_and_its_jobs_go_on(tmp_path: Path) -> None:
    """That of `gnomon up`; the API answers meanwhile, and no job fails for it."""
    with live_service(tmp_path, retry_base_s=0.1) as live, asking(live) as answers:
        undisturbed = live.trained(live.finish(submit(live)))
        made: list[str] = []
        n_untold = 0
        for number in range(count(1, 2, 40)):
            live.forget_harvest()
            job_id = submit(live)
            made += [when_harvesting(live, job_id), job_id]
            kill_ray(HEAD[number % 2])
            when_training(live, job_id)
            kill_ray(HEAD[1 - number % 2])
            n_untold += untold(live, live.finish(job_id), undisturbed)
        history = history_of(live, made)
    lost = losses_in(history, made)
    attempts = [len(history.attempts[job_id]) for job_id in made]
    counts = {"attempts": sum(attempts), "steps_untold": n_untold}
    tell(kills=len(made), jobs=len(made), **counts, answers=dict(answers), reasons=sorted(lost))
    assert min(attempts) > 1, "Ray was killed, and an attempt went on"
    assert lost.total() == sum(attempts) - len(made)
    assert set(answers) == {200}


def untold(live: Live, job: Job, undisturbed: Trained) -> int:
    """Steps whose loss went with a machine before it was told; weights, and what was told, are as they must be."""
    found = live.trained(job)
    assert found.weights == undisturbed.weights
    assert found.losses.items() <= undisturbed.losses.items()
    return len(undisturbed.losses) - len(found.losses)


def submit(live: Live) -> str:
    """A training of some seconds, and before it a harvest of as many."""
    return live.submit(n_steps=N_STEPS, every=EVERY, n_tokens=40_000)


def when_harvesting(live: Live, job_id: str) -> str:
    """Wait until the harvest that a job needs has committed a segment; returns the harvest."""
    (harvest,) = live.job(job_id).depends_on
    wait_until(lambda: live.told(harvest, "segment"), lambda: f"a segment of {live.job(harvest)}")
    assert live.job(harvest).state == "running", "the harvest is over before anything could happen"
    return harvest


def when_training(live: Live, job_id: str) -> None:
    """Wait until a job has told of a checkpoint, well before its end."""
    wait_until(lambda: live.told(job_id, "checkpoint"), lambda: f"a checkpoint of {live.job(job_id)}")
    assert live.job(job_id).state == "running", "the training is over before anything could happen"


def when_told_lost(live: Live, job_id: str) -> None:
    """Wait until the loss of an attempt is told."""
    wait_until(
        lambda: any(data.get("code") == "attempt_lost" for data in live.told(job_id, "state")),
        lambda: f"the loss of {live.job(job_id)}",
    )


def kill_ray(program: str) -> None:
    """kill -9 one of the programs of this service's Ray, and wait until there is another."""
    (victim,) = own_programs(program)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: set(own_programs(program)) - {victim}, f"another {program}")


@contextmanager
def asking(live: Live) -> Iterator[Counter[int]]:
    """Ask the API again and again meanwhile, and count its answers by their status; none is 0."""
    answers: Counter[int] = Counter()
    stop = threading.Event()

    def ask() -> None:
        headers = {"Authorization": f"Bearer {live.key}"}
        while not stop.wait(0.1):
            try:
                answer = httpx2.get(f"{live.client.url}/v1/jobs", headers=headers, timeout=LIMIT_S)
                answers[answer.status_code] += 1
            except httpx2.TransportError:
                answers[0] += 1

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield answers
    finally:
        stop.set()
        asker.join()


def history_of(live: Live, job_ids: list[str]) -> History:
    """What the database tells, which must be sound, of the jobs that were acknowledged."""
    database = Database(live.settings.database_url)
    history = read_history(database)
    database.close()
    check(history)
    assert {history.jobs[job_id]["state"] for job_id in job_ids} == {"succeeded"}
    return history


def losses_in(history: History, job_ids: list[str]) -> Counter[str]:
    """Attempts that were lost, by the reason that is told, on one line."""
    rows = [row for job_id in job_ids for row in history.attempts[job_id] if row["state"] == "lost"]
    assert all(row["message"] and "\n" not in row["message"] for row in rows), rows
    return Counter(row["message"] for row in rows)


def n_replaced(history: History, job_ids: list[str]) -> int:
    """Workers that were replaced within their attempt."""
    events = [event for job_id in job_ids for event in history.events[job_id] if event["kind"] == "log"]
    return sum(" is replaced" in event["data"]["message"] for event in events)
