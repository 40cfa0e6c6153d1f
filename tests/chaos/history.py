"""What holds of every history that the service leaves in its database, whatever went wrong meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Final

from gnomon.resources import TERMINAL_STATES
from gnomon.specs import TrainSpec
from gnomon_service.db.tables import LEGAL_TRANSITIONS
from gnomon_service.dispatch.thinning import Bounds
from tests.chaos.reading import HELD, OF_HOLDERS, History


def check(history: History) -> None:
    """Fail with every rule that a history breaks."""
    broken = [f"{rule.__name__}: {what}" for rule in RULES for what in rule(history)]
    assert not broken, f"{len(broken)} violations:\n" + "\n".join(broken[:20])


def check_reports(history: History) -> None:
    """Fail unless every attempt's progress counts 1, 2, 3 to its last report: of workers that report nothing else."""
    for job_id, tries in history.attempts.items():
        for row in tries:
            told = [
                event["data"]["done"]
                for event in history.events[job_id]
                if event["kind"] == "progress" and event["attempt"] == row["attempt"]
            ]
            assert told == list(range(1, row["last_report_seq"] + 1)), (job_id, row["attempt"], told)


# ---------------------------------------------------------------------------------------------- what clients see


def no_acknowledged_job_is_lost(history: History) -> Iterator[str]:
    """What was answered with a job is there."""
    for key, job_id in history.sent.answers if history.sent else ():
        if job_id not in history.jobs:
            yield f"{job_id}, the answer to {key!r}"


def no_job_is_a_phantom(history: History) -> Iterator[str]:
    """Every job was sent by somebody, or made for one that was."""
    for job_id, job in history.jobs.items():
        if job["made_for"] is not None:
            if (job["made_for"], job_id) not in history.needs:
                yield f"{job_id} was made for {job['made_for']}, which does not need it"
        elif history.sent is not None and job["idempotency_key"] not in history.sent.keys:
            yield f"{job_id} with key {job['idempotency_key']!r}, which nobody sent"


def one_key_makes_one_job(history: History) -> Iterator[str]:
    """However often a key is sent, it makes one job, and each answer names that one."""
    made: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for job_id, job in history.jobs.items():
        if job["idempotency_key"] is not None:
            made[job["project"], job["idempotency_key"]].append(job_id)
    for (_, key), job_ids in made.items():
        if len(job_ids) > 1:
            yield f"{key!r} made {sorted(job_ids)}"
    for key, job_id in history.sent.answers if history.sent else ():
        if job_id in history.jobs and history.jobs[job_id]["idempotency_key"] != key:
            yield f"{key!r} was answered with {job_id}, which another key made"


# ---------------------------------------------------------------------------------------------- events and states


def events_have_no_gaps(history: History) -> Iterator[str]:
    """Events are numbered 1, 2, 3 up to what the job's row counts; what has gone was old, or of a long log."""
    for job_id, job in history.jobs.items():
        events = history.events[job_id]
        ids = [event["id"] for event in events]
        if ids[:1] != [1] or ids[-1] != job["n_events"] or ids != sorted(set(ids)):
            yield f"{job_id} counts {job['n_events']} events and has {ids}"
        for before, after in pairwise(events):
            is_young = before["created_at"] > history.read_at - Bounds().whole_s
            if after["id"] != before["id"] + 1 and is_young and not _has_long_log(history, job_id):
                yield f"{job_id} has nothing between {before['id']} and {after['id']}, which nobody may have forgotten"


def states_change_legally(history: History) -> Iterator[str]:
    """A job begins in the queue, each change begins where the last ended, and the last is what the row says."""
    for job_id, job in history.jobs.items():
        changes = [(event["data"].get("from"), event["data"]["to"]) for event in history.changes(job_id)]
        if not changes or changes[0] != (None, "queued"):
            yield f"{job_id} begins with {changes[:1]}"
            continue
        for (_, before), (begins, to) in pairwise(changes):
            if begins != before or (before, to) not in LEGAL_TRANSITIONS:
                yield f"{job_id} was {before} and went from {begins} to {to}"
        if changes[-1][1] != job["state"]:
            yield f"{job_id} is {job['state']}, and its last event says {changes[-1][1]}"


