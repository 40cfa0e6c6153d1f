"""The queue from the dispatcher's side, on both databases: claims, fencing, losses."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from gnomon.errors import Conflict, CorruptArtifact, LeaseLost
from gnomon_service.db.engine import Database
from gnomon_service.jobs.held import Lease, RetryPolicy
from gnomon_service.jobs.leases import Leases
from tests.support.service_jobs import PROJECT, STORE_RESULT, Bench, train_spec

WRITES: dict[str, Callable[[Leases, Lease], object]] = {
    "renew": lambda leases, lease: leases.renew(lease),
    "hand_back": lambda leases, lease: leases.hand_back(lease),
    "put_back": lambda leases, lease: leases.put_back(lease, "y"),
    "mark_running": lambda leases, lease: leases.mark_running(lease),
    "place": lambda leases, lease: leases.place(lease, ["n"]),
    "record": lambda leases, lease: leases.record(lease, [(1, "log", {})]),
    "succeed": lambda leases, lease: leases.succeed(lease, STORE_RESULT),
    "fail": lambda leases, lease: leases.fail(lease, code="x", message="y"),
    "cancelled": lambda leases, lease: leases.cancelled(lease),
    "lose": lambda leases, lease: leases.lose(lease, "y"),
}


@pytest.fixture
def bench(database: Database) -> Bench:
    return Bench(database)


def test_every_write_under_a_lease_is_in_the_fencing_tests() -> None:
    public = {name for name in vars(Leases) if not name.startswith("_")}
    fenced = {name for name in public if "lease" in inspect.signature(getattr(Leases, name)).parameters}
    assert fenced == set(WRITES)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("stale", ["attempt", "owner", "finished", "adopted"])
def test_a_stale_lease_writes_nothing(bench: Bench, write: Callable[[Leases, Lease], object], stale: str) -> None:
    job = bench.submit()
    lease = bench.claim("a").lease
    match stale:
        case "attempt":
            bench.leases.lose(lease, "node died")
            bench.release()
            bench.claim("a")
        case "owner":
            lease = replace(lease, owner="b")
        case "finished":
            bench.leases.succeed(lease, STORE_RESULT)
        case "adopted":
            bench.let_lease_pass(job.id)
            assert len(bench.leases.adopt("b")) == 1
    before = (bench.job(job.id), bench.events(job.id), tuple(bench.store_row()))
    with pytest.raises(LeaseLost) as caught:
        write(bench.leases, lease)
    assert caught.value.detail["is_adopted"] is (stale in ("owner", "adopted"))
    assert (bench.job(job.id), bench.events(job.id), tuple(bench.store_row())) == before


def test_claims_go_by_priority_then_age(bench: Bench) -> None:
    low, old, new = bench.submit(store=1, priority=-1), bench.submit(store=2), bench.submit(store=3)
    high = bench.submit(store=4, priority=5)
    assert [bench.claim().lease.job_id for _ in range(4)] == [high.id, old.id, new.id, low.id]


def test_parallel_claims_never_take_a_job_twice(bench: Bench) -> None:
    n_jobs, n_claimers = 200, 8
    made = {bench.submit(store=number).id for number in range(n_jobs)}
    barrier = threading.Barrier(n_claimers)

    def drain(owner: str) -> list[str]:
        barrier.wait()
        taken = []
        while (held := bench.claim_next(owner)) is not None:
            assert held.lease.attempt == 1
            taken.append(held.lease.job_id)
        return taken

    with ThreadPoolExecutor(n_claimers) as pool:
        taken = Counter(job for jobs in pool.map(drain, map(str, range(n_claimers))) for job in jobs)
    assert set(taken) == made
    assert set(taken.values()) == {1}


def test_reports_are_stored_once_however_often_they_come(bench: Bench) -> None:
    job = bench.submit()
    lease = bench.claim().lease
    reports = [(seq, "progress", {"phase": "harvest", "done": seq, "unit": "tokens"}) for seq in (1, 2, 3)]
    assert bench.leases.record(lease, reports[:2]) == 2
    assert bench.leases.record(lease, reports) == 3
    assert bench.leases.record(lease, reports) == 3
    assert [event.data["done"] for event in bench.events(job.id) if event.kind == "progress"] == [1, 2, 3]
    progress = bench.job(job.id).progress
    assert progress is not None
    assert progress.done == 3


def test_reports_of_any_content_can_be_stored(bench: Bench) -> None:
    job = bench.submit()
    data = {"fvu": float("nan"), "lr": float("inf"), "text": "a\x00b\ud800", "list": [float("-inf"), "ü"]}
    bench.leases.record(bench.claim().lease, [(1, "metrics", data)])
    event = bench.events(job.id)[-1]
    assert event.data == {"fvu": None, "lr": None, "text": "ab?", "list": [None, "ü"]}


def test_adoption_keeps_the_attempt_and_the_last_report(bench: Bench) -> None:
    job = bench.submit()
    lease = bench.claim("a").lease
    bench.leases.record(lease, [(1, "log", {}), (2, "log", {})])
    assert bench.leases.adopt("b") == [], "the lease has not passed"
    bench.let_lease_pass(job.id)
    (held,) = bench.leases.adopt("b")
    assert (held.lease.attempt, held.lease.owner, held.last_report_seq, held.is_running) == (1, "b", 2, True)
    bench.leases.succeed(held.lease, STORE_RESULT)


def test_a_lease_handed_back_is_adopted_at_once(bench: Bench) -> None:
    bench.submit()
    lease = bench.claim("a").lease
    bench.leases.hand_back(lease)
    assert [held.lease.job_id for held in bench.leases.adopt("b")] == [lease.job_id]


def test_losses_count_from_what_was_committed_last(bench: Bench) -> None:
    """A month of training may lose any number of machines, as long as it gets on between two losses."""
    job = bench.submit(max_attempts=2)
    committed = (1, "segment", {"name": "part-00000", "kept": False})
    for attempt in range(1, 8):
        lease = bench.claim().lease
        bench.leases.record(lease, [committed])
        bench.leases.lose(lease, "node died")
        bench.release()
        assert (bench.job(job.id).state, bench.job(job.id).attempt, bench.job(job.id).n_losses) == (
            "queued",
            attempt,
            1,
        )
    lease = bench.claim().lease
    bench.leases.record(lease, [(1, "segment", {"name": "part-00000", "kept": True})])
    bench.leases.lose(lease, "node died")
    failed = bench.job(job.id)
    assert failed.error is not None
    assert failed.error.message == "2 attempts in a row were lost and committed nothing; the last one: node died"


def test_a_resumed_job_goes_on_with_its_number_of_attempts_and_a_fresh_count_of_losses(bench: Bench) -> None:
    job = bench.submit(max_attempts=1, deadline_s=3600)
    bench.leases.lose(bench.claim().lease, "node died")
    assert bench.job(job.id).state == "failed" and bench.store_row().state == "failed"
    resumed = bench.queue.resume(PROJECT, job.id)
    assert (resumed.state, resumed.error, resumed.finished_at, resumed.n_losses) == ("queued", None, None, 0)
    assert bench.store_row().state == "harvesting"
    assert bench.claim_next("a") is None, "something of the lost attempt may still run"
    bench.release()
    lease = bench.claim().lease
    assert lease.attempt == 2
    bench.leases.mark_running(lease)
    bench.leases.succeed(lease, STORE_RESULT)
    assert bench.job(job.id).state == "succeeded" and bench.store_row().state == "sealed"
    with pytest.raises(Conflict, match="has succeeded"):
        bench.queue.resume(PROJECT, job.id)


def test_resuming_a_training_resumes_the_harvest_that_it_needs(bench: Bench) -> None:
    job = bench.submit(train_spec())
    harvest = bench.claim().lease
    bench.leases.fail(harvest, code="x", message="y")
    bench.release()
    assert bench.job(job.id).state == "failed"
    assert bench.queue.resume(PROJECT, job.id).state == "queued"
    assert bench.job(harvest.job_id).state == "queued"
    again = bench.claim().lease
    assert (again.job_id, again.attempt) == (harvest.job_id, 2)
    bench.leases.mark_running(again)
    bench.leases.succeed(again, STORE_RESULT)
    bench.release()
    assert bench.claim().lease.job_id == job.id


@pytest.mark.parametrize("code", ["bad_text", "empty_corpus", "too_many_bad_documents", "unknown_field"])
def test_a_harvest_that_its_text_ended_is_submitted_again_and_not_resumed(bench: Bench, code: str) -> None:
    training = bench.submit(train_spec())
    harvest = bench.claim().lease
    bench.leases.fail(harvest, code=code, message="'a.jsonl' line 6 is wrong")
    bench.release()
    for job_id in (harvest.job_id, training.id):
        with pytest.raises(Conflict, match=r"line 6 is wrong; mend the text .* submit it again") as caught:
            bench.queue.resume(PROJECT, job_id)
        assert caught.value.code == "not_resumable"
        assert bench.job(job_id).state == "failed"
    assert bench.store_row().state == "failed"


def test_resuming_a_second_harvest_of_a_store_resumes_the_first(bench: Bench) -> None:
    first, second = bench.submit(), bench.submit()
    bench.leases.fail(bench.claim().lease, code="x", message="y")
    bench.release()
    assert bench.queue.resume(PROJECT, second.id).state == bench.job(first.id).state == "queued"
    again = bench.claim().lease
    assert (again.job_id, bench.claim_next()) == (first.id, None)
    bench.leases.succeed(again, STORE_RESULT)
    assert bench.job(second.id).state == "succeeded" and bench.store_row().job_id == first.id


def test_a_harvest_that_another_job_does_by_now_is_not_resumed(bench: Bench) -> None:
    first = bench.submit()
    bench.leases.fail(bench.claim().lease, code="x", message="y")
    second = bench.submit()
    assert second.id != first.id
    with pytest.raises(Conflict, match=second.id) as caught:
        bench.queue.resume(PROJECT, first.id)
    assert caught.value.code == "store_in_use"
    assert bench.job(first.id).state == "failed"


def test_a_job_whose_claim_was_never_answered_is_adopted_by_its_own_dispatcher(bench: Bench) -> None:
    job = bench.submit()
    bench.claim_next("a")
    bench.let_lease_pass(job.id)
    assert bench.leases.adopt("a", [job.id]) == [], "it is held"
    (held,) = bench.leases.adopt("a", [])
    assert (held.lease.attempt, held.lease.owner) == (1, "a")


def test_a_lost_attempt_runs_again_until_the_last(bench: Bench) -> None:
    job = bench.submit(max_attempts=3)
    for attempt in (1, 2, 3):
        lease = bench.claim().lease
        assert lease.attempt == attempt
        bench.leases.lose(lease, "node died")
        bench.release()
    failed = bench.job(job.id)
    assert (failed.state, failed.error and failed.error.code) == ("failed", "attempts_exhausted")
    assert bench.claim_next("a") is None
    assert bench.store_row().state == "failed"


def test_a_lost_attempt_waits_before_the_next(database: Database) -> None:
    bench = Bench(database)
    bench.leases = Leases(database, lease_s=30.0, retry=RetryPolicy(base_s=60.0))
    bench.submit()
    bench.leases.lose(bench.claim().lease, "node died")
    bench.release()
    assert bench.claim_next("a") is None


def test_a_lost_attempt_must_be_released_before_the_next(bench: Bench) -> None:
    bench.submit()
    bench.leases.lose(bench.claim().lease, "node died")
    assert bench.claim_next("a") is None
    assert len(bench.leases.unreleased()) == 1
    bench.release()
    assert bench.claim().lease.attempt == 2


def test_a_lost_attempt_of_a_cancelled_job_ends_it(bench: Bench) -> None:
    job = bench.submit()
    lease = bench.claim().lease
    bench.queue.cancel(PROJECT, job.id)
    assert bench.leases.wishes("a")[job.id].cancel_requested
    bench.leases.lose(lease, "node died")
    assert bench.job(job.id).state == "cancelled"


def test_a_passed_deadline_fails_a_waiting_job(bench: Bench) -> None:
    job = bench.submit(train_spec(), deadline_s=1)
    running = bench.claim()
    while bench.leases.sweep_deadlines() == 0:
        threading.Event().wait(0.05)
    failed = bench.job(job.id)
    assert (failed.state, failed.error and failed.error.code) == ("failed", "deadline_exceeded")
    assert bench.leases.wishes("a")[running.lease.job_id].deadline_passed
    assert bench.job(running.lease.job_id).cancel_requested, "nothing else needs the harvest"


def test_a_result_without_a_usable_record_changes_nothing(bench: Bench) -> None:
    job = bench.submit()
    lease = bench.claim().lease
    with pytest.raises(CorruptArtifact, match="n_rows"):
        bench.leases.succeed(lease, {"record": {}})
    assert bench.job(job.id).state == "running"
    assert bench.store_row().state == "harvesting"


@pytest.mark.parametrize(("attempt", "full_s"), [(1, 2.0), (3, 8.0), (50, 60.0)])
def test_pauses_grow_to_a_cap_with_jitter(attempt: int, full_s: float) -> None:
    pauses = [RetryPolicy(base_s=2.0, cap_s=60.0).delay_s(attempt) for _ in range(200)]
    assert full_s / 2 <= min(pauses) < max(pauses) <= full_s
