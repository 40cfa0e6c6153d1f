"""Parts of a file (RFC 9110, section 14): what a `Range` header asks for, and what is known of the file as it is."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Bytes [start, stop) of a file of n_bytes."""

    start: int
    stop: int
    n_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the file."""
        return self.stop - self.start == self.n_bytes

    def headers(self) -> dict[str, str]:
        """What says which part of the file the answer is."""
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(self.stop - self.start)}
        if not self.is_whole:
            headers["Content-Range"] = f"bytes {self.start}-{self.stop - 1}/{self.n_bytes}"
        return headers


def span_of(header: str | None, n_bytes: int) -> Span | None:
    """The part that a `Range` header asks for; None where the file has no such byte.

    All of the file without a header, and for one that is not understood: several ranges, or another unit.
    """
    whole = Span(start=0, stop=n_bytes, n_bytes=n_bytes)
    match = _ONE_RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]):
        return whole
    if not match[1]:  # the last so many bytes
        start, stop = max(0, n_bytes - int(match[2])), n_bytes
    else:
        start, stop = int(match[1]), min(int(match[2]) + 1, n_bytes) if match[2] else n_bytes
        if match[2] and int(match[2]) < start:
            return whole
    return Span(start=start, stop=stop, n_bytes=n_bytes) if start < stop else None


def digest_headers(blake2b: str | None) -> dict[str, str]:
    """`ETag` and `Repr-Digest` (RFC 9530) of a file with a BLAKE2b-256 digest, hexadecimal; nothing without one."""
    if blake2b is None:
        return {}
    encoded = base64.b64encode(bytes.fromhex(blake2b)).decode()
    return {"ETag": f'"{blake2b}"', "Repr-Digest": f"blake2b-256=:{encoded}:"}


def is_known(headers: Mapping[str, str], blake2b: str | None) -> bool:
    """Whether `If-None-Match` says that the client has the file as it is."""
    named = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return blake2b is not None and f'"{blake2b}"' in named


def range_of(headers: Mapping[str, str], blake2b: str | None) -> str | None:
    """The `Range` header, unless `If-Range` says that it is of another content of the file."""
    condition = headers.get("if-range")
    if condition is not None and (blake2b is None or condition.strip() != f'"{blake2b}"'):
        return None
    return headers.get("range")
