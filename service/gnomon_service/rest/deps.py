"""What the routes are given: the service's parts, and who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Path, Query, Request

from gnomon.errors import Forbidden
from gnomon.specs.request import JobClass
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import MAX_PAGE
from gnomon_service.jobs.steering import Steering
from gnomon_service.jobs.submission import Queue
from gnomon_service.planning.inspector import Inspector
from gnomon_service.rest.news import News
from gnomon_service.settings import Settings
from gnomon_service.tenancy.keys import Keys, Principal


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts that every route works with."""

    settings: Settings
    database: Database
    queue: Queue
    steering: Steering
    keys: Keys
    inspector: Inspector
    news: News


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


def _principal(request: Request) -> Principal:
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal


def _reader(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
    principal.require("read")
    return principal


def _writer(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
    principal.require("write")
    return principal


def _admin(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
    principal.require("admin")
    return principal


def check_class(job_class: JobClass | None, principal: Principal) -> None:
    """Raise Forbidden, "class_not_allowed", where the key may not ask for a class: it would preempt all others."""
    if job_class == "urgent" and "admin" not in principal.scopes:
        raise Forbidden(
            f"job_class 'urgent' needs a key of scope 'admin'; key {principal.key_id!r} has "
            f"{', '.join(sorted(principal.scopes))}: leave it at 'normal', or ask an admin to raise the job's class",
            code="class_not_allowed",
        )


ServicesDep = Annotated[Services, Depends(_services)]
Reader = Annotated[Principal, Depends(_reader)]
Writer = Annotated[Principal, Depends(_writer)]
Admin = Annotated[Principal, Depends(_admin)]
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""An id in a path: databases differ in what else they take (PostgreSQL no NUL), and no id has it."""
Cursor = Annotated[str | None, Query(max_length=256, description="next_cursor of the page before.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items on the page at most.")]
