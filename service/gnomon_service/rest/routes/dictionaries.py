"""/v1/dictionaries: the published dictionaries of this project, and their files."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Response
from starlette.responses import StreamingResponse

from gnomon.errors import NotFound
from gnomon.resources import DictionaryRecord, Page
from gnomon_service.db import reads
from gnomon_service.rest.deps import Cursor, Id, Limit, Reader, ServicesDep
from gnomon_storage.location import Location

router = APIRouter(prefix="/v1/dictionaries", tags=["dictionaries"])

_RANGE_BYTES = 4 * 2**20


@router.get("")
def list_dictionaries(
    principal: Reader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Page[DictionaryRecord]:
    """Dictionaries, newest first."""
    with services.database.read() as connection:
        return reads.list_dictionaries(connection, principal.project, cursor=cursor, limit=limit)


@router.get("/{dictionary_id}")
def read_dictionary(dictionary_id: Id, principal: Reader, services: ServicesDep) -> DictionaryRecord:
    """One dictionary."""
    with services.database.read() as connection:
        return reads.read_dictionary(connection, principal.project, dictionary_id)


@router.get("/{dictionary_id}/files/{name:path}", response_class=StreamingResponse)
def read_file(dictionary_id: Id, name: str, principal: Reader, services: ServicesDep) -> Response:
    """One file of a dictionary; only names that the dictionary lists."""
    with services.database.read() as connection:
        dictionary = reads.read_dictionary(connection, principal.project, dictionary_id)
    n_bytes = dictionary.files.get(name)
    if n_bytes is None:
        raise NotFound(
            f"dictionary {dictionary_id!r} has no file {name!r}; it has {', '.join(sorted(dictionary.files))}",
            code="file_not_found",
        )
    # The path is made of the row's own location and of the name as the row has it, never of the request's text.
    listed = next(known for known in dictionary.files if known == name)
    file = Location.open(dictionary.location).child(listed)
    headers = {
        "Content-Length": str(n_bytes),
        "Content-Disposition": "attachment",
        "X-Content-Type-Options": "nosniff",
    }
    first = file.read_range(0, min(_RANGE_BYTES, n_bytes))
    chunks = _chunks(file, first, n_bytes)
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


def _chunks(file: Location, first: bytes, n_bytes: int) -> Iterator[bytes]:
    yield first
    for start in range(_RANGE_BYTES, n_bytes, _RANGE_BYTES):
        yield file.read_range(start, min(start + _RANGE_BYTES, n_bytes))
