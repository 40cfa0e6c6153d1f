"""/v1/dictionaries: the published dictionaries of this project, and their files."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from gnomon.errors import NotFound
from gnomon.resources import DictionaryRecord, Page
from gnomon_service.db import reads
from gnomon_service.jobs.deletions import begin_dictionary_deletion, gone, restore_dictionary
from gnomon_service.rest.deps import Cursor, Id, Limit, Reader, ServicesDep, Writer
from gnomon_service.rest.problems import make_problem
from gnomon_service.rest.ranges import Span, digest_headers, is_known, range_of, span_of
from gnomon_storage.location import Location
from gnomon_workers.dictionaries.folder import published_digests

router = APIRouter(prefix="/v1/dictionaries", tags=["dictionaries"])

DAY_S = 86_400.0
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


@router.delete("/{dictionary_id}", status_code=202)
def delete_dictionary(dictionary_id: Id, principal: Writer, services: ServicesDep) -> DictionaryRecord:
    """Delete a dictionary's files, in GNOMON_DICTIONARY_GRACE_DAYS; until then it can be had, and restored."""
    grace_s = services.settings.dictionary_grace_days * DAY_S
    with services.database.write() as connection:
        begin_dictionary_deletion(
            connection, principal.project, dictionary_id, why=f"deleted by {principal.name}", grace_s=grace_s
        )
        return reads.read_dictionary(connection, principal.project, dictionary_id)


@router.post("/{dictionary_id}/restore")
def restore(dictionary_id: Id, principal: Writer, services: ServicesDep) -> DictionaryRecord:
    """Undo a deletion whose files are still there."""
    with services.database.write() as connection:
        restore_dictionary(connection, principal.project, dictionary_id)
        return reads.read_dictionary(connection, principal.project, dictionary_id)


@router.get("/{dictionary_id}/files/{name:path}", response_class=StreamingResponse)
def read_file(dictionary_id: Id, name: str, principal: Reader, services: ServicesDep, request: Request) -> Response:
    """One file of a dictionary, or with `Range: bytes=...` a part of it; only names that the dictionary lists.

    `ETag` and `Repr-Digest` hold its BLAKE2b-256 digest. `If-Range` and `If-None-Match` are understood.
    """
    with services.database.read() as connection:
        dictionary = reads.read_dictionary(connection, principal.project, dictionary_id)
    if dictionary.state == "deleted":
        raise gone(dictionary_id)
    n_bytes = dictionary.files.get(name)
    if n_bytes is None:
        raise NotFound(
            f"dictionary {dictionary_id!r} has no file {name!r}; it has {', '.join(sorted(dictionary.files))}",
            code="file_not_found",
        )
    # The path is made of the row's own location and of the name as the row has it, never of the request's text.
    listed = next(known for known in dictionary.files if known == name)
    folder = Location.open(dictionary.location)
    digest = published_digests(folder).get(listed)
    identity = {**digest_headers(digest), "X-Content-Type-Options": "nosniff"}
    if is_known(request.headers, digest):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=identity)
    span = span_of(range_of(request.headers, digest), n_bytes)
    if span is None:
        return _no_such_range(listed, n_bytes)
    return _stream(folder.child(listed), span, {**identity, "Content-Disposition": "attachment"})


def _no_such_range(name: str, n_bytes: int) -> Response:
    return make_problem(
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
        "range_not_satisfiable",
        f"{name!r} has {n_bytes} bytes, and none in the range that was asked for; ask for the whole file",
        headers={"Content-Range": f"bytes */{n_bytes}"},
    )


def _stream(file: Location, span: Span, headers: dict[str, str]) -> Response:
    """A part of a file, a few megabytes of it in memory at a time."""
    first = file.read_range(span.start, min(span.start + _RANGE_BYTES, span.stop))  # NotFound before anything is sent
    return StreamingResponse(
        _chunks(file, first, span),
        status_code=HTTPStatus.OK if span.is_whole else HTTPStatus.PARTIAL_CONTENT,
        media_type="application/octet-stream",
        headers={**headers, **span.headers()},
    )


def _chunks(file: Location, first: bytes, span: Span) -> Iterator[bytes]:
    yield first
    for start in range(span.start + _RANGE_BYTES, span.stop, _RANGE_BYTES):
        yield file.read_range(start, min(start + _RANGE_BYTES, span.stop))
