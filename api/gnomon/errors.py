"""Every error Gnomon raises, on both sides of the wire.

    GnomonError
    ├── InvalidRequest        422  the request can never succeed as written
    │   └── PayloadTooLarge   413
    ├── Unauthenticated       401
    ├── Forbidden             403
    ├── NotFound              404
    ├── Conflict              409  the request does not fit the present state
    ├── TooManyRequests       429
    ├── LeaseLost             409  a stale attempt tried to write; it must stop
    ├── CorruptArtifact       409  stored bytes are not what was committed
    ├── JobFailed             the job ended, not as asked (client side only)
    └── Unavailable           503  retry later
        └── StoreUnavailable  503  the object store does not answer

`code` is stable and meant for programs; the message is meant for people and says what was wrong, what was
got, what was wanted, and what to do next. Over REST an error travels as application/problem+json (RFC 9457).
"""

from __future__ import annotations

from typing import Any, ClassVar


class GnomonError(Exception):
    """Base of every error that Gnomon raises on purpose."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.detail = detail
        """Machine-readable facts beside the message; JSON-serialisable."""


def how_to_install(extra: str) -> str:
    """What to do where an extra is missing; Gnomon is installed from a checkout."""
    return f"in your checkout of Gnomon, pip install '.[{extra}]'"


class InvalidRequest(GnomonError):
    """The request can never succeed as written."""

    status = 422
    default_code = "invalid_request"


class PayloadTooLarge(InvalidRequest):
    """The body exceeds the limit."""

    status = 413
    default_code = "payload_too_large"


class Unauthenticated(GnomonError):
    """No key, or a key that is unknown, expired or revoked."""

    status = 401
    default_code = "unauthenticated"


class Forbidden(GnomonError):
    """The key is valid, but lacks the scope."""

    status = 403
    default_code = "forbidden"


class NotFound(GnomonError):
    """No such thing, or not in this project: the two look the same."""

    status = 404
    default_code = "not_found"


class Conflict(GnomonError):
    """The request does not fit the present state."""

    status = 409
    default_code = "conflict"


class TooManyRequests(GnomonError):
    """A quota or rate limit is reached."""

    status = 429
    default_code = "too_many_requests"


class LeaseLost(GnomonError):
    """A stale attempt tried to write; whoever holds it must stop."""

    status = 409
    default_code = "lease_lost"


class CorruptArtifact(GnomonError):
    """Stored bytes are not what was committed."""

    status = 409
    default_code = "corrupt_artifact"


class JobFailed(GnomonError):
    """A waited-for job ended as failed or cancelled."""

    default_code = "job_failed"


class Unavailable(GnomonError):
    """A part that is needed does not answer now; the same request may work later."""

    status = 503
    default_code = "unavailable"
    retryable = True


class StoreUnavailable(Unavailable):
    """The object store does not answer."""

    default_code = "store_unavailable"


_BY_STATUS: dict[int, type[GnomonError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    422: InvalidRequest,
    429: TooManyRequests,
    503: Unavailable,
}
_BY_CODE: dict[str, type[GnomonError]] = {
    cls.default_code: cls for cls in (LeaseLost, CorruptArtifact, StoreUnavailable)
}


def from_problem(status: int, problem: dict[str, Any]) -> GnomonError:
    """The error a problem+json body stands for; unknown codes fall back on the status."""
    code = str(problem.get("code", "")) or None
    cls = _BY_CODE.get(code or "") or _BY_STATUS.get(status) or GnomonError
    known = {"type", "title", "status", "detail", "code", "instance"}
    extra = {key: value for key, value in problem.items() if key not in known}
    return cls(str(problem.get("detail") or problem.get("title") or f"HTTP {status}"), code=code, **extra)
