"""A job's events as server-sent events, from any point on, until the job has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gnomon.errors import Unavailable
from gnomon.resources import Event
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import list_events

PING_S = 15.0
"""Silence after which a comment is sent, so that nothing between here and the client takes the line for dead."""
_BATCH = 200


class EventStream:
    """One client's place in one job's events."""

    def __init__(
        self,
        database: Database,
        project: str,
        job_id: str,
        *,
        after: int,
        poll_s: float,
        is_allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        """is_allowed is asked at every look: a key may be revoked while its stream is open."""
        self._database = database
        self._is_allowed = is_allowed
        self._project = project
        self._job_id = job_id
        self._after = after
        self._poll_s = poll_s

    def response(self) -> Response:
        """The stream as a response; raises NotFound before anything is sent."""
        first = self._read()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self._messages(first), media_type="text/event-stream", headers=headers)

    async def _messages(self, page: tuple[list[Event], bool]) -> AsyncIterator[str]:
        spoke_at = time.monotonic()
        yield "retry: 1000\n\n"
        while True:
            events, is_over = page
            for event in events:
                yield f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
                self._after, spoke_at = event.id, time.monotonic()
            if is_over:
                return
            if not events:
                await asyncio.sleep(self._poll_s)
            if time.monotonic() - spoke_at >= PING_S:
                yield ": ping\n\n"
                spoke_at = time.monotonic()
            try:
                page = await run_in_threadpool(self._read)
            except Unavailable:
                return  # the client comes back with Last-Event-ID

    def _read(self) -> tuple[list[Event], bool]:
        if not self._is_allowed():
            return [], True
        with self._database.read() as connection:
            return list_events(connection, self._project, self._job_id, after=self._after, limit=_BATCH)
