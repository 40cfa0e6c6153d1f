"""Asks processes of their own what a request names (see `gnomon_workers.harvest.inspection`), and waits a bounded time.

A first look at a large model or text reads all of it, which may take minutes. Who asks is told to ask again; who does,
and whoever asks the same meanwhile, joins the look that is under way.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from gnomon.errors import GnomonError, InvalidRequest, Unavailable, from_problem
from gnomon.specs import HarvestSpec
from gnomon_storage.digests import combine
from gnomon_workers.harvest.inspection import SeenHarvest

logger = logging.getLogger(__name__)

ABANDONED_S: Final = 300.0
"""A look that no one has asked for any more in this time is given up."""
_LAST_WORDS_S: Final = 10.0
N_PROCESSES: Final = 4
NICENESS: Final = 10
"""Of these processes: whoever is answered from what is known already comes first."""
MOST_INQUIRIES: Final = 64


@dataclass(slots=True, kw_only=True)
class _Inquiry:
    """A question that is being answered."""

    question: Mapping[str, Any]
    began_at: float
    asked_at: float
    is_answered: threading.Event = field(default_factory=threading.Event)
    reply: Mapping[str, Any] = field(default_factory=dict)


class Inspector:
    """The processes that look at foreign bytes; safe to ask from many threads."""

    def __init__(self, *, answer_s: float, abandoned_s: float = ABANDONED_S) -> None:
        self._answer_s = answer_s
        self._abandoned_s = abandoned_s
        self._lock = threading.Lock()
        self._inquiries: dict[str, _Inquiry] = {}
        self._waiting: deque[str] = deque()
        self._n_workers = 0
        self._idle: list[subprocess.Popen[str]] = []
        self._is_closed = False

    def harvest(self, spec: HarvestSpec, input_roots: tuple[str, ...]) -> SeenHarvest:
        """What a harvest would read.

        Raises InvalidRequest with a code; Unavailable, "still_reading", where it takes longer than a request waits.
        """
        seen = self._ask({"harvest": spec.model_dump(mode="json"), "input_roots": input_roots})
        return SeenHarvest(**seen)

    def check_store(self, location: str) -> None:
        """Raise CorruptArtifact or NotFound unless a sealed store's files are there; Unavailable as above."""
        self._ask({"store": location})

    def close(self) -> None:
        """End the processes; who waits is told to ask again."""
        with self._lock:
            self._is_closed = True
            for process in self._idle:
                _end(process)
            self._idle.clear()
            while self._waiting:
                inquiry = self._inquiries.pop(self._waiting.popleft())
                inquiry.reply = _problem(_given_up())
                inquiry.is_answered.set()

    def _ask(self, question: Mapping[str, Any]) -> Any:
        inquiry = self._join(question)
        if not inquiry.is_answered.wait(self._answer_s):
            raise _still_reading(time.monotonic() - inquiry.began_at)
        problem = inquiry.reply.get("problem")
        if problem is not None:
            raise from_problem(problem["status"], dict(problem))
        return inquiry.reply["seen"]

    def _join(self, question: Mapping[str, Any]) -> _Inquiry:
        """The inquiry about a question: one that is under way, or a new one."""
        key, now = combine(question), time.monotonic()
        with self._lock:
            inquiry = self._inquiries.get(key)
            if inquiry is not None:
                inquiry.asked_at = now
                return inquiry
            if self._is_closed or len(self._inquiries) >= MOST_INQUIRIES:
                raise Unavailable("the service is looking at too many requests already; send it again", code="busy")
            inquiry = self._inquiries[key] = _Inquiry(question=question, began_at=now, asked_at=now)
            self._waiting.append(key)
            if self._n_workers < N_PROCESSES:
                self._n_workers += 1
                threading.Thread(target=self._work, name="inspector", daemon=True).start()
            return inquiry

    def _work(self) -> None:
        """Answer what waits, then end; the process that was used stays for the next."""
        while True:
            with self._lock:
                if not self._waiting or self._is_closed:
                    self._n_workers -= 1
                    return
                key = self._waiting.popleft()
                inquiry = self._inquiries[key]
                process = self._idle.pop() if self._idle else None
            try:
                inquiry.reply = self._answer(inquiry, process)
            except OSError as error:  # no process could be made
                inquiry.reply = _problem(Unavailable(f"the request cannot be looked at now: {error}; send it again"))
            with self._lock:
                del self._inquiries[key]
            inquiry.is_answered.set()

    def _answer(self, inquiry: _Inquiry, process: subprocess.Popen[str] | None) -> Mapping[str, Any]:
        if process is not None and process.poll() is not None:
            _end(process)
            process = None
        process = process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it has died: the empty answer says so
            process.stdin.write(json.dumps(inquiry.question) + "\n")
            process.stdin.flush()
        while not select.select([process.stdout], [], [], 1.0)[0]:
            if self._is_closed or time.monotonic() - inquiry.asked_at > self._abandoned_s:
                _end(process)
                return _problem(_given_up())
        line = process.stdout.readline()
        if not line.endswith("\n"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_S)  # how it ends by itself says what is to blame
            _end(process)
            logger.error("an inspection died", extra={"status": process.returncode})
            return _problem(_died(process.returncode))
        self._keep(process)
        reply: Mapping[str, Any] = json.loads(line)
        return reply

    def _keep(self, process: subprocess.Popen[str]) -> None:
        """Keep one for the next question; more would hold memory for nothing."""
        with self._lock:
            if not self._idle and not self._is_closed:
                self._idle.append(process)
                return
        _end(process)


def _start() -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-m", "gnomon_workers.harvest.inspection"], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)  # noqa: S603
    # from its first import on: four that begin at once would keep this process from answering anybody
    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _still_reading(so_far_s: float) -> Unavailable:
    return Unavailable(
        f"the service has been reading the files that this request names for {so_far_s:.0f} s: all of a model and a "
        "text, the first time. Nothing is queued yet; send the same request again, and it waits for the same look",
        code="still_reading",
        so_far_s=round(so_far_s),
    )


def _given_up() -> Unavailable:
    return Unavailable("the look at this request was given up; send it again", code="busy")


def _died(status: int) -> GnomonError:
    """What is to blame: the files where the system ended the process, the code where it ended itself."""
    if status < 0:
        return InvalidRequest(
            f"the files that this request names could not be looked at: reading them ended the process (signal "
            f"{-status}), as too much memory does; look at them, and give the text as .jsonl",
            code="unreadable_input",
        )
    return GnomonError("the service failed to look at what this request names; its log says why")


def _problem(error: GnomonError) -> Mapping[str, Any]:
    return {"problem": {"status": error.status, "code": error.code, "detail": error.message}}
