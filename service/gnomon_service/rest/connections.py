"""A connection of the API's server: one that does not send the head of a request in time is closed.

uvicorn ends a connection that is idle after an answer, but would keep one for ever that never asks, or that stops in
the middle of a head.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's own, with a limit on the time until a request has begun."""

    head_s: ClassVar[float] = 30.0
    """Longest time from the first moment or byte to the end of a request's head."""
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a first request."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes in; those of half a head do not buy more time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._have_head()
        elif self._head_due is None:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Be done."""
        self._have_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_due = self.loop.call_later(self.head_s, self.transport.close)

    def _have_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None
