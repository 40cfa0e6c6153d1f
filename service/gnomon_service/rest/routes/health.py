"""/healthz, /readyz and /metrics: for whoever runs the service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from gnomon.errors import GnomonError
from gnomon_service.db.reads import dispatcher_age_s
from gnomon_service.rest.deps import Reader, Services, ServicesDep
from gnomon_service.storage_root import check_storage_root, is_full

T = TypeVar("T")
router = APIRouter(tags=["health"])

_DISPATCHER_FRESH_S: Final = 30.0
_CHECK_S: Final = 5.0
"""Longest wait for the database or the store to say that it is there."""


class Seen(NamedTuple):
    """A dispatcher, as the database knows it."""

    state: str
    age_s: float | None
    """Seconds since it was last seen."""


class Check(Generic[T]):
    """A check that is asked one at a time, in a thread apart from those of requests; who asks meanwhile shares it.

    A store that accepts connections and does not answer then holds one thread, however many ask.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    async def ask(self, check: Callable[[], T]) -> T | None:
        """What it says; None where it fails, or has nothing to say in time."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(to_thread.run_sync(check, limiter=CapacityLimiter(1)))
        try:
            return await asyncio.wait_for(asyncio.shield(self._task), _CHECK_S)
        except (GnomonError, TimeoutError):
            return None


@router.get("/healthz")
async def read_health() -> dict[str, str]:
    """Whether this process answers at all."""
    return {"status": "ok"}


@router.get("/readyz")
async def read_readiness(request: Request, response: Response) -> dict[str, str | float | None]:
    """Whether requests can be served: 503 where the database or the store does not answer, or the store is full.

    A dispatcher that was not seen lately is told, but jobs can still be submitted. `dispatcher_age_s` is null where
    none was ever seen, or the database does not answer.
    """
    state = request.app.state
    seen, store = await asyncio.gather(
        state.dispatcher_check.ask(lambda: _look_for_dispatcher(state.services)),
        state.store_check.ask(lambda: _store_state(state.services)),
    )
    is_ready = seen is not None and store == "ok"
    response.status_code = 200 if is_ready else 503
    return {
        "status": "ready" if is_ready else "not ready",
        "database": "unavailable" if seen is None else "ok",
        "store": store or "unavailable",
        "dispatcher": "unknown" if seen is None else seen.state,
        "dispatcher_age_s": None if seen is None else seen.age_s,
    }


@router.get("/metrics", response_class=Response)
def read_metrics(request: Request, principal: Reader, services: ServicesDep) -> Response:
    """Metrics in Prometheus' text format; jobs are those of this project."""
    text = request.app.state.metrics.render(services.database, principal.project)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def _look_for_dispatcher(services: Services) -> Seen:
    with services.database.read() as connection:
        age_s = dispatcher_age_s(connection)
    if age_s is None:
        return Seen("never seen", None)
    age_s = round(max(0.0, age_s), 1)
    return Seen("ok" if age_s <= _DISPATCHER_FRESH_S else f"not seen for {age_s:.0f} s", age_s)


def _store_state(services: Services) -> str:
    check_storage_root(services.settings)
    return "full" if is_full(services.settings) else "ok"
