"""A scripted server behind the SDK's transport seam, for faults that no real service shows on demand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2

from gnomon.client import Client

URL = "http://127.0.0.1:7777"
KEY = "gnm_test_secret"
JOB_ID = "job_" + "0" * 26
DICTIONARY_ID = "dict_" + "0" * 26
NOW = datetime(2026, 1, 1, tzinfo=UTC).isoformat()
HARVEST = {
    "kind": "harvest",
    "model": {"source": "/models/tiny"},
    "text": [{"url": "/texts/a.txt"}],
    "hooks": ["model.layers.1"],
    "token_budget": 4096,
}
HARVEST_RESULT = {"store_id": "act_" + "0" * 32, "n_rows": 10, "n_held_out_rows": 2, "n_tokens": 12}

Answer = httpx2.Response | Exception
Handler = Callable[[httpx2.Request], Answer]


def job(**changes: Any) -> dict[str, Any]:
    """A job as the service describes it."""
    return {
        "id": JOB_ID,
        "kind": "harvest",
        "name": "",
        "state": "queued",
        "attempt": 0,
        "max_attempts": 5,
        "priority": 0,
        "created_at": NOW,
        "spec": HARVEST,
    } | changes


def event(event_id: int, kind: str = "progress", job_id: str = JOB_ID, **data: Any) -> dict[str, Any]:
    """An event as the service describes it."""
    return {"id": event_id, "job_id": job_id, "attempt": 1, "kind": kind, "created_at": NOW, "data": data}


def dictionary(**changes: Any) -> dict[str, Any]:
    """A published dictionary as the service describes it."""
    return {
        "id": DICTIONARY_ID,
        "job_id": JOB_ID,
        "name": "",
        "created_at": NOW,
        "store_id": "act_" + "0" * 32,
        "hook_name": "model.layers.1",
        "d_in": 16,
        "d_sae": 48,
        "activation": "topk",
        "alignment": "orth",
        "location": "file:///x",
        "files": {},
        "metrics": {},
    } | changes


def answer(body: Any, status: int = 200, **headers: str) -> httpx2.Response:
    """A JSON answer."""
    return httpx2.Response(status, json=body, headers=headers)


def problem(status: int, code: str, detail: str, **extra: Any) -> httpx2.Response:
    """A refusal as RFC 9457 wants it."""
    body = {"type": "about:blank", "title": "x", "status": status, "code": code, "detail": detail} | extra
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


class Cut(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body that breaks off: its pieces, then a lost connection."""

    def __init__(self, *pieces: bytes, error: Exception | None = None) -> None:
        self._pieces = pieces
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> Any:
        for piece in self:
            yield piece


def sse(*events: dict[str, Any], error: Exception | None = None) -> httpx2.Response:
    """A stream of events with a comment between them, which may break off."""
    pieces = [
        f"event: {e['kind']}\r\nid: {e['id']}\r\ndata: {json.dumps(e)}\r\n\r\n: ping\r\n\r\n".encode() for e in events
    ]
    return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Cut(*pieces, error=error))


class Script:
    """Answers requests one after another, and keeps what was asked."""

    def __init__(self, *answers: Answer | Handler) -> None:
        self._answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        step = self._answers.pop(0)
        result = step(request) if callable(step) else step
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def is_over(self) -> bool:
        """Every answer has been asked for."""
        return not self._answers

    @property
    def transport(self) -> httpx2.MockTransport:
        """The seam."""
        return httpx2.MockTransport(self)


def client_of(script: Script) -> Client:
    """A client of a scripted server."""
    return Client(URL, KEY, transport=script.transport)
