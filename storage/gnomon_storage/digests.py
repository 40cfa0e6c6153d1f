"""What a file's bytes are called: SHA-256, remembered for as long as the file does not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gnomon_storage.location import Location

_BLOCK_BYTES = 1 << 22


def file_digest(location: Location) -> str:
    """SHA-256 of a local file, or what an object store says identifies the object's content; raises NotFound."""
    path = location.local_path()
    if path is None:
        return location.etag()
    size = location.size()  # NotFound where it is absent
    return _digest(str(path), size, path.stat().st_mtime_ns)


def combine(parts: Mapping[str, Any]) -> str:
    """One SHA-256 over named JSON values, whatever their order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - size and time are part of the cache's key
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
