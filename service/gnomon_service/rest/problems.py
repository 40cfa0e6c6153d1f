"""Errors as application/problem+json (RFC 9457): one shape for every refusal and failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from gnomon.errors import GnomonError, InvalidRequest, TooManyRequests, Unauthenticated, Unavailable
from gnomon.specs.problems import describe, join
from gnomon_service.jobs.transitions import clean

logger = logging.getLogger(__name__)

_TO_WAIT_FOR = frozenset({"busy", "still_reading"})
"""Codes of answers of a service that is well: whoever asks is to ask again."""
_CODES = {404: "no_such_route", 405: "method_not_allowed", 408: "body_timeout"}


class ProblemResponse(JSONResponse):
    """A problem+json response."""

    media_type = "application/problem+json"


def as_problem(error: GnomonError) -> ProblemResponse:
    """The response that stands for one of Gnomon's errors."""
    headers: dict[str, str] = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(error.detail.get("retry_after_s", 1))
    return make_problem(error.status, error.code, error.message, headers=headers, **error.detail)


def make_problem(
    status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **facts: Any
) -> ProblemResponse:
    """A problem response; facts become members beside the standard ones."""
    content = {
        "type": f"urn:gnomon:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    return ProblemResponse({**clean(facts), **clean(content)}, status_code=status, headers=dict(headers or {}))


def add_problem_handlers(app: FastAPI) -> None:
    """Let every error of the application leave as a problem."""
    app.add_exception_handler(GnomonError, _on_gnomon_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_gnomon_error(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, GnomonError)
    if error.code in _TO_WAIT_FOR:
        logger.info("told to ask again", extra={"route": request.url.path, "code": error.code})
    elif error.status >= 500:
        logger.error("request failed", extra={"route": request.url.path, "code": error.code}, exc_info=error)
    return as_problem(error)


async def _on_http_error(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "bad_request")
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"no route {request.url.path!r}; the API is under /v1 and described at /v1/openapi.json"
    elif error.status_code == 405:
        detail = f"{request.method} is not offered here; {detail.lower()}"
    return make_problem(error.status_code, code, detail, headers=error.headers)


async def _on_unexpected(request: Request, error: Exception) -> ProblemResponse:
    # Starlette raises the error again after this response, and the server logs it with its traceback.
    logger.error("unexpected error", extra={"route": request.url.path, "error": type(error).__name__})
    return make_problem(500, "internal", "the service failed to answer; its log says why")


async def _on_invalid(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    root = _body_type(request)
    errors = [_describe(item, error.body, root) for item in error.errors()]
    in_body = any(item["loc"][:1] == ("body",) for item in error.errors())
    code = next((item["code"] for item in errors if item["code"]), "invalid_spec" if in_body else "invalid_request")
    shown = [{"path": item["path"], "message": item["message"]} for item in errors[:50]]
    return make_problem(InvalidRequest.status, code, join([item["message"] for item in errors]), errors=shown)


def _describe(error: Mapping[str, Any], body: Any, root: Any) -> dict[str, str]:
    place, *location = error["loc"]
    return describe(error, location, body, root) if place == "body" else describe(error, location, None)


def _body_type(request: Request) -> Any:
    """What the route takes as its body; None where it takes none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return None if field is None else field.field_info.annotation
