"""ASGI middleware in front of everything: no request passes without a key, but to a literal list of paths."""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from gnomon.errors import GnomonError
from gnomon_service.rest.problems import as_problem
from gnomon_service.rest.rate_limits import RateLimits
from gnomon_service.tenancy.keys import Keys

PUBLIC_PATHS = frozenset({"/healthz", "/readyz"})


class KeyGate:
    """Authenticates each request and puts its Principal into the scope; refuses all others, and a key that is too busy.

    It stands before routing, so that a route cannot be added without it, and an absent one looks like any other
    to someone without a key.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, limits: RateLimits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"] not in PUBLIC_PATHS:
            try:
                principal = await run_in_threadpool(self._keys.authenticate, _bearer(scope))
                self._limits.take(principal.key_id)
            except GnomonError as error:
                await as_problem(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["principal"] = principal
        await self._app(scope, receive, send)


def _bearer(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    kind, _, key = values[0].decode("latin-1").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None
