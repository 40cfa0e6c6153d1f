"""A job's events as server-sent events, from any point on, until the job has ended."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from gnomon.errors import Unavailable
from gnomon.resources import Event
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import list_events
from gnomon_service.rest.news import News
from gnomon_service.tenancy.keys import Keys, Principal

PING_S = 15.0
"""Silence after which a comment is sent, so that nothing between here and the client takes the line for dead."""
_BATCH = 200


class EventStream:
    """One client's place in one job's events."""

    def __init__(self, database: Database, keys: Keys, news: News, principal: Principal, job_id: str, *, after: int):
        self._database = database
        self._keys = keys
        self._news = news
        self._principal = principal
        self._job_id = job_id
        self._after = after

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
            if len(events) < _BATCH:
                most_s = max(0.0, spoke_at + PING_S - time.monotonic())
                await self._news.wait(self._job_id, self._principal.key_id, after=self._after, most_s=most_s)
            if time.monotonic() - spoke_at >= PING_S:
                yield ": ping\n\n"
                spoke_at = time.monotonic()
            try:
                page = await run_in_threadpool(self._read)
            except Unavailable:
                return  # the client comes back with Last-Event-ID

    def _read(self) -> tuple[list[Event], bool]:
        if not self._keys.valid({self._principal.key_id}):
            return [], True  # it was revoked while its stream was open
        with self._database.read() as connection:
            return list_events(connection, self._principal.project, self._job_id, after=self._after, limit=_BATCH)
