"""The two thin shells that carry requests over HTTP: one blocking, one for asyncio."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import httpx2
import stamina
from pydantic import ValidationError

from gnomon._requests import Flow, Request
from gnomon._settings import ClientSettings
from gnomon.errors import GnomonError, InvalidRequest, TooManyRequests, Unavailable, from_problem

T = TypeVar("T")
logger = logging.getLogger("gnomon")
READING_PAUSE_S = 1.0
"""Between two requests for the same look, at least."""


class Session:
    """A blocking connection to one server."""

    def __init__(self, settings: ClientSettings, transport: httpx2.BaseTransport | None = None) -> None:
        self.settings = settings
        with translated_errors(settings.url):
            self._http = httpx2.Client(**_options(settings), transport=transport)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def send(self, request: Request[T]) -> T:
        """Send a request and read its answer, repeating it where that is safe and may help."""
        while True:
            began = time.monotonic()
            try:
                return self._send(request)
            except Unavailable as error:
                time.sleep(_pause_for_reading(request, error, began))

    def _send(self, request: Request[T]) -> T:
        for attempt in _attempts(request, self.settings):
            with attempt, translated_errors(self.settings.url):
                return read_answer(request, self._http.request(request.method, request.path, **_parts(request)))
        raise AssertionError("the last attempt returns or raises")

    def run(self, flow: Flow[T]) -> T:
        """Send the requests of a flow one after another."""
        try:
            request = next(flow)
            while True:
                request = flow.send(self.send(request))
        except StopIteration as stop:
            result: T = stop.value
            return result

    @contextmanager
    def stream(self, request: Request[None], read_timeout_s: float) -> Iterator[httpx2.Response]:
        """The open answer to a request, to be read piece by piece; raises as `send` does, never repeats."""
        timeout = httpx2.Timeout(self.settings.timeout_s, read=read_timeout_s)
        arguments = _parts(request) | {"timeout": timeout}
        with (
            translated_errors(self.settings.url),
            self._http.stream(request.method, request.path, **arguments) as response,
        ):
            if response.is_error:
                response.read()
                raise error_of(response)
            yield response


class AsyncSession:
    """The same for asyncio."""

    def __init__(self, settings: ClientSettings, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.settings = settings
        with translated_errors(settings.url):
            self._http = httpx2.AsyncClient(**_options(settings), transport=transport)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def send(self, request: Request[T]) -> T:
        """Send a request and read its answer, repeating it where that is safe and may help."""
        while True:
            began = time.monotonic()
            try:
                return await self._send(request)
            except Unavailable as error:
                await asyncio.sleep(_pause_for_reading(request, error, began))

    async def _send(self, request: Request[T]) -> T:
        async for attempt in _attempts(request, self.settings):
            with attempt, translated_errors(self.settings.url):
                response = await self._http.request(request.method, request.path, **_parts(request))
                return read_answer(request, response)
        raise AssertionError("the last attempt returns or raises")

    async def run(self, flow: Flow[T]) -> T:
        """Send the requests of a flow one after another."""
        try:
            request = next(flow)
            while True:
                request = flow.send(await self.send(request))
        except StopIteration as stop:
            result: T = stop.value
            return result

    @asynccontextmanager
    async def stream(self, request: Request[None], read_timeout_s: float) -> AsyncIterator[httpx2.Response]:
        """The open answer to a request, to be read piece by piece; raises as `send` does, never repeats."""
        timeout = httpx2.Timeout(self.settings.timeout_s, read=read_timeout_s)
        arguments = _parts(request) | {"timeout": timeout}
        with translated_errors(self.settings.url):
            async with self._http.stream(request.method, request.path, **arguments) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response)
                yield response


def read_answer(request: Request[T], response: httpx2.Response) -> T:
    """The parsed body of a good answer; raises the error that a bad one stands for."""
    if not response.is_success:
        raise error_of(response)
    try:
        return request.parse(response.content)
    except ValidationError as error:
        raise GnomonError(
            f"the answer to {request.method} {request.path} cannot be read ({error.error_count()} problems); "
            "client and server may differ in version",
            code="bad_response",
        ) from error


def error_of(response: httpx2.Response) -> GnomonError:
    """The error behind an answer that is not a success."""
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        error = from_problem(response.status_code, problem)
    elif response.status_code in (502, 503, 504):  # a proxy in front of the service answers for it
        error = Unavailable(f"HTTP {response.status_code} from {response.url.host}; try again later")
    else:
        error = GnomonError(
            f"HTTP {response.status_code} from {response.url.host}, not a Gnomon answer; check the URL",
            code="bad_response",
        )
    retry_after = response.headers.get("Retry-After", "")
    if retry_after.isdigit():
        error.detail["retry_after_s"] = int(retry_after)
    return error


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Turns every error of the HTTP library into one of ours."""
    try:
        yield
    except httpx2.ConnectError as error:
        message = f"cannot reach {url}: {error}; is the service running? `gnomon up` starts one here"
        raise Unavailable(message, code="unreachable") from error
    except httpx2.TimeoutException as error:
        message = f"{url} did not answer in time ({type(error).__name__}); try again or raise timeout_s"
        raise Unavailable(message, code="timeout") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise InvalidRequest(f"{url!r} is not the URL of a service: {error}", code="bad_url") from error
    except (httpx2.DecodingError, httpx2.TooManyRedirects) as error:
        raise GnomonError(f"unreadable answer from {url}: {error}", code="bad_response") from error
    except httpx2.HTTPError as error:
        message = f"lost the connection to {url}: {error or type(error).__name__}; try again"
        raise Unavailable(message, code="connection_lost") from error


def _pause_for_reading(request: Request[Any], error: Unavailable, began: float) -> float:
    """Seconds until the request is to be sent again, as the service is still reading what it names; else raises.

    It is the service that waits, 20 s each time: the pause is for one that answers at once.
    """
    if error.code != "still_reading" or not request.idempotent:
        raise error
    so_far_s = error.detail.get("so_far_s")
    since = f", for {so_far_s} s so far" if isinstance(so_far_s, int) else ""
    logger.warning("the service is still reading the model and text of the request%s; waiting", since)
    return max(0.0, began + READING_PAUSE_S - time.monotonic())


def _attempts(request: Request[Any], settings: ClientSettings) -> Any:
    def may_repeat(error: Exception) -> bool | float:
        if not isinstance(error, Unavailable | TooManyRequests):
            return False
        if error.code == "still_reading" or (isinstance(error, TooManyRequests) and error.code != "rate_limited"):
            return False
        if not request.idempotent and error.code not in ("unreachable", "rate_limited"):  # of which nothing was done
            return False
        wait_s: float | None = error.detail.get("retry_after_s")
        return True if wait_s is None else min(float(wait_s), 10.0)

    return stamina.retry_context(
        on=may_repeat,
        attempts=settings.n_attempts,
        timeout=60.0,
        wait_initial=0.2,
        wait_max=2.0,
        wait_jitter=0.2,
    )


def _options(settings: ClientSettings) -> dict[str, Any]:
    headers = {"Accept": "application/json", "User-Agent": "gnomon-sdk"}
    if settings.key is not None:
        headers["Authorization"] = f"Bearer {settings.key}"
    return {
        "base_url": settings.url,
        "headers": headers,
        "timeout": httpx2.Timeout(settings.timeout_s, connect=min(5.0, settings.timeout_s)),
        # A proxy from the environment has no business between two processes of one machine.
        "trust_env": not settings.is_loopback,
    }


def _parts(request: Request[Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {"params": dict(request.params), "headers": dict(request.headers)}
    if request.body is not None:
        parts["json"] = request.body
    return parts
