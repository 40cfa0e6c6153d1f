"""Documents from files: .txt (one document each), .jsonl, .json and .parquet, read as a stream.

Light enough for the API process, which looks for a first document before it accepts a job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from gnomon.errors import InvalidRequest
from gnomon.specs import TextSource
from gnomon_storage.digests import combine, file_digest
from gnomon_storage.location import Location, resolve_input
from gnomon_workers.harvest.readers import READERS, Format, TextFile

_ENDINGS: Final[dict[str, Format]] = {
    ".txt": "txt", ".md": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet",
}  # fmt: skip
N_TOLD: Final = 5
"""Bad documents of which the place is told; the others are counted."""


def resolve_text(sources: Sequence[TextSource], input_roots: Sequence[str]) -> tuple[TextFile, ...]:
    """The files of all sources in reading order.

    Raises InvalidRequest: "location_not_allowed" outside the roots, "missing_file", "unknown_format".
    """
    found = [
        (number, source, location)
        for number, source in enumerate(sources)
        for location in _expand(source.url, input_roots)
    ]
    n_named = Counter(location.name for _, _, location in found)
    return tuple(
        TextFile(
            location,
            _format(source, location),
            source.field,
            number,
            source.max_bad_documents,
            label=location.name if n_named[location.name] == 1 else location.url,
        )
        for number, source, location in found
    )


@dataclass(slots=True)
class Tally:
    """What reading the text has come to: a function of how far it was read, and of nothing else."""

    n_bytes: int = 0
    """Of documents, in UTF-8."""
    n_bad: int = 0
    """Documents that were passed over."""
    first_bad: list[str] = field(default_factory=list)
    """Where the first N_TOLD of them are, and what is wrong."""
    _of_source: Counter[int] = field(default_factory=Counter)

    def pass_over(self, bad: InvalidRequest, file: TextFile) -> None:
        """Count a bad document; raises its error, or "too_many_bad_documents", where the source may have no more."""
        self._of_source[file.source] += 1
        n_bad = self._of_source[file.source]
        if n_bad > file.max_bad:
            raise bad if not file.max_bad else _too_many(bad, n_bad, file.max_bad)
        self.n_bad += 1
        if len(self.first_bad) < N_TOLD:
            self.first_bad.append(bad.message)


def read_documents(files: Sequence[TextFile], tally: Tally | None = None) -> Iterator[str]:
    """Every document that is not blank, in order; bad ones are passed over where their source allows it.

    Raises InvalidRequest, "bad_text" or "unknown_field", naming file and line where something is wrong, and
    "too_many_bad_documents".
    """
    tally = tally or Tally()
    for file in files:
        for document in READERS[file.format](file):
            if isinstance(document, InvalidRequest):
                tally.pass_over(document, file)
            elif document.strip():
                tally.n_bytes += len(document.encode())
                yield document


def _too_many(bad: InvalidRequest, n_bad: int, limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"{bad.message}; it is bad document number {n_bad} of its source, and max_bad_documents={limit} are passed "
        "over; mend the text, or raise max_bad_documents, and submit it again",
        code="too_many_bad_documents",
        n_bad_documents=n_bad,
    )


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
