"""Clients and dispatchers as processes of their own, to be killed and stopped at any moment.

They are forked from a server that has imported everything, so that a life begins within milliseconds.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Self

import httpx2

from gnomon.errors import Unavailable
from gnomon.specs import HarvestSpec, Mesh, TrainSpec
from gnomon_service.db.engine import Database
from gnomon_service.dispatch.cluster_state import Observations
from gnomon_service.dispatch.collecting import Collector
from gnomon_service.dispatch.deciding import Scheduler
from gnomon_service.dispatch.garbage import DAY_S, Rules
from gnomon_service.dispatch.loop import Dispatcher
from gnomon_service.jobs.held import RetryPolicy
from gnomon_service.jobs.leases import Leases
from gnomon_service.settings import Settings
from tests.chaos.reading import Sent
from tests.support.service_api import harvest_of, train_on
from tests.support.service_jobs import Bench, harvest_spec, train_spec
from tests.support.waiting import LIMIT_S
from tests.support.working_cluster import RemoteCluster

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass(frozen=True, slots=True)
class Child:
    """A process that this test started."""

    name: str
    process: BaseProcess

    @classmethod
    def begin(cls, name: str, target: Callable[..., None], *args: Any) -> Self:
        """Run a function of this module in a process, which can be stopped from now on."""
        is_ready = _context.Event()
        process = _context.Process(target=target, args=(is_ready, *args), daemon=True)
        process.start()
        assert is_ready.wait(LIMIT_S), f"{name} did not begin"
        return cls(name, process)

    def send(self, number: signal.Signals) -> None:
        """Signal it; it must be alive."""
        assert self.process.pid is not None
        assert self.process.exitcode is None, f"ended by itself with {self.process.exitcode}"
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it as nothing can be prepared for; fails if it ended before."""
        self.send(signal.SIGKILL)
        self.process.join(LIMIT_S)
        assert self.process.exitcode == -signal.SIGKILL

    def stop(self) -> None:
        """Ask it to end, and wait; fails if it met anything that it was not made for."""
        self.send(signal.SIGTERM)
        self.process.join(LIMIT_S)
        assert self.process.exitcode == 0, f"ended with {self.process.exitcode}"


# ---------------------------------------------------------------------------------------------- clients


def spec_of(key: str, n_stores: int) -> tuple[HarvestSpec | TrainSpec, int]:
    """The one request that comes with a key, and its store."""
    choice = random.Random(key)
    store = choice.randint(1, n_stores)
    if choice.random() < 0.5:
        return harvest_spec(), store
    return train_spec(mesh=Mesh(dp=1, features=choice.randint(1, 2)), batch_size=1024), store


