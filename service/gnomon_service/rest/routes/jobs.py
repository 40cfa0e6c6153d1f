"""/v1/jobs: submit, look, cancel, resume, and follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Query, Request, Response

from gnomon.errors import InvalidRequest, Unavailable
from gnomon.resources import Event, Job, JobKind, JobState, Page
from gnomon.specs import JobRequest
from gnomon.specs.request import JobChange
from gnomon_service.db import reads
from gnomon_service.planning.admission import admit
from gnomon_service.planning.plans import with_duration
from gnomon_service.rest.deps import Cursor, Id, Limit, Reader, Services, ServicesDep, Writer, check_class
from gnomon_service.rest.event_stream import EventStream

T = TypeVar("T")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="Same key, same request: same job."),
]


_MOST_SUBMITS: Final = 32
"""Requests that wait at once for a look at what they name, in threads that are not those of other requests."""


@router.post("", status_code=201)
async def submit_job(
    body: JobRequest,
    request: Request,
    response: Response,
    principal: Writer,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Check a job and queue it.

    503, code "still_reading", where a model or text is so large that the first look at it takes longer than a request
    waits: the same request joins the same look.
    """
    check_class(body.job_class, principal)
    job = await run_check(request, partial(_submit, body, principal.project, services, idempotency_key))
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job


async def run_check(request: Request, check: Callable[[], T]) -> T:
    """Run what looks at foreign bytes in the threads that are kept for it; raises Unavailable where all are busy."""
    limiter = request.app.state.submits
    if limiter.available_tokens < 1:
        raise Unavailable(f"{_MOST_SUBMITS} requests are being checked already; send it again", code="busy")
    return await to_thread.run_sync(check, limiter=limiter)


def limit_submits() -> CapacityLimiter:
    """The threads that submits and plans have."""
    return CapacityLimiter(_MOST_SUBMITS)


def _submit(body: JobRequest, project: str, services: Services, idempotency_key: str | None) -> Job:
    queue = services.queue
    job = queue.find_by_key(project, idempotency_key, body) if idempotency_key else None
    if job is not None:
        return job
    admitted = admit(body, project, services.database, services.settings, services.inspector)
    plan = with_duration(admitted, project, services.database)
    return queue.submit(project, body, plan, idempotency_key=idempotency_key)


@router.get("")
def list_jobs(
    principal: Reader,
    services: ServicesDep,
    state: JobState | None = None,
    kind: JobKind | None = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[Job]:
    """Jobs, newest first."""
    with services.database.read() as connection:
        return reads.list_jobs(connection, principal.project, state=state, kind=kind, cursor=cursor, limit=limit)


@router.get("/{job_id}", response_model=Job)
def read_job(
    job_id: Id,
    response: Response,
    principal: Reader,
    services: ServicesDep,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Job | Response:
    """One job; 304 where the ETag sent as If-None-Match still holds."""
    with services.database.read() as connection:
        tag = reads.job_tag(connection, principal.project, job_id)
        if if_none_match is not None and tag in [part.strip() for part in if_none_match.split(",")]:
            return Response(status_code=304, headers={"ETag": tag})
        response.headers["ETag"] = tag
        return reads.read_job(connection, principal.project, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Id, principal: Writer, services: ServicesDep) -> Job:
    """Cancel a job; harmless if it has ended."""
    return services.queue.cancel(principal.project, job_id)


@router.post("/{job_id}/resume")
def resume_job(job_id: Id, principal: Writer, services: ServicesDep) -> Job:
    """Let a paused job go on, or queue one again that failed or was cancelled: from its last checkpoint or segment."""
    return services.queue.resume(principal.project, job_id)


@router.post("/{job_id}/pause")
def pause_job(job_id: Id, principal: Writer, services: ServicesDep) -> Job:
    """Let a job wait until it is resumed; one that runs saves what it has and leaves, which costs it no attempt."""
    return services.steering.pause(principal.project, job_id, by=principal.name)


@router.patch("/{job_id}")
def change_job(job_id: Id, change: JobChange, principal: Writer, services: ServicesDep) -> Job:
    """Give a job that has not ended another class or priority, and with it the harvest that was made for it."""
    check_class(change.job_class, principal)
    return services.steering.change(principal.project, job_id, change)


@router.get("/{job_id}/events", response_model=Page[Event])
def list_events(
    job_id: Id,
    request: Request,
    principal: Reader,
    services: ServicesDep,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events with a greater id.")] = 0,
    limit: Limit = 100,
) -> Page[Event] | Response:
    """What happened to a job: one page as JSON, or all there is and will be as text/event-stream."""
    project = principal.project
    if "text/event-stream" in request.headers.get("accept", ""):
        after = max(after, _last_event_id(request))
        stream = EventStream(services.database, services.keys, services.news, principal, job_id, after=after)
        return stream.response()
    with services.database.read() as connection:
        events, _ = reads.list_events(connection, project, job_id, after=after, limit=limit + 1)
    more = len(events) > limit
    return Page[Event](items=events[:limit], next_cursor=str(events[limit - 1].id) if more else None)


def _last_event_id(request: Request) -> int:
    text = request.headers.get("last-event-id", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise InvalidRequest(
            f"Last-Event-ID {text[:40]!r} is not the id of an event; send the last id received, or nothing",
            code="invalid_cursor",
        )
    return int(text)
