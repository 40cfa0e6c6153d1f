"""The checker itself: it passes what the service does, and rejects each way in which that could be wrong."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from gnomon_service.db.engine import Database
from gnomon_service.jobs.steering import Steering
from tests.chaos.history import RULES, check, check_reports
from tests.chaos.reading import History, Row, Sent, read_history
from tests.support.service_jobs import DICTIONARY_RECORD, PROJECT, STORE_RESULT, Bench, train_spec

Corrupt = Callable[[History], object]
PROGRESS = {"phase": "harvest", "unit": "tokens"}


def live_through(bench: Bench) -> Sent:
    """Do to jobs whatever can be done to them; returns what was sent and answered."""
    training = bench.submit(train_spec(), key="train")
    harvest = bench.claim("a").lease
    bench.leases.record(harvest, [(1, "progress", PROGRESS | {"done": 1})])
    bench.leases.lose(harvest, "node died")
    bench.release()
    harvest = bench.claim("b").lease
    bench.leases.record(harvest, [(seq, "progress", PROGRESS | {"done": seq}) for seq in (1, 2)])
    bench.let_lease_pass(harvest.job_id)
    (adopted,) = bench.leases.adopt("a")
    bench.leases.succeed(adopted.lease, STORE_RESULT)
    Steering(bench.database).pause(PROJECT, training.id, by="ann")
    bench.queue.resume(PROJECT, training.id)
    bench.leases.put_back(bench.claim("a").lease, "drained")
    bench.release()
    bench.leases.succeed(bench.claim("a").lease, {"records": [DICTIONARY_RECORD]})
    failed = bench.submit(store=2, key="failed")
    bench.leases.fail(bench.claim("a").lease, code="x", message="y")
    bench.release()
    bench.queue.resume(PROJECT, failed.id)
    bench.queue.cancel(PROJECT, failed.id)
    held = bench.submit(store=3, key="held")
    bench.claim("a")
    answers = {"train": training.id, "failed": failed.id, "held": held.id}
    return Sent(keys=frozenset((*answers, "never arrived")), answers=tuple(answers.items()))


@pytest.fixture
def history(database: Database) -> History:
    return read_history(database, live_through(Bench(database)))


def job_of(history: History, key: str) -> Row:
    (found,) = (job for job in history.jobs.values() if job["idempotency_key"] == key)
    return found


def harvest_of(history: History) -> Row:
    (found,) = (job for job in history.jobs.values() if job["made_for"] is not None)
    return found


def events_of(history: History, key: str) -> list[Row]:
    return history.events[job_of(history, key)["id"]]


def forget(history: History, key: str) -> None:
    del history.jobs[job_of(history, key)["id"]]


def double(history: History) -> None:
    job = job_of(history, "held")
    history.jobs["job_twin"] = job | {"id": "job_twin"}
    history.events["job_twin"] = history.events[job["id"]]
    history.attempts["job_twin"] = history.attempts[job["id"]]


def renumber(events: list[Row]) -> None:
    for number, event in enumerate(events, 1):
        event["id"] = number


def write_late(history: History, kind: str, data: dict[str, Any], **changes: Any) -> None:
    """Add an event to a job that has succeeded, as if nothing fenced it off."""
    job = harvest_of(history)
    job["n_events"] += 1
    events = history.events[job["id"]]
    events.append(events[-1] | {"id": job["n_events"], "kind": kind, "data": data, **changes})


def swap_answers(history: History) -> None:
    assert history.sent is not None
    (one, first), (two, second), *_ = history.sent.answers
    history.sent = Sent(keys=history.sent.keys, answers=((one, second), (two, first)))


def claim_twice(history: History) -> None:
    """Claim a job again under the number that it has, as if two dispatchers had been given it."""
    job = job_of(history, "held")
    job["n_events"] += 2
    events = history.events[job["id"]]
    events += [event | {"id": event["id"] + 2} for event in events[-2:]]


def change(row: Row, **values: Any) -> None:
    row.update(values)


CORRUPTIONS: dict[str, tuple[str, Corrupt]] = {
    "an answered job is gone": ("no_acknowledged_job_is_lost", lambda history: forget(history, "held")),
    "a job that nobody sent": (
        "no_job_is_a_phantom",
        lambda history: change(job_of(history, "held"), idempotency_key="other"),
    ),
    "a job without a key": (
        "no_job_is_a_phantom",
        lambda history: change(job_of(history, "held"), idempotency_key=None),
    ),
    "a harvest that its training does not need": ("no_job_is_a_phantom", lambda history: history.needs.clear()),
    "two jobs of one key": ("one_key_makes_one_job", double),
    "an answer names another's job": ("one_key_makes_one_job", swap_answers),
    "an event is missing": ("events_have_no_gaps", lambda history: events_of(history, "train").pop(2)),
    "the last event is missing": ("events_have_no_gaps", lambda history: events_of(history, "train").pop()),
    "a number came twice": ("events_have_no_gaps", lambda history: change(events_of(history, "train")[2], id=2)),
    "a state is skipped": ("states_change_legally", lambda history: events_of(history, "held").pop(1)),
    "the first state is missing": ("states_change_legally", lambda history: events_of(history, "held").pop(0)),
    "a change begins elsewhere": (
        "states_change_legally",
        lambda history: events_of(history, "held")[-1]["data"].update({"from": "queued"}),
    ),
    "the row was changed without an event": (
        "states_change_legally",
        lambda history: change(job_of(history, "held"), state="scheduled"),
    ),
    "what succeeded was queued again": (
        "a_terminal_state_is_final",
        lambda history: write_late(
            history, "state", {"from": "succeeded", "to": "queued", "message": "resumed by the user"}
        ),
    ),
    "what had ended told more": ("a_terminal_state_is_final", lambda history: write_late(history, "log", {})),
    "what failed runs again unasked": (
        "a_terminal_state_is_final",
        lambda history: events_of(history, "failed")[4]["data"].pop("message"),
    ),
    "a training ran before its harvest": (
        "nothing_runs_before_what_it_needs",
        lambda history: change(harvest_of(history), state="failed"),
    ),
    "an attempt was skipped": ("attempts_grow_by_one", lambda history: change(job_of(history, "held"), attempt=2)),
    "a claim left no attempt": (
        "attempts_grow_by_one",
        lambda history: history.attempts[job_of(history, "held")["id"]].clear(),
    ),
    "one attempt was given twice": ("attempts_grow_by_one", claim_twice),
    "two attempts live": (
        "one_attempt_lives",
        lambda history: change(history.attempts[job_of(history, "train")["id"]][0], state="live"),
    ),
    "a held job has no living attempt": (
        "one_attempt_lives",
        lambda history: change(history.attempts[job_of(history, "held")["id"]][0], state="lost"),
    ),
    "an attempt lives under another owner": (
        "one_attempt_lives",
        lambda history: change(history.attempts[job_of(history, "held")["id"]][0], lease_owner="c"),
    ),
    "an attempt wrote after the claim of the next": (
        "no_stale_attempt_writes",
        lambda history: change(history.events[harvest_of(history)["id"]][-2], attempt=1),
    ),
    "an attempt wrote before its own claim": (
        "no_stale_attempt_writes",
        lambda history: change(history.events[harvest_of(history)["id"]][3], attempt=2),
    ),
    "a lost attempt is told as left": (
        "attempts_end_as_told",
        lambda history: change(history.attempts[harvest_of(history)["id"]][0], state="left"),
    ),
    "an ended attempt has no end": (
        "attempts_end_as_told",
        lambda history: change(history.attempts[harvest_of(history)["id"]][0], ended_at=None),
    ),
    "a report was stored twice": (
        "reports_are_stored_once",
        lambda history: change(history.attempts[harvest_of(history)["id"]][1], last_report_seq=1),
    ),
    "a loss was not counted": ("losses_are_counted", lambda history: change(harvest_of(history), n_losses=0)),
    "being put back was counted": (
        "losses_are_counted",
        lambda history: change(job_of(history, "train"), n_losses=1),
    ),
    "an ended job keeps its devices": (
        "only_held_jobs_have_places",
        lambda history: change(job_of(history, "train"), places=["n"]),
    ),
    "a cancelled job is still asked to leave": (
        "only_held_jobs_have_places",
        lambda history: change(job_of(history, "failed"), leave_why="paused"),
    ),
    "a held job has no lease": (
        "only_held_jobs_have_places",
        lambda history: change(job_of(history, "held"), lease_until=None),
    ),
    "a harvest succeeded and sealed nothing": (
        "a_harvest_leaves_its_store",
        lambda history: change(next(iter(history.stores.values())), state="failed"),
    ),
    "the store's row is gone": ("a_harvest_leaves_its_store", lambda history: history.stores.clear()),
    "nobody makes a store that is waited for": (
        "a_harvest_leaves_its_store",
        lambda history: change(list(history.stores.values())[1], state="harvesting"),
    ),
    "a training succeeded without its dictionary": (
        "a_training_leaves_its_dictionaries",
        lambda history: history.dictionaries.clear(),
    ),
    "a dictionary was published twice": (
        "a_training_leaves_its_dictionaries",
        lambda history: history.dictionaries.append(history.dictionaries[0] | {"id": "dict_twin"}),
    ),
}


def test_what_the_service_does_is_accepted(history: History) -> None:
    check(history)
    check_reports(history)
    assert len(history.jobs) == 4


def test_every_rule_is_broken_by_something() -> None:
    assert {rule for rule, _ in CORRUPTIONS.values()} == {rule.__name__ for rule in RULES}


def test_each_corruption_is_rejected_by_its_rule(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'gnomon.db'}")
    database.migrate()
    sound = read_history(database, live_through(Bench(database)))
    database.close()
    rules = {rule.__name__: rule for rule in RULES}
    for name, (rule, corrupt) in CORRUPTIONS.items():
        spoiled = deepcopy(sound)
        corrupt(spoiled)
        assert list(rules[rule](spoiled)), name
        with pytest.raises(AssertionError, match=rule):
            check(spoiled)


@pytest.mark.parametrize("told", [[1], [1, 3], [1, 1, 2], [2, 1]], ids=["missing", "gap", "twice", "order"])
def test_reports_that_are_not_each_stored_once_are_rejected(history: History, told: list[int]) -> None:
    events = history.events[harvest_of(history)["id"]]
    first = next(event for event in events if event["kind"] == "progress" and event["attempt"] == 2)
    rest = [event for event in events if event["kind"] != "progress" or event["attempt"] != 2]
    history.events[harvest_of(history)["id"]] = rest + [
        first | {"data": first["data"] | {"done": done}} for done in told
    ]
    with pytest.raises(AssertionError):
        check_reports(history)
