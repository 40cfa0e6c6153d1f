"""Documents from files: .txt (one document each), .jsonl, .json and .parquet, read as a stream.

Light enough for the API process, which looks for a first document before it accepts a job.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from gnomon.errors import InvalidRequest
from gnomon.specs import TextSource
from gnomon_storage.digests import combine, file_digest
from gnomon_storage.location import Location, resolve_input

Format = Literal["txt", "jsonl", "json", "parquet"]
_ENDINGS: Final[dict[str, Format]] = {
    ".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
_PARQUET_ROWS: Final = 1024
_MAX_GROUP_BYTES: Final = 2 << 30
MAX_DOCUMENT_BYTES: Final = 256 << 20
"""Of one document, of one line of .jsonl, and of a whole .txt or .json, which are read at once."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of a source."""

    location: Location
    format: Format
    field: str


def resolve_text(sources: Sequence[TextSource], input_roots: Sequence[str]) -> tuple[TextFile, ...]:
    """The files of all sources in reading order.

    Raises InvalidRequest: "location_not_allowed" outside the roots, "missing_file", "unknown_format".
    """
    return tuple(
        TextFile(location, _format(source, location), source.field)
        for source in sources
        for location in _expand(source.url, input_roots)
    )


def read_documents(files: Sequence[TextFile]) -> Iterator[str]:
    """Every document that is not blank, in order.

    Raises InvalidRequest, "bad_text" or "unknown_field", naming file and line where something is wrong.
    """
    for file in files:
        for document in _READERS[file.format](file):
            if document.strip():
                yield document


def check_text(sources: Sequence[TextSource], input_roots: Sequence[str]) -> str:
    """Fingerprint of the text, once every file is seen to be there and a first document was read.

    Raises InvalidRequest as `resolve_text` and `read_documents` do, and "empty_corpus" where there is no document.
    """
    files = resolve_text(sources, input_roots)
    if next(read_documents(files), None) is None:
        names = ", ".join(repr(source.url) for source in sources)
        raise InvalidRequest(f"there is no text in {names}: every document is empty", code="empty_corpus")
    return text_fingerprint(files)


def text_fingerprint(files: Sequence[TextFile]) -> str:
    """A digest of the documents' bytes and of how they are read; the files' names do not matter."""
    return combine({"text": [[file.format, file.field, file_digest(file.location)] for file in files]})


def _expand(url: str, input_roots: Sequence[str]) -> list[Location]:
    """The files that a URL or pattern names; * stands for any characters but a slash."""
    if "*" not in url:
        location = resolve_input(url, input_roots)
        if not location.is_file():
            raise InvalidRequest(f"text file {url!r} does not exist; check the path", code="missing_file")
        return [location]
    head, slash, name = url[: url.index("*")].rpartition("/")
    rest = [name + url[url.index("*") :]]
    if not slash:
        raise InvalidRequest(f"pattern {url!r} has no folder; write the whole path", code="location_not_allowed")
    pattern, _, below = rest[0].partition("/")
    folder = resolve_input(head, input_roots)
    names = [name for name in folder.list() if matches(name, pattern) and not name.startswith(".")]
    found = [location for name in names for location in _expand_child(f"{head}/{name}", below, input_roots)]
    if not found:
        raise InvalidRequest(f"no text file matches {url!r}; check the pattern", code="missing_file")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern, in which * stands for any characters: in linear time, unlike an expression."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    if not name.startswith(first) or len(name) < len(first) + len(rest[-1]) or not name.endswith(rest[-1]):
        return False
    position, end = len(first), len(name) - len(rest[-1])
    for part in rest[:-1]:
        found = name.find(part, position, end)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _expand_child(url: str, below: str, input_roots: Sequence[str]) -> list[Location]:
    """Files of one match: the match itself, or what the rest of the pattern names below it."""
    if not below:
        location = resolve_input(url, input_roots)
        return [location] if location.is_file() else []
    try:
        return _expand(f"{url}/{below}", input_roots)
    except InvalidRequest as error:
        if error.code != "missing_file":
            raise
        return []  # this branch has none, another may


def _format(source: TextSource, location: Location) -> Format:
    if source.format != "auto":
        return source.format
    for ending, found in _ENDINGS.items():
        if location.name.lower().endswith(ending):
            return found
    raise InvalidRequest(
        f"cannot tell the format of {location.name!r} by its ending; set format to txt, jsonl, json or parquet",
        code="unknown_format",
    )


