"""What a job that has ended amounts to: its typed result, or the error it ended with."""

from __future__ import annotations

from pydantic import ValidationError

from gnomon.errors import Conflict, JobFailed
from gnomon.resources import TERMINAL_STATES, EvaluateResult, HarvestResult, Job, TrainResult, UnknownResult

JobResult = HarvestResult | TrainResult | EvaluateResult | UnknownResult
_RESULTS: dict[str, type[HarvestResult | TrainResult | EvaluateResult]] = {
    "harvest": HarvestResult,
    "train": TrainResult,
    "evaluate": EvaluateResult,
}


def result_of(job: Job) -> JobResult:
    """The result of a job; raises JobFailed if it did not succeed, Conflict if it has not ended."""
    if job.state == "succeeded":
        return read_result(job)
    if job.state not in TERMINAL_STATES:
        raise Conflict(f"job {job.id} is {job.state}; wait() for it first", code="job_not_finished")
    if job.state == "cancelled":
        raise JobFailed(f"job {job.id} was cancelled", code="job_cancelled", job_id=job.id)
    message = job.error.message if job.error else "no reason is recorded"
    code = job.error.code if job.error else None
    raise JobFailed(f"job {job.id} failed: {message}", code=code, job_id=job.id)


def read_result(job: Job) -> JobResult:
    """What a job that succeeded left; an UnknownResult where this release cannot read it."""
    result = job.result or {}
    known = _RESULTS.get(job.kind)
    try:
        return known.read(result) if known is not None else UnknownResult(fields=result)
    except ValidationError:
        return UnknownResult(fields=result)
