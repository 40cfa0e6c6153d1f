"""Documents of one file, in each format, as a stream: each is its text, or the error that says what is wrong with it.

What is wrong with a file as a whole (it is no list of documents, or not Parquet) is raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, ParamSpec, TypeAlias

from gnomon.errors import InvalidRequest
from gnomon_storage.location import Location

P = ParamSpec("P")
Document: TypeAlias = str | InvalidRequest
Format = Literal["txt", "jsonl", "json", "parquet"]
_PARQUET_ROWS: Final = 1024
_MAX_GROUP_BYTES: Final = 2 << 30
_FEW_NULS: Final = 8
"""One character of so many may be NUL; in UTF-16 of Latin letters, which is valid UTF-8, every other one is."""
_SKIPPED_BYTES: Final = 1 << 20
MAX_DOCUMENT_BYTES: Final = 256 << 20
"""Of one document, of one line of .jsonl, and of a whole .txt or .json, which are read at once."""
_SORTS: Final[dict[type, str]] = {
    bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip
"""What is there instead of what is wanted, as JSON names it; other types only come out of Parquet."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """One file of a source."""

    location: Location
    format: Format
    field: str
    source: int
    """Number of the source that it belongs to."""
    max_bad: int
    """Bad documents that the source may have."""
    label: str
    """What messages call it: its name, or all of its address where another file of the text has that name."""


def _try(read: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> Document:
    """What is read, or what is wrong with it."""
    try:
        return read(*args, **kwargs)
    except InvalidRequest as error:
        return error


def _read_txt(file: TextFile) -> Iterator[Document]:
    yield _try(_whole_text, file)


def _whole_text(file: TextFile) -> str:
    return _decode(_read_whole(file), file, None)


def _read_jsonl(file: TextFile) -> Iterator[Document]:
    with file.location.open_read() as stream:
        number = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            yield _try(_line_text, line, file, number)
            while len(line) > _SKIPPED_BYTES and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = stream.readline(_SKIPPED_BYTES + 1)


def _line_text(line: bytes, file: TextFile, number: int) -> str:
    if len(line) > MAX_DOCUMENT_BYTES:
        raise _bad(file, number, f"has more than {MAX_DOCUMENT_BYTES} bytes; divide the document")
    text = _decode(line, file, number)
    return _text_of(_parse(text, file, number), file, f"line {number}") if text.strip() else ""


def _read_json(file: TextFile) -> Iterator[Document]:
    items = _parse(_decode(_read_whole(file), file, None), file, None)
    if isinstance(items, dict):
        records = list(items.values())
        # An object is one document, or a collection of documents by name: its values are then documents themselves.
        items = records if records and all(isinstance(record, dict) for record in records) else [items]
    if not isinstance(items, list):
        raise _bad(file, None, f"holds {_SORTS[type(items)]}, wanted a list or an object of documents")
    for number, item in enumerate(items):
        yield _try(_text_of, item, file, f"item {number}")


def _read_parquet(file: TextFile) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.location.open_read() as stream:
        try:
            table = pq.ParquetFile(stream)
            _check_columns(table.schema_arrow.names, file)
            # A repeated value is held once and not once a row: a kilobyte can repeat a megabyte for ever.
            table = pq.ParquetFile(stream, metadata=table.metadata, read_dictionary=_leaves(table, file))
            _check_row_groups(table, file)
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[file.field]):
                for value in batch.column(0):
                    yield _try(_cell_text, value, file, f"row {number}")
                    number += 1
        except pa.ArrowException as error:
            raise _bad(file, None, f"is not readable Parquet: {error}") from error


def _check_columns(names: Sequence[str], file: TextFile) -> None:
    """Raise InvalidRequest unless one column has the field's name."""
    if file.field not in names:
        raise _unknown_field(file, "", names)
    if names.count(file.field) > 1:
        raise _bad(file, None, f"has {names.count(file.field)} columns of name {file.field!r}; rename all but one")


def _leaves(table: Any, file: TextFile) -> list[str]:
    """Paths of the columns that hold the field's bytes, however it is nested and whatever the kind of string."""
    schema = table.metadata.schema
    columns = [schema.column(number) for number in range(len(schema))]
    return [each.path for each in columns if each.physical_type == "BYTE_ARRAY" and _is_of_field(each.path, file)]


def _is_of_field(path: str, file: TextFile) -> bool:
    return path == file.field or path.startswith(f"{file.field}.")


def _cell_text(value: Any, file: TextFile, where: str) -> str:
    try:
        return _text_of(value.as_py(), file, where)
    except UnicodeDecodeError as error:
        raise _bad(file, where, f"is not UTF-8 at offset {error.start}") from error


def text_bytes(file: TextFile) -> int:
    """About the bytes of a file's text: of Parquet unpacked, else of the file."""
    if file.format != "parquet":
        return file.location.size()
    import pyarrow.parquet as pq

    with file.location.open_read() as stream:
        return sum(_group_bytes(pq.ParquetFile(stream), file))


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
    for n_bytes in _group_bytes(table, file):
        if n_bytes > _MAX_GROUP_BYTES:
            raise _bad(
                file, None, f"has a row group of {n_bytes} bytes, {_MAX_GROUP_BYTES} at most are read; write it with "
                "smaller row groups"
            )  # fmt: skip


def _group_bytes(table: Any, file: TextFile) -> Iterator[int]:
    """Bytes to which the column of each row group unpacks, as the file says."""
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        yield sum(column.total_uncompressed_size for column in columns if _is_of_field(column.path_in_schema, file))


READERS: Final = {"txt": _read_txt, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}


def _decode(data: bytes, file: TextFile, line: int | None) -> str:
    try:
        text = data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        raise _bad(file, line, f"is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from error
    if text.count("\0") * _FEW_NULS > len(text):
        raise _bad(file, line, "is not text: too many of its characters are NUL, as in UTF-16; convert it to UTF-8")
    return text


def _parse(text: str, file: TextFile, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # of .jsonl, the parser sees one line alone: its own count of lines would contradict the file's
        number, column = (error.lineno, error.colno) if line is None else (line, error.pos + 1)
        raise _bad(file, number, f"is not JSON: {error.msg.removesuffix(' at')} at column {column}") from error
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
        raise _bad(file, where, f"holds {_SORTS.get(type(item), type(item).__name__)}, wanted text")
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
    return InvalidRequest(f"{file.label!r}{place} {what}", code="bad_text")


def _unknown_field(file: TextFile, where: str, fields: Sequence[str]) -> InvalidRequest:
    known = ", ".join(repr(field) for field in sorted(map(str, fields))[:20]) or "none"
    place = f" {where}" if where else ""
    return InvalidRequest(
        f"{file.label!r}{place} has no field {file.field!r}; it has {known}; set the source's field",
        code="unknown_field",
    )
