"""Is the service as quick with a long queue and many followers as with none, and does its memory stay?

    python benchmarks/queue_load.py --database postgresql --minutes 20

On two cores: the API as `gnomon api` starts it, a dispatcher that decides every half second on a cluster that works,
and this process, which asks. First with a queue that is empty, then with 10,000 queued jobs and 100 event streams that
are followed as the SDK does: submit, a job, the list and the cluster, each in turn. Then 40 jobs at once whose model
takes seconds to look at, while /healthz is asked every 20 ms. Ends with 1 where a 95th percentile is more than 1.5 of
that without load, /healthz took longer than 50 ms, or memory grew by more than a tenth after the first minute.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import psutil
from sqlalchemy import insert, select
from tests.support.api_process import ApiProcess
from tests.support.chaos_children import Child, dispatch, stop_on_sigterm
from tests.support.databases import fresh_database
from tests.support.models import make_lists_of_layers
from tests.support.service_api import harvest_of
from tests.support.service_jobs import Bench, store_id
from tests.support.working_cluster import Habits, WorkingCluster, serving_cluster

from gnomon import AsyncClient
from gnomon_service.db.engine import Database
from gnomon_service.db.tables import activation_stores, job_events, jobs
from gnomon_service.jobs.ids import make_id

N_CORES = 2
N_SLOW = 40
MOST_RATIO = 1.5
MOST_HEALTH_MS = 50.0
MOST_GROWTH = 1.1
HABITS = Habits(n_reports_most=100_000, report_s=1.0, p_lost=0.0, p_failed=0.0)


@dataclass(slots=True, kw_only=True)
class Place:
    """A service that runs."""

    url: str
    key: str
    inputs: Path
    bench: Bench
    processes: dict[str, psutil.Process]
    memory: dict[str, list[float]] = field(default_factory=dict)
    n_submits: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """To slow submits."""

    def client(self) -> httpx2.Client:
        """One connection."""
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=120)

    def spec(self, model: str = "model") -> dict[str, Any]:
        """A harvest of which there is no store yet."""
        self.n_submits += 1
        changes = {"model": {"source": str(self.inputs / model)}, "token_budget": 1024 + self.n_submits}
        return harvest_of(self.inputs) | changes

    def note_memory(self) -> None:
        """Remember what each process holds, in MiB."""
        for name, process in self.processes.items():
            self.memory.setdefault(name, []).append(process.memory_info().rss / 2**20)


def main() -> int:
    """Run, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--followers", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=100, help="of asking everything, without load")
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:N_CORES]))
    with tempfile.TemporaryDirectory(prefix="gnomon-load-") as folder, ExitStack() as stack:
        place = stack.enter_context(service(Path(folder), options.database))
        ask(place, options.rounds // 5)  # what is made once was made
        before = ask(place, options.rounds)
        fill(place.bench, options.jobs)
        followed = choose(place.bench, options.followers)
        follower = Child.begin("followers", follow, place.url, place.key, followed)
        stack.callback(follower.kill)
        time.sleep(10.0)  # all jobs are looked up once
        loaded: dict[str, list[float]] = {}
        for _ in range(options.minutes):
            place.note_memory()
            merge(loaded, ask_for(place, 60.0))
        place.note_memory()
        health = slow_submits(place)
        return report(place, before, loaded, health)


@contextmanager
def service(home: Path, dialect: str) -> Iterator[Place]:
    """An API and a dispatcher, each a process of its own."""
    with fresh_database(dialect, home) as url, serving_cluster(WorkingCluster(HABITS)) as port:
        api = ApiProcess.on(url, home)
        for number in range(N_SLOW):
            make_lists_of_layers(api.inputs / f"slow-{number}", number)
        with api:
            dispatcher = Child.begin("dispatcher", dispatch, url, port, home, "dispatcher", 30.0, 0.5)
            processes = {"API": api.process, "dispatcher": psutil.Process(dispatcher.process.pid)}
            bench = Bench(Database(url))
            try:
                yield Place(url=api.url, key=api.key, inputs=api.inputs, bench=bench, processes=processes)
            finally:
                dispatcher.kill()
                bench.database.close()


# ---------------------------------------------------------------------------------------------- load


def fill(bench: Bench, n: int) -> None:
    """Queue so many harvests, each of a store of its own: copies of one that was submitted."""
    first = bench.submit(store=10**9)
    with bench.database.write() as connection:
        job = dict(connection.execute(select(jobs).where(jobs.c.id == first.id)).mappings().one())
        event = dict(connection.execute(select(job_events).where(job_events.c.job_id == first.id)).mappings().one())
        of_job = activation_stores.c.job_id == first.id
        store = dict(connection.execute(select(activation_stores).where(of_job)).mappings().one())
        made = [(make_id("job"), store_id(10**9 + number)) for number in range(1, n)]
        connection.execute(insert(jobs), [{**job, "id": job_id, "store_id": of} for job_id, of in made])
        connection.execute(insert(job_events), [{**event, "job_id": job_id} for job_id, _ in made])
        connection.execute(insert(activation_stores), [{**store, "id": of, "job_id": job_id} for job_id, of in made])


def choose(bench: Bench, n: int) -> list[str]:
    """Jobs to follow: those that run, and queued ones."""
    statement = select(jobs.c.id).where(jobs.c.state.in_(("running", "queued"))).order_by(jobs.c.state.desc())
    with bench.database.read() as connection:
        return list(connection.execute(statement.limit(n)).scalars())


def follow(is_ready: Event, url: str, key: str, job_ids: list[str]) -> None:
    """Follow jobs, each over a connection of its own."""
    stop_on_sigterm(is_ready)

    async def one(job_id: str) -> None:
        async with AsyncClient(url, key) as client:
            async for _ in client.events(job_id, follow=True):
                pass

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, job_ids))

    asyncio.run(all_of_them())


