"""Server-sent events, line by line, and the cursor that follows one job over broken connections."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import ValidationError

from gnomon._requests import Request, event_stream
from gnomon.errors import GnomonError, Unavailable
from gnomon.events import TERMINAL_STATES, StateChanged
from gnomon.resources import Event

PATIENCE_S = 300.0
"""How long a follower puts up with a server that does not answer."""
READ_TIMEOUT_S = 60.0
"""Silence after which a connection counts as broken; the server sends a comment more often than that."""
GLANCE_S = 5.0
"""How long a dependency is followed before the job that waits for it is looked at again."""


@dataclass(slots=True)
class SseDecoder:
    """Collects the lines of a stream into messages; only what the service sends: `data` and comments."""

    _data: list[str] = field(default_factory=list)

    def feed(self, line: str) -> str | None:
        """The data of a message once its closing blank line arrives."""
        if line:
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            return None
        data, self._data = "\n".join(self._data), []
        return data or None


@dataclass(slots=True, kw_only=True)
class Deadline:
    """A moment on a monotonic clock after which waiting ends with TimeoutError; at=None never comes."""

    at: float | None = None
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, timeout_s: float | None) -> Deadline:
        """The moment timeout_s from now."""
        return cls(at=None if timeout_s is None else time.monotonic() + timeout_s)

    def check(self, what: str) -> None:
        """Raise TimeoutError if the moment has passed."""
        if self.at is not None and self.clock() >= self.at:
            raise TimeoutError(f"{what} has not ended in time; it goes on, wait again or cancel it")

    def limit(self, duration_s: float) -> float:
        """The shorter of a duration and the time left, at least 10 ms."""
        return duration_s if self.at is None else max(0.01, min(duration_s, self.at - self.clock()))


@dataclass(slots=True, kw_only=True)
class EventCursor:
    """Where a follower of one job's events is; survives reconnects through Last-Event-ID.

    The caller does the I/O: it opens `connect()`, feeds lines, and after every broken or ended stream calls
    `disconnected()`, which raises once the server has been silent for too long.
    """

    job_id: str
    after: int = 0
    deadline: Deadline = field(default_factory=Deadline)
    glance_s: float | None = None
    """Stop following after this long, at the next line or silence; the cursor may be used again."""
    finished: bool = False
    """The event seen last ended the job; the stream then ends, unless the job was resumed afterwards."""
    is_idle: bool = True
    """Nothing has arrived on this connection: a job that has ended has no more to tell."""
    _decoder: SseDecoder = field(default_factory=SseDecoder)
    _silent_since: float | None = None
    _glance_until: float | None = None

    def is_over(self) -> bool:
        """Nothing more is to be read for now: the job has ended, or the glance has."""
        return self.finished or self.is_glance_over()

    def is_glance_over(self) -> bool:
        """The job was followed for as long as it was to be."""
        return self._glance_until is not None and self.deadline.clock() >= self._glance_until

    @property
    def read_timeout_s(self) -> float:
        """Silence after which to stop reading."""
        return self.deadline.limit(READ_TIMEOUT_S if self.glance_s is None else self.glance_s)

    def begin(self) -> None:
        """Start to follow, or go on."""
        self.finished = False
        self._glance_until = None if self.glance_s is None else self.deadline.clock() + self.glance_s

    def connect(self) -> Request[None]:
        """The request for everything after the last event seen."""
        self._decoder, self.is_idle = SseDecoder(), True
        return event_stream(self.job_id, self.after)

    def feed(self, line: str) -> Event | None:
        """The event that this line completes; raises TimeoutError after the deadline."""
        self._silent_since = None
        self.deadline.check(f"job {self.job_id}")
        data = self._decoder.feed(line)
        if data is None:
            return None
        try:
            event = Event.read(data)
        except ValidationError as error:
            raise GnomonError(f"the server sent an unreadable event: {error}", code="bad_response") from error
        if event.id <= self.after:
            return None
        self.after, self.is_idle = event.id, False
        told = event.told
        self.finished = isinstance(told, StateChanged) and told.to in TERMINAL_STATES
        return event

    def disconnected(self, error: Unavailable | None) -> float:
        """Seconds to pause before the next connection; raises the error after PATIENCE_S of silence."""
        self.deadline.check(f"job {self.job_id}")
        now = self.deadline.clock()
        if error is not None and not self.is_over():
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since >= PATIENCE_S:
                raise error
        return self.deadline.limit(0.5)