class Diary:
    """What a client sent and was answered, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, *words: str) -> None:
        """Add a line, at once."""
        with self.path.open("ab", buffering=0) as file:
            file.write((" ".join(words) + "\n").encode())

    def lines(self) -> list[list[str]]:
        """All lines by their words."""
        text = self.path.read_text() if self.path.exists() else ""
        return [line.split() for line in text.splitlines()]

    def sent(self) -> Sent:
        """Keys and answers, for the checker."""
        lines = self.lines()
        return Sent(
            keys=frozenset(words[1] for words in lines if words[0] == "sent"),
            answers=tuple((words[1], words[2]) for words in lines if words[0] == "answer"),
        )

    def unanswered(self) -> list[str]:
        """Keys that were sent in vain, as far as the client knows."""
        answered = {key for key, _ in self.sent().answers}
        return [words[1] for words in self.lines() if words[0] == "sent" and words[1] not in answered]


def submit_one(bench: Bench, diary: Diary, key: str, n_stores: int) -> bool:
    """Send one request once; whether there was an answer."""
    diary.write("sent", key)
    spec, store = spec_of(key, n_stores)
    try:
        job = bench.submit(spec, store=store, key=key, max_attempts=10)
    except Unavailable as error:
        diary.write("unavailable", key, type(getattr(error.__cause__, "orig", None)).__name__)
        return False
    diary.write("answer", key, job.id)
    return True


def submit_for_ever(is_ready: Event, url: str, diary_path: Path, n_stores: int, pause_s: float) -> None:
    """Send requests one after the other, each until it is answered; sometimes first the one that a former life left."""
    stop = stop_on_sigterm(is_ready)
    diary = Diary(diary_path)
    bench = Bench(Database(url, busy_timeout_s=LIMIT_S))
    left = diary.unanswered()[-1:] if random.random() < 0.5 else []
    number = len(diary.sent().keys)
    while not stop.wait(pause_s):
        if not left:
            left, number = [f"key-{number}"], number + 1
        if submit_one(bench, diary, left[0], n_stores):
            left = []


def post_for_ever(is_ready: Event, url: str, api_key: str, inputs: Path, diary_path: Path, pause_s: float) -> None:
    """Send requests to an API, one after the other, each until it is answered; every second is a training."""
    stop = stop_on_sigterm(is_ready)
    diary = Diary(diary_path)
    with httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=LIMIT_S) as client:
        for number in itertools.count(len(diary.sent().keys)):
            while not post_one(client, diary, f"key-{number}", inputs, number):
                if stop.wait(max(pause_s, 0.1)):
                    return
            if stop.wait(pause_s):
                return


def post_one(client: httpx2.Client, diary: Diary, key: str, inputs: Path, number: int) -> bool:
    """Send one request once; whether there was an answer."""
    harvest = harvest_of(inputs) | {"token_budget": 1024 * (number + 1)}
    spec = train_on(inputs) | {"activations": harvest} if number % 2 else harvest
    diary.write("sent", key)
    try:
        answer = client.post("/v1/jobs", headers={"Idempotency-Key": key}, json={"spec": spec, "max_attempts": 10})
    except httpx2.TransportError as error:
        diary.write("unavailable", key, type(error).__name__)
        return False
    if answer.status_code == 503:
        diary.write("unavailable", key, answer.json()["code"])
        return False
    assert answer.is_success, answer.text
    diary.write("answer", key, answer.json()["id"])
    return True


# ---------------------------------------------------------------------------------------------- dispatchers


def dispatch(
    is_ready: Event, url: str, cluster_port: int, home: Path, owner: str, lease_s: float, poll_s: float = 0.02
) -> None:
    """Run a dispatcher until SIGTERM; what it logs is in a file of its owner's name."""
    stop = stop_on_sigterm(is_ready)
    logging.basicConfig(filename=home / f"{owner}.log", level=logging.INFO)
    database = Database(url, busy_timeout_s=LIMIT_S)
    settings = Settings(
        home=home, storage_root="file:///store", poll_s=poll_s, lease_s=lease_s, beat_s=lease_s / 4, cancel_grace_s=2.0
    )
    Dispatcher(
        leases=Leases(database, lease_s=lease_s, retry=RetryPolicy(base_s=0.05, cap_s=0.1)),
        observations=Observations(database),
        scheduler=Scheduler(database),
        cluster=RemoteCluster(cluster_port),
        settings=settings,
        owner=owner,
    ).run(stop)
    database.close()


def collect_for_ever(is_ready: Event, url: str, projects: str, kept_s: float) -> None:
    """Collect what ended so many seconds ago, until SIGTERM."""
    stop = stop_on_sigterm(is_ready)
    database = Database(url, busy_timeout_s=LIMIT_S)
    rules = Rules(resumable_days=kept_s / DAY_S, settled_s=0.0)
    with Collector(database, projects, rules).running(every_s=0.01):
        stop.wait()
    database.close()


# ---------------------------------------------------------------------------------------------- clocks


def in_other_times(is_ready: Event, off_h: tuple[float, ...], target: Callable[..., None], *args: Any) -> None:
    """Run a child whose clock is hours off, and jumps from one of these to the next every half second."""
    true_time = time.time

    def wrong_time() -> float:
        return true_time() + 3600.0 * off_h[int(time.monotonic() / 0.5) % len(off_h)]

    time.time = wrong_time
    assert abs(time.time() - true_time()) > 1.0
    target(is_ready, *args)


def pause_at_random(most_s: float) -> None:
    """Let any time pass, so that what comes next comes at any moment."""
    time.sleep(random.uniform(0.0, most_s))


def stop_on_sigterm(is_ready: Event) -> threading.Event:
    """What is set when this process is to end; from now on it may be told to."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test, which ends its children
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    is_ready.set()
    return stop


def _end_with_the_test() -> None:
    """Where the test was killed, nobody else ends its children."""
    test = multiprocessing.parent_process()
    assert test is not None
    test.join()
    os._exit(1)