def a_terminal_state_is_final(history: History) -> Iterator[str]:
    """Nothing follows an end but that somebody resumes what failed or was cancelled."""
    for job_id in history.jobs:
        for event, after in pairwise(history.events[job_id]):
            if event["kind"] != "state" or event["data"]["to"] not in TERMINAL_STATES:
                continue
            if event["data"]["to"] == "succeeded" or not _is_resume(after):
                yield f"{job_id} had {event['data']['to']}, then came {after['kind']} {after['data']}"


def nothing_runs_before_what_it_needs(history: History) -> Iterator[str]:
    """What was ever claimed had all that it depends on, which stays succeeded."""
    for job_id, needed in history.needs:
        if history.attempts[job_id] and history.jobs[needed]["state"] != "succeeded":
            yield f"{job_id} ran, and {needed} is {history.jobs[needed]['state']}"


# ---------------------------------------------------------------------------------------------- attempts


def attempts_grow_by_one(history: History) -> Iterator[str]:
    """Claims are numbered 1, 2, 3 up to what the row says, and each has its attempt."""
    for job_id, job in history.jobs.items():
        wanted = list(range(1, job["attempt"] + 1))
        claims = [event["attempt"] for event in history.changes(job_id) if event["data"]["to"] == "scheduled"]
        rows = [row["attempt"] for row in history.attempts[job_id]]
        if not claims == rows == wanted:
            yield f"{job_id} is at attempt {job['attempt']}, was claimed as {claims}, and has attempts {rows}"


def one_attempt_lives(history: History) -> Iterator[str]:
    """The present attempt of a job that is held lives, under the job's owner, and no other does."""
    for job_id, job in history.jobs.items():
        live = [(row["attempt"], row["lease_owner"]) for row in history.attempts[job_id] if row["state"] == "live"]
        wanted = [(job["attempt"], job["lease_owner"])] if job["state"] in HELD else []
        if live != wanted:
            yield f"{job_id} is {job['state']} at {wanted}, and {live} live"


def no_stale_attempt_writes(history: History) -> Iterator[str]:
    """An event of attempt n comes after the claim of n and before that of n + 1."""
    for job_id in history.jobs:
        n_claims = 0
        for event in history.events[job_id]:
            n_claims += event["kind"] == "state" and event["data"]["to"] == "scheduled"
            if event["attempt"] != n_claims:
                yield f"{job_id}: event {event['id']} of attempt {event['attempt']} came after {n_claims} claims"


def attempts_end_as_told(history: History) -> Iterator[str]:
    """An attempt ended as the event says that ended it: lost, left, or as the job."""
    for job_id in history.jobs:
        told = {}
        for event in history.changes(job_id):
            if event["data"].get("from") in HELD and event["data"]["to"] not in HELD:
                how = {"attempt_lost": "lost", "put_back": "left"}
                is_back = event["data"]["to"] == "queued"
                told[event["attempt"]] = how.get(event["data"].get("code", "")) if is_back else event["data"]["to"]
        for row in history.attempts[job_id]:
            if row["state"] != told.get(row["attempt"], "live") or (row["ended_at"] is None) != (
                row["state"] == "live"
            ):
                yield f"{job_id}: attempt {row['attempt']} is {row['state']}, its end says {told.get(row['attempt'])}"


def reports_are_stored_once(history: History) -> Iterator[str]:
    """No attempt has more events of its workers' than the reports that it counts."""
    for job_id, rows in history.attempts.items():
        for row in rows:
            mine = [event for event in history.events[job_id] if event["attempt"] == row["attempt"]]
            n_reports = sum(event["kind"] not in ("state", "log") for event in mine)
            if n_reports > row["last_report_seq"]:
                yield f"{job_id}: attempt {row['attempt']} told {row['last_report_seq']} and has {n_reports}"


