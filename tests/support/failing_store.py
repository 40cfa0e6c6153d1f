"""A way to an object store on which a share of the requests fails, each in one of the ways that happen."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Self
from urllib.parse import urlsplit

from tests.support.waiting import LIMIT_S

CUTS: Final = ("cut before", "cut after", "cut amid")
"""A connection that breaks before the store has the request, after it has done it, and amid its answer."""
REFUSALS: Final = {"slow down": (503, "SlowDown"), "internal error": (500, "InternalError")}
"""Answers of a store that did nothing."""
HOP_BY_HOP: Final = ("connection", "keep-alive", "transfer-encoding", "content-length")


class FailingStore:
    """Passes requests on to an HTTP server, and fails some of them while it is told to; a context manager."""

    def __init__(self, target: str, *, seed: int = 0) -> None:
        """target is the server's URL."""
        parts = urlsplit(target)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.n_requests: Counter[str] = Counter()
        """By how they went: "passed", or the way in which they failed."""
        self._share = 0.0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where the server is reached through this."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def n_failed(self) -> int:
        """Requests that failed."""
        return self.n_requests.total() - self.n_requests["passed"]

    def counts(self) -> dict[str, int]:
        """All requests, and how many of them failed in each way."""
        ways = {way.replace(" ", "_"): self.n_requests[way] for way in (*CUTS, *REFUSALS)}
        return {"requests": self.n_requests.total(), "failed": self.n_failed, **ways}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def failing(self, share: float) -> Iterator[None]:
        """Fail this share of all requests, and count anew."""
        self.n_requests.clear()
        self._share = share
        try:
            yield
        finally:
            self._share = 0.0

    def fate(self) -> str:
        """What becomes of the next request: half of the failures are cuts, the others refusals."""
        with self._lock:
            way = "passed"
            if self._random.random() < self._share:
                way = self._random.choice(self._random.choice([CUTS, tuple(REFUSALS)]))
            self.n_requests[way] += 1
            return way


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


def _handler_of(store: FailingStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with suppress(OSError):
                super().handle_one_request()
                return
            self.close_connection = True

        def do_GET(self) -> None:
            """Any request."""
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            way = store.fate()
            if way in REFUSALS:
                self._refuse(*REFUSALS[way])
            elif way == "cut before":
                self._cut()
            else:
                self._pass_on(way)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Tests print what they count."""

        def _pass_on(self, way: str) -> None:
            status, headers, body = self._ask()
            if way == "cut after":
                self._cut()
                return
            n_bytes = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
            is_whole = way == "passed"
            self._answer(status, {**headers, "Content-Length": n_bytes}, body if is_whole else body[: len(body) // 2])
            if not is_whole:
                self._cut()

        def _ask(self) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(store.host, store.port, timeout=LIMIT_S)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():  # the Host too, which is signed
                    connection.putheader(name, value)
                connection.endheaders(self.body)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        def _refuse(self, status: int, code: str) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>not now</Message></Error>".encode()
            headers = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
            self._answer(status, headers, b"" if self.command == "HEAD" else body)

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP or name == "Content-Length":
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _cut(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
