"""An attempt waits for what is away, for as long as it takes, and ends at once for a reason of its own."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gnomon.errors import CorruptArtifact, StoreUnavailable
from gnomon.events import CheckpointSaved, Logged
from gnomon.specs import HarvestSpec
from gnomon_workers.attempts import supervisor as supervisors
from gnomon_workers.attempts.supervisor import Supervisor
from gnomon_workers.runtime.protocol import Assignment, Outcome
from gnomon_workers.runtime.reporting import Reporter
from tests.support.service_jobs import harvest_spec
from tests.support.waiting import wait_until

Runner = Callable[[Assignment, Reporter], Mapping[str, Any]]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisors, "LONGEST_PAUSE_S", 0.04)


def begin(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> Supervisor:
    """A supervisor whose job is the given function."""
    monkeypatch.setitem(supervisors.RUNNERS, "harvest", (HarvestSpec, runner))
    spec = harvest_spec().model_dump(mode="json")
    fields: dict[str, Any] = {"job_id": "job_1", "attempt": 1, "project": "p", "kind": "harvest", "spec": spec}
    return Supervisor(Assignment(**fields, storage_root="file:///s", input_roots=(), store_id="act_1"))


def outcome_of(supervisor: Supervisor) -> Outcome:
    def outcome() -> Outcome | None:
        return supervisor.poll(0).outcome

    return wait_until(outcome, "the outcome")


def pauses_of(supervisor: Supervisor) -> list[str]:
    """What was said before each pause."""
    logs = [report.data["message"] for report in supervisor.poll(0).reports if report.kind == "log"]
    return [message for message in logs if message.startswith("waiting (")]


def waiting_for(n_times: int, error: Exception, *, commits_at: int | None = None) -> Runner:
    """A job to which something happens n_times; before one of them it commits something."""
    calls = iter(range(n_times + 1))

    def run(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
        number = next(calls)
        if number == commits_at:
            reporter.report(CheckpointSaved(step=1, n_bytes=1, copy_s=0.0, duration_s=0.0))
        if number < n_times:
            raise error
        return {"attempt": assignment.attempt}

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreUnavailable("the object store failed"), "store_unavailable"),
        (StoreUnavailable("full", code="store_full"), "store_full"),
        (OSError(errno.ENOSPC, "no space left"), "store_full"),
    ],
    ids=["away", "full", "raw"],
)
def test_the_attempt_waits_and_goes_on(monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    supervisor = begin(monkeypatch, waiting_for(7, error))
    outcome = outcome_of(supervisor)
    assert (outcome.status, outcome.result) == ("succeeded", {"attempt": 1})
    said = pauses_of(supervisor)
    assert len(said) == 7 and all(text.startswith(f"waiting ({code}): ") for text in said)
    progress = [report.data for report in supervisor.poll(0).reports if report.kind == "progress"]
    assert {(told["phase"], told["code"]) for told in progress} == {("waiting", code)}


def test_pauses_grow_and_begin_anew_after_something_was_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(supervisors, "LONGEST_PAUSE_S", 4.0)
    monkeypatch.setattr(Reporter, "wait", lambda self, _: self.check_cancelled())
    supervisor = begin(monkeypatch, waiting_for(6, StoreUnavailable("away"), commits_at=4))
    assert outcome_of(supervisor).status == "succeeded"
    assert [text.rsplit("again in ", 1)[1] for text in pauses_of(supervisor)] == [
        "1 s",
        "2 s",
        "4 s",
        "4 s",
        "1 s",
        "2 s",
    ]


def test_an_attempt_that_waits_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "FIRST_PAUSE_S", 3600.0)
    supervisor = begin(monkeypatch, waiting_for(10**6, StoreUnavailable("away")))
    wait_until(lambda: pauses_of(supervisor), "the first pause")
    supervisor.cancel()
    assert outcome_of(supervisor).status == "cancelled"


def test_an_error_of_its_own_is_not_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = begin(monkeypatch, waiting_for(1, CorruptArtifact("shard 3 is damaged")))
    assert (outcome_of(supervisor).status, outcome_of(supervisor).code) == ("failed", "corrupt_artifact")
    assert not pauses_of(supervisor)


def test_a_long_job_holds_only_the_reports_that_nobody_has_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    more = threading.Semaphore(0)

    def run(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
        for number in range(300):
            reporter.report(Logged(message=str(number)))
            if number % 10 == 9:
                assert more.acquire(timeout=30)
                held.append(len(reporter.after(0)))
        return {}

    supervisor = begin(monkeypatch, run)
    stored: list[int] = []
    for _ in range(30):
        wait_until(lambda: len(supervisor.poll(len(stored)).reports) == 10, "ten reports")
        # that dispatcher is lost before it has stored what it was told: the next one is told the same
        stored.extend(report.seq for report in supervisor.poll(len(stored)).reports)
        supervisor.poll(len(stored))
        more.release()
    assert wait_until(lambda: supervisor.poll(300).outcome, "the outcome").status == "succeeded"
    assert stored == list(range(1, 301)) and held == [0] * 30