def _read_txt(file: TextFile) -> Iterator[str]:
    yield _decode(_read_whole(file), file, None)


def _read_jsonl(file: TextFile) -> Iterator[str]:
    with file.location.open_read() as stream:
        number = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if len(line) > MAX_DOCUMENT_BYTES:
                raise _bad(file, number, f"has more than {MAX_DOCUMENT_BYTES} bytes; divide the document")
            text = _decode(line, file, number)
            if text.strip():
                yield _text_of(_parse(text, file, number), file, f"line {number}")


def _read_json(file: TextFile) -> Iterator[str]:
    items = _parse(_decode(_read_whole(file), file, None), file, None)
    if isinstance(items, dict):
        records = list(items.values())
        # An object is one document, or a collection of documents by name: its values are then documents themselves.
        items = records if records and all(isinstance(record, dict) for record in records) else [items]
    if not isinstance(items, list):
        raise _bad(file, None, f"is a JSON {type(items).__name__}, wanted a list or an object of documents")
    for number, item in enumerate(items):
        yield _text_of(item, file, f"item {number}")


def _read_parquet(file: TextFile) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.location.open_read() as stream:
        try:
            table = pq.ParquetFile(stream)
            if file.field not in table.schema_arrow.names:
                raise _unknown_field(file, "", table.schema_arrow.names)
            if pa.types.is_string(table.schema_arrow.field(file.field).type):
                # A repeated value is held once and not once a row: a kilobyte can repeat a megabyte for ever.
                table = pq.ParquetFile(stream, metadata=table.metadata, read_dictionary=[file.field])
            _check_row_groups(table, file)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[file.field]):
                for value in batch.column(0):
                    yield _text_of(value.as_py(), file, f"row {number}")
                    number += 1
        except pa.ArrowException as error:
            raise _bad(file, None, f"is not readable Parquet: {error}") from error


def _read_whole(file: TextFile) -> bytes:
    """The bytes of a file that is read at once."""
    n_bytes = file.location.size()
    if n_bytes > MAX_DOCUMENT_BYTES:
        raise _bad(
            file, None, f"has {n_bytes} bytes, and {file.format} is read whole: {MAX_DOCUMENT_BYTES} at most; "
            "write its documents as .jsonl, one a line"
        )  # fmt: skip
    return file.location.read_bytes()


def _check_row_groups(table: Any, file: TextFile) -> None:
    """Raise InvalidRequest where a row group's column says that it unpacks to more than can be held."""
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        n_bytes = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == file.field)
        if n_bytes > _MAX_GROUP_BYTES:
            raise _bad(
                file, None, f"has a row group of {n_bytes} bytes, {_MAX_GROUP_BYTES} at most are read; write it with "
                "smaller row groups"
            )  # fmt: skip


_READERS: Final = {"txt": _read_txt, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}


def _decode(data: bytes, file: TextFile, line: int | None) -> str:
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        raise _bad(file, line, f"is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from error


def _parse(text: str, file: TextFile, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(file, line, f"is not JSON: {error}") from error


def _text_of(item: Any, file: TextFile, where: str) -> str:
    """The text of one record: a string, or a field of an object; null counts as empty."""
    if isinstance(item, dict):
        if file.field not in item:
            raise _unknown_field(file, where, list(item))
        item = item[file.field]
    if item is None:
        return ""
    if not isinstance(item, str):
        raise _bad(file, where, f"holds a {type(item).__name__}, wanted text")
    return _without_surrogates(item)


def _without_surrogates(text: str) -> str:
    """The text, with U+FFFD for halves of characters: JSON can hold them, tokenizers and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _bad(file: TextFile, where: int | str | None, what: str) -> InvalidRequest:
    place = f" line {where}" if isinstance(where, int) else f" {where}" if where else ""
    return InvalidRequest(f"{file.location.name!r}{place} {what}", code="bad_text")


def _unknown_field(file: TextFile, where: str, fields: Sequence[str]) -> InvalidRequest:
    known = ", ".join(repr(field) for field in sorted(map(str, fields))[:20]) or "none"
    place = f" {where}" if where else ""
    return InvalidRequest(
        f"{file.location.name!r}{place} has no field {file.field!r}; it has {known}; set the source's field",
        code="unknown_field",
    )
