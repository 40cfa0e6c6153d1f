"""ASGI middleware that bounds what a client can send: bytes, time, nesting and items of a body."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnomon.errors import InvalidRequest, PayloadTooLarge
from gnomon_service.rest.problems import as_problem, make_problem

# Strings are skipped as a whole; possessive, so that no input makes the scan go back.
_MAX_ITEMS = 20_000
"""Far more than any request has; each that is wrong is described, which takes a dozen microseconds."""
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class BodyLimits:
    """Reads a body before the application runs, and refuses one that is too large, too slow or too deep."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, max_json_depth: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_json_depth = max_json_depth
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await self._read(scope, receive)
            if body is None:
                return  # the client went away
            _check_items(body)  # the quicker of the two, and both hold up whoever else asks
            self._check_depth(body)
        except TimeoutError:
            message = f"the body did not arrive within {self._body_timeout_s:g} s"
            await make_problem(408, "body_timeout", message, headers={"Connection": "close"})(scope, receive, send)
        except InvalidRequest as error:
            response = as_problem(error)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, counted as it arrives; a declared length is not believed, only refused early."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        n_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            n_bytes += len(chunk)
            if n_bytes > self._max_body_bytes:
                raise self._too_large()
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check_depth(self, body: bytes) -> None:
        depth = 0
        for match in _TOKEN.finditer(body):
            token = match.group()[:1]
            if token in b"[{":
                depth += 1
            elif token in b"]}":
                depth -= 1
            if depth > self._max_json_depth:
                raise InvalidRequest(
                    f"the body nests more than {self._max_json_depth} deep; flatten it", code="json_too_deep"
                )

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body exceeds {self._max_body_bytes} bytes; send less, and large data through the object store"
        )


def _check_items(body: bytes) -> None:
    n_items = body.count(b",") + 1
    if n_items > _MAX_ITEMS:
        raise PayloadTooLarge(f"the body has {n_items} items; no request has more than {_MAX_ITEMS}")


def _has_body(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return b"content-length" in names or b"transfer-encoding" in names


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body at once, and then what the server says (that the client has gone)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
