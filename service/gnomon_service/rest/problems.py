"""Errors as application/problem+json (RFC 9457): one shape for every refusal and failure."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from gnomon.errors import GnomonError, InvalidRequest, TooManyRequests, Unauthenticated, Unavailable
from gnomon_service.jobs.transitions import clean

logger = logging.getLogger(__name__)

_MAX_SHOWN = 80
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


async def _on_invalid(_: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    errors = [describe(item, error.body) for item in error.errors()]
    detail = "; ".join(item["message"] for item in errors[:5])
    if len(errors) > 5:
        detail += f"; and {len(errors) - 5} more"
    in_body = any(item["loc"][:1] == ("body",) for item in error.errors())
    code = next((item["code"] for item in errors if item["code"]), "invalid_spec" if in_body else "invalid_request")
    shown = [{"path": item["path"], "message": item["message"]} for item in errors[:50]]
    return make_problem(InvalidRequest.status, code, detail, errors=shown)


def describe(error: Mapping[str, Any], body: Any) -> dict[str, str]:
    """One validation error as {path, message, code}; the path is the one in the user's JSON."""
    location = tuple(error["loc"])
    path = plain_path(location[1:], body) if location[:1] == ("body",) else ".".join(map(str, location[1:]))
    kind, context = error["type"], error.get("ctx", {})
    code = "transcoder_alignment" if kind == "transcoder_alignment" else ""
    message = _sentence(kind, context, error, path or "the body")
    return {"path": path, "message": message, "code": code}


def plain_path(location: Sequence[int | str], body: Any) -> str:
    """The path of an error without the names that pydantic adds for the members of a tagged union."""
    parts: list[str] = []
    here = body
    for index, part in enumerate(location):
        is_tag = isinstance(here, Mapping) and part not in here and here.get("kind") == part
        if is_tag or (isinstance(here, Mapping) and part not in here and index < len(location) - 1):
            continue
        parts.append(str(part))
        if isinstance(here, Mapping):
            here = here.get(part)
        elif isinstance(here, Sequence) and not isinstance(here, str) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            here = None
    return ".".join(parts)


def _sentence(kind: str, context: Mapping[str, Any], error: Mapping[str, Any], path: str) -> str:
    match kind:
        case "missing":
            return f"{path} is required"
        case "extra_forbidden":
            return f"{path} is not a field; check its spelling, or leave it out"
        case "union_tag_not_found":
            return f"{path} needs a field 'kind' that says which sort it is"
        case "union_tag_invalid":
            return f"{path}.kind={context.get('tag')!r} is unknown; use one of {context.get('expected_tags')}"
        case "json_invalid":
            return f"the body is not JSON ({context.get('error', 'unreadable')})"
        case "value_error" | "transcoder_alignment":
            return f"{path}: {str(error['msg']).removeprefix('Value error, ')}"
        case _:
            message = str(error["msg"])
            return f"{path}: {message[:1].lower()}{message[1:]} (got {_shown(error.get('input'))})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
