"""The one JSON text of a document, and what bytes are called: the only place where either is made.

SHA-256 names what ids and manifests speak of; BLAKE2b-256, which is faster, guards the large files of checkpoints and
dictionaries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from gnomon_storage import known_digests
from gnomon_storage.location import Location

_BLOCK_BYTES = 1 << 22


def canonical_json(document: Any) -> bytes:
    """The one JSON text of a document, whatever the order of its names; raises ValueError for NaN and infinities."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(data: bytes) -> str:
    """SHA-256 of bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def spelled_out(document: Any) -> Any:
    """A foreign document with NaN and infinities as objects, which JSON has no words for; of others, the same."""
    if isinstance(document, float) and not math.isfinite(document):
        return {"not finite": str(document)}
    if isinstance(document, Mapping):
        return {name: spelled_out(value) for name, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [spelled_out(value) for value in document]
    return document


def combine(parts: Mapping[str, Any]) -> str:
    """SHA-256 over named JSON values, whatever their order."""
    return digest_of(canonical_json(parts))


def blocks_of(stream: BinaryIO) -> Iterator[bytes]:
    """The rest of a stream, 4 MiB at a time."""
    while block := stream.read(_BLOCK_BYTES):
        yield block


def stream_digest(stream: BinaryIO) -> tuple[str, int]:
    """SHA-256 of the rest of a stream, and its bytes."""
    digest, n_bytes = hashlib.sha256(), 0
    for block in blocks_of(stream):
        digest.update(block)
        n_bytes += len(block)
    return digest.hexdigest(), n_bytes


def fast_digest(stream: BinaryIO) -> str:
    """BLAKE2b-256 of the rest of a stream, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    for block in blocks_of(stream):
        digest.update(block)
    return digest.hexdigest()


def file_digest(location: Location) -> str:
    """SHA-256 of a local file, or what an object store says identifies the object's content; raises NotFound."""
    path = location.local_path()
    if path is None:
        return location.etag()
    location.size()  # NotFound where it is absent
    return path_digest(path)


def path_digest(path: Path) -> str:
    """SHA-256 of a file of this machine, remembered for as long as the file does not change."""
    status = path.stat()
    return _remembered(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _remembered(path: str, *_identity: int) -> str:
    place = Path(path)
    status = place.stat()
    known = known_digests.recall(place, status)
    if known is None:
        with place.open("rb") as file:
            known = stream_digest(file)[0]
        known_digests.remember(place, status, known)
    return known
