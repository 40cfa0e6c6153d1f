"""What open event streams wait for, asked of the database once for all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from gnomon.errors import Unavailable
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import read_ends
from gnomon_service.tenancy.keys import Keys


@dataclass(eq=False, slots=True, kw_only=True)
class _Waiter:
    """A stream that has sent all there was."""

    job_id: str
    key_id: str
    after: int
    loop: asyncio.AbstractEventLoop
    is_due: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Let the stream look; from any thread."""
        with suppress(RuntimeError):  # its loop has ended, and the stream with it
            self.loop.call_soon_threadsafe(self.is_due.set)


class News:
    """One thread that looks every poll_s, for as long as anyone waits.

    A hundred streams that looked for themselves would take half of this process's time to find nothing.
    """

    def __init__(self, database: Database, keys: Keys, *, poll_s: float) -> None:
        self._database = database
        self._keys = keys
        self._lock = threading.Lock()
        self._waiting: set[_Waiter] = set()
        self._is_looking = False
        self._is_over = threading.Event()
        self._poll_s = poll_s

    async def wait(self, job_id: str, key_id: str, *, after: int, most_s: float) -> None:
        """Wait for an event beyond `after`, the job's end, the key's, or that the database is gone; most_s at most."""
        waiter = _Waiter(job_id=job_id, key_id=key_id, after=after, loop=asyncio.get_running_loop())
        self._add(waiter)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(waiter.is_due.wait(), most_s)
        finally:
            with self._lock:
                self._waiting.discard(waiter)

    def close(self) -> None:
        """Look no more."""
        self._is_over.set()

    def _add(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiting.add(waiter)
            if not self._is_looking:
                self._is_looking = True
                threading.Thread(target=self._look_while_any_waits, name="news", daemon=True).start()

    def _look_while_any_waits(self) -> None:
        while not self._is_over.wait(self._poll_s):
            with self._lock:
                waiting = list(self._waiting)
                if not waiting:
                    self._is_looking = False
                    return
            for waiter in self._due(waiting):
                waiter.wake()

    def _due(self, waiting: Collection[_Waiter]) -> Collection[_Waiter]:
        try:
            valid = self._keys.valid({waiter.key_id for waiter in waiting})
            with self._database.read() as connection:
                ends = read_ends(connection, {waiter.job_id for waiter in waiting})
        except Unavailable:
            return waiting  # each meets it too, and ends
        return [waiter for waiter in waiting if waiter.key_id not in valid or _has_more(waiter, ends)]


def _has_more(waiter: _Waiter, ends: Mapping[str, tuple[int, bool]]) -> bool:
    n_events, has_ended = ends.get(waiter.job_id, (0, True))
    return has_ended or n_events > waiter.after