def losses_are_counted(history: History) -> Iterator[str]:
    """n_losses counts losses since anything was committed or the job resumed; being put back is none."""
    for job_id, job in history.jobs.items():
        n_losses = 0
        for event in history.events[job_id]:
            if _is_commit(event) or _is_resume(event):
                n_losses = 0
            elif event["kind"] == "state" and event["data"].get("code") == "attempt_lost":
                n_losses += 1
        # commits of a job that ended long ago are forgotten, its losses are not
        if n_losses != job["n_losses"] and not (history.has_gaps(job_id) and n_losses > job["n_losses"]):
            yield f"{job_id} counts {job['n_losses']} losses, its events tell {n_losses}"


def only_held_jobs_have_places(history: History) -> Iterator[str]:
    """A job that no attempt holds has no lease, no devices, and nobody to be asked to leave."""
    for job_id, job in history.jobs.items():
        left = [name for name in OF_HOLDERS if job[name] is not None]
        if job["state"] not in HELD and left:
            yield f"{job_id} is {job['state']} and has {left}"
        if job["state"] in HELD and None in (job["lease_owner"], job["lease_until"], job["places"]):
            yield f"{job_id} is {job['state']} without a lease or devices"


# ---------------------------------------------------------------------------------------------- what jobs made


def a_harvest_leaves_its_store(history: History) -> Iterator[str]:
    """What succeeded has a sealed store, or one deleted with a reason, or one that a later job made anew since.

    What is sealed, made or given up has its job.
    """
    for job_id, job in history.jobs.items():
        if job["kind"] != "harvest" or job["state"] != "succeeded":
            continue
        store = history.stores.get((job["project"], job["store_id"]))
        is_there = store is not None and (store["state"] == "sealed" or store["deleted_why"] is not None)
        maker = history.jobs.get(store["job_id"], job) if store is not None else job
        is_anew = maker is not job and (maker["finished_at"] is None or maker["finished_at"] > job["finished_at"])
        if not (is_there or is_anew):
            yield f"{job_id} succeeded, and its store is {store and store['state']}"
    for store in history.stores.values():
        maker_state = history.jobs.get(store["job_id"], {}).get("state")
        fits = {"harvesting": ("queued", *HELD), "sealed": ("succeeded",), "failed": ("failed", "cancelled")}
        if store["state"] in fits and maker_state not in fits[store["state"]]:
            yield f"{store['id']} is {store['state']}, and {store['job_id']} is {maker_state}"


def a_training_leaves_its_dictionaries(history: History) -> Iterator[str]:
    """A training that succeeded has as many as its variants, and no other job has any."""
    made: defaultdict[str, int] = defaultdict(int)
    for row in history.dictionaries:
        made[row["job_id"]] += 1
    for job_id, job in history.jobs.items():
        is_done = job["kind"] == "train" and job["state"] == "succeeded"
        wanted = len(TrainSpec.read(job["spec"]).variant_names) if is_done else 0
        if made[job_id] != wanted:
            yield f"{job_id} is {job['state']} and has {made[job_id]} dictionaries of {wanted}"


RULES: Final[tuple[Callable[[History], Iterator[str]], ...]] = (
    no_acknowledged_job_is_lost,
    no_job_is_a_phantom,
    one_key_makes_one_job,
    events_have_no_gaps,
    states_change_legally,
    a_terminal_state_is_final,
    nothing_runs_before_what_it_needs,
    attempts_grow_by_one,
    one_attempt_lives,
    no_stale_attempt_writes,
    attempts_end_as_told,
    reports_are_stored_once,
    losses_are_counted,
    only_held_jobs_have_places,
    a_harvest_leaves_its_store,
    a_training_leaves_its_dictionaries,
)


def _has_long_log(history: History, job_id: str) -> bool:
    """Whether the job has ended with as much of a log as is kept."""
    n_logs = sum(event["kind"] == "log" for event in history.events[job_id])
    is_ended = history.jobs[job_id]["state"] in TERMINAL_STATES
    return is_ended and n_logs >= Bounds().n_first_logs + Bounds().n_last_logs


def _is_resume(event: Mapping[str, Any]) -> bool:
    data = event["data"]
    is_back = event["kind"] == "state" and data["to"] == "queued" and data.get("from") in TERMINAL_STATES
    return is_back and data.get("message") == "resumed by the user"


def _is_commit(event: Mapping[str, Any]) -> bool:
    return event["kind"] == "checkpoint" or (event["kind"] == "segment" and not event["data"].get("kept"))
