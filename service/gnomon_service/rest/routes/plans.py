"""/v1/plans: what a job would take, without queuing it."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request

from gnomon.plans import JobPlan
from gnomon.specs import JobRequest
from gnomon_service.planning.plans import plan_job
from gnomon_service.rest.deps import Reader, ServicesDep
from gnomon_service.rest.routes.jobs import run_check

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("")
async def make_plan(body: JobRequest, request: Request, principal: Reader, services: ServicesDep) -> JobPlan:
    """Check a job as submitting it does, and say what it would make, take and cost; nothing is queued.

    503, code "still_reading", as for a submit.
    """
    plan = partial(plan_job, body, principal.project, services.database, services.settings, services.inspector)
    return await run_check(request, plan)