# ---------------------------------------------------------------------------------------------- questions


def ask(place: Place, n_rounds: int) -> dict[str, list[float]]:
    """Ask everything so many times; what each took, in ms."""
    took: dict[str, list[float]] = {}
    with place.client() as client:
        for _ in range(n_rounds):
            job_id = timed(took, "submit", lambda: client.post("/v1/jobs", json={"spec": place.spec()}))["id"]
            timed(took, "job", lambda job_id=job_id: client.get(f"/v1/jobs/{job_id}"))  # type: ignore[misc]
            timed(took, "list", lambda: client.get("/v1/jobs"))
            timed(took, "cluster", lambda: client.get("/v1/cluster"))
            client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()  # or the queue would grow
            time.sleep(0.05)
    return took


def ask_for(place: Place, seconds: float) -> dict[str, list[float]]:
    """Ask everything again and again for so long."""
    took: dict[str, list[float]] = {}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        merge(took, ask(place, 1))
    return took


def timed(took: dict[str, list[float]], name: str, send: Callable[[], httpx2.Response]) -> Any:
    """What was answered; how long that took is noted."""
    began = time.perf_counter()
    answer = send()
    took.setdefault(name, []).append(1e3 * (time.perf_counter() - began))
    answer.raise_for_status()
    return answer.json()


def merge(all_of_it: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    """Add numbers to those there are."""
    for name, numbers in more.items():
        all_of_it.setdefault(name, []).extend(numbers)


def slow_submits(place: Place) -> list[float]:
    """Send all slow requests at once, and ask for /healthz until they are answered; what that took, in ms."""

    # made before: each takes this process tens of ms, of which /healthz would be accused
    clients, specs = [place.client() for _ in range(N_SLOW)], [place.spec(f"slow-{n}") for n in range(N_SLOW)]

    def send(client: httpx2.Client, spec: dict[str, Any]) -> None:
        answer = client.post("/v1/jobs", json={"spec": spec})
        place.answers[str(answer.json().get("code", answer.status_code))] += 1

    threads = [threading.Thread(target=send, args=each) for each in zip(clients, specs, strict=True)]
    for thread in threads:
        thread.start()
    took: dict[str, list[float]] = {}
    with place.client() as client:
        while any(thread.is_alive() for thread in threads):
            timed(took, "health", lambda: client.get("/healthz"))
            time.sleep(max(0.0, 0.02 - took["health"][-1] / 1e3))
    return sorted(took["health"])


# ---------------------------------------------------------------------------------------------- what it was


def report(place: Place, before: dict[str, list[float]], loaded: dict[str, list[float]], health: list[float]) -> int:
    """Print the table; 1 where a goal was missed."""
    is_met = health[-1] < MOST_HEALTH_MS
    print("ms          empty: median    p95    loaded: median    p95    p95 over p95")
    for name, numbers in before.items():
        row = [statistics.median(numbers), p95(numbers), statistics.median(loaded[name]), p95(loaded[name])]
        ratio = row[3] / row[1]
        is_met &= ratio <= MOST_RATIO
        print(f"{name:<10} {row[0]:>14.1f} {row[1]:>6.1f} {row[2]:>17.1f} {row[3]:>6.1f} {ratio:>15.2f}")
    slow_ms = health[int(0.99 * len(health))]
    print(
        f"/healthz during {N_SLOW} slow submits, {len(health)} times: median {statistics.median(health):.1f} ms, "
        f"p99 {slow_ms:.1f} ms, longest {health[-1]:.1f} ms; answers {dict(place.answers)}"
    )
    for name, mib in place.memory.items():
        is_met &= mib[-1] <= MOST_GROWTH * mib[min(1, len(mib) - 1)]
        print(f"{name} memory by minute, MiB: {' '.join(f'{each:.0f}' for each in mib)}")
    return int(not is_met)


def p95(numbers: list[float]) -> float:
    """The 95th percentile."""
    return sorted(numbers)[int(0.95 * len(numbers))]


if __name__ == "__main__":
    sys.exit(main())
