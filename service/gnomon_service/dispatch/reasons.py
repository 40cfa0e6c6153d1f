"""Why a job waits: a closed list of codes, each with the sentence that people read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gnomon_service.dispatch.order import Ask
from gnomon_service.dispatch.room import FreeDevices
from gnomon_service.jobs.waiting import Waiting

Code = Literal[
    "waits_for_job", "retries", "paused", "held", "drained", "quota", "too_large", "room_is_made", "no_room", "behind",
    "clearing", "no_dispatcher",
]  # fmt: skip
CODES: tuple[Code, ...] = get_args(Code)
_N_NAMED = 3


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a job is not started."""

    code: Code
    message: str


def hindrance(job: Waiting) -> Reason | None:
    """Why a job cannot be started whatever room there is; None where room is all that it waits for."""
    if job.paused_by is not None:
        return paused(job.paused_by)
    if job.held_by is not None:
        return held(job.project, job.held_by)
    if job.waits_for is not None:
        return waits_for_job(job.waits_for)
    if job.retry_in_s > 0:
        return retries(job.retry_in_s)
    return clearing() if job.is_clearing else None


def waits_for_job(job_id: str) -> Reason:
    """Another job has to succeed first."""
    return Reason("waits_for_job", f"waits for job {job_id}")


def retries(in_s: float) -> Reason:
    """Its last attempt was lost, and the next one comes after a pause."""
    return Reason("retries", f"its last attempt was lost; retries in {in_s:.0f} s")


def paused(by: str) -> Reason:
    """Somebody has paused it."""
    return Reason("paused", f"paused by {by}; `gnomon resume` lets it go on")


def held(project: str, by: str) -> Reason:
    """Its project is held."""
    return Reason("held", f"project {project} is held by {by}: nothing of it is started")


def drained(by: str) -> Reason:
    """The cluster is drained."""
    return Reason("drained", f"the cluster is drained by {by}: nothing is started")


def clearing() -> Reason:
    """Something is left on the cluster of its last attempt, or of another harvest of its store."""
    return Reason("clearing", "what is left of an attempt that ended is being cleared away")


def quota(project: str, n: int, n_most: int, what: str) -> Reason:
    """Its project has as much as it may have."""
    return Reason("quota", f"quota of project {project}: {n} of {n_most} {what}")


def too_large(ask: Ask, empty: FreeDevices, what: str) -> Reason:
    """It would not fit if nothing else ran."""
    smallest = min(ask.shapes, key=lambda shape: shape.n_devices)
    most = max(empty.by_node().values(), default=0)
    if smallest.n_devices <= empty.n_devices:
        times = f", {smallest.n_groups} times" if smallest.n_groups > 1 else ""
        text = f"needs {_count(smallest.group_size, what)} on one node{times}; no node has more than {most}"
    else:
        text = f"needs {_count(smallest.n_devices, what)}; the cluster has {empty.n_devices} on which may be started"
    return Reason("too_large", text)


def room_is_made(job_ids: Sequence[str]) -> Reason:
    """Others are on their way out."""
    return Reason("room_is_made", f"starts as soon as {_names(job_ids)} made room")


def no_room(
    ask: Ask,
    *,
    n_free: int,
    n_devices: int,
    what: str,
    holders: Sequence[str],
    free_in_s: float | None,
    behind: str | None,
) -> Reason:
    """Others hold what it needs, or what is free is promised to another."""
    least = min(shape.n_devices for shape in ask.shapes)
    text = f"needs {_count(least, what)}, {n_free} free of {n_devices}"
    if behind is not None and n_free >= least:
        return Reason("behind", f"{text}, which are kept for job {behind} ahead of it")
    if holders:
        text += f"; {_names(holders)} hold{'s' if len(holders) == 1 else ''} the rest"
    if free_in_s:
        text += f", expected free in {duration(free_in_s)}"
    return Reason("no_room", text)


def far_behind(n_told: int) -> Reason:
    """It is not among the first of the queue, of which alone is told more."""
    return Reason("behind", f"behind the first {n_told} jobs of the queue")


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _count(n: int, what: str) -> str:
    return f"{n} {what.removesuffix('s') if n == 1 else what}"


def _names(job_ids: Sequence[str]) -> str:
    shown = list(job_ids[:_N_NAMED])
    more = len(job_ids) - len(shown)
    if more:
        return f"{', '.join(shown)} and {more} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
