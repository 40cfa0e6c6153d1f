"""Many at once: one key makes one job however often it is sent, and one job is claimed by one."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from gnomon_service.db.engine import Database
from gnomon_service.jobs.held import Placement
from tests.chaos.counts import count, tell
from tests.chaos.history import check
from tests.chaos.reading import Sent, read_history
from tests.support.chaos_children import spec_of
from tests.support.service_jobs import Bench
from tests.support.waiting import LIMIT_S

N_SENDERS = 64
N_CLAIMERS = 16
N_STORES = 5


def test_parallel_sends_of_a_key_make_one_job(database: Database) -> None:
    bench, n_keys = Bench(database), count(4, 50, 1000)
    barrier = threading.Barrier(N_SENDERS)

    def send(key: str) -> str:
        spec, store = spec_of(key, N_STORES)
        barrier.wait(LIMIT_S)
        return bench.submit(spec, store=store, key=key).id

    answers: list[tuple[str, str]] = []
    with ThreadPoolExecutor(N_SENDERS) as pool:
        for number in range(n_keys):
            key = f"key-{number}"
            answers += ((key, job_id) for job_id in pool.map(send, [key] * N_SENDERS))
    history = read_history(database, Sent(keys=frozenset(key for key, _ in answers), answers=tuple(answers)))
    check(history)
    asked_for = [job for job in history.jobs.values() if job["made_for"] is None]
    tell(senders=N_SENDERS, keys=n_keys, answers=len(answers), jobs=len(asked_for))
    assert (len(answers), len(asked_for)) == (N_SENDERS * n_keys, n_keys)


def test_parallel_claims_of_a_job_give_it_to_one(postgresql: str) -> None:
    database, n_jobs = Database(postgresql), count(50, 300, 10_000)
    bench = Bench(database)
    made = [bench.submit(store=number).id for number in range(n_jobs)]
    barrier = threading.Barrier(N_CLAIMERS)

    def claim_all(owner: str) -> list[str]:
        """Each claimer wants every job, in the same order as the others."""
        taken = []
        for job_id in made:
            barrier.wait(LIMIT_S)
            held = bench.leases.claim(owner, job_id, Placement(places=("n",)))
            if held is not None:
                assert (held.lease.job_id, held.lease.attempt) == (job_id, 1)
                taken.append(job_id)
        return taken

    with ThreadPoolExecutor(N_CLAIMERS) as pool:
        by_owner = list(pool.map(claim_all, map(str, range(N_CLAIMERS))))
    taken = Counter(job_id for job_ids in by_owner for job_id in job_ids)
    n_winners, n_double = sum(map(bool, by_owner)), sum(n - 1 for n in taken.values())
    check(read_history(database))
    database.close()
    tell(claimers=N_CLAIMERS, jobs=n_jobs, claimed=len(taken), double=n_double, winners=n_winners)
    assert (set(taken), n_double) == (set(made), 0)
    assert n_winners > 1, "one claimer was always first: nothing was claimed in parallel"
