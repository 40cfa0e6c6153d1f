"""/healthz, /readyz and /metrics: for whoever runs the service."""

from __future__ import annotations

import os

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gnomon.errors import GnomonError, StoreUnavailable
from gnomon_service.db.reads import dispatcher_age_s
from gnomon_service.rest.deps import Reader, Services, ServicesDep
from gnomon_storage.location import Location

router = APIRouter(tags=["health"])

_DISPATCHER_FRESH_S = 30.0


@router.get("/healthz")
def read_health() -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "ok"}


@router.get("/readyz")
def read_readiness(response: Response, services: ServicesDep) -> dict[str, str]:
    """Whether requests can be served: 503 where the database or the store does not answer.

    A dispatcher that was not seen lately is told, but jobs can still be submitted.
    """
    checks = {"database": "ok", "store": "ok", "dispatcher": "never seen"}
    try:
        checks["dispatcher"] = _dispatcher_state(services)
    except GnomonError:
        checks["database"] = "unavailable"
    try:
        _check_store(services)
    except GnomonError:
        checks["store"] = "unavailable"
    is_ready = checks["database"] == checks["store"] == "ok"
    response.status_code = 200 if is_ready else 503
    return {"status": "ready" if is_ready else "not ready", **checks}


@router.get("/metrics", response_class=Response)
def read_metrics(request: Request, principal: Reader, services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format; jobs are those of this project."""
    text = request.app.state.metrics.render(services.database, principal.project)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _dispatcher_state(services: Services) -> str:
    with services.database.read() as connection:
        age_s = dispatcher_age_s(connection)
    if age_s is None:
        return "never seen"
    return "ok" if age_s <= _DISPATCHER_FRESH_S else f"not seen for {age_s:.0f} s"


def _check_store(services: Services) -> None:
    root = Location.open(services.settings.storage_root)
    local = root.local_path()
    if local is None:
        Location.open(services.settings.project_root).exists()
    elif not (local.is_dir() and os.access(local, os.W_OK)):
        raise StoreUnavailable(f"the storage root {local} is not a folder that can be written to")
