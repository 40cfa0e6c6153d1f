"""How much room a harvest needs, told before its work from the spec and the beginning of the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, get_args

from gnomon.specs import HarvestSpec
from gnomon_storage.activations import column_chunk_rows
from gnomon_storage.location import Location
from gnomon_storage.manifest import Split, parse_commit
from gnomon_storage.rows import row_bytes
from gnomon_storage.writing import rows_per_chunk

_INTEGER_BYTES: Final = 4
_ARRAY_BYTES: Final = 700
"""Of an array's metadata."""
_ROW_COLUMNS: Final = 3
"""Integers of a row: its token, position and context."""


def expected_tokens(spec: HarvestSpec, n_tokens: int, n_bytes_read: int, n_bytes: int) -> int:
    """Tokens of a text of n_bytes whose first n_bytes_read gave n_tokens: a budget may be larger than any text."""
    return min(spec.token_budget, n_tokens * n_bytes // max(1, n_bytes_read))


def needed_bytes(spec: HarvestSpec, widths: Mapping[str, int], n_tokens: int) -> int:
    """About what the segments of so many tokens take; hooks of unknown width count nothing."""
    n_tokens = max(0, n_tokens)
    n_rows = n_tokens * (spec.context_length - spec.drop.first_positions) // spec.context_length
    of_row = sum(row_bytes(spec.dtype, widths[hook]) for hook in spec.hooks if hook in widths)
    of_row += _ROW_COLUMNS * _INTEGER_BYTES
    return n_rows * of_row + n_tokens * _INTEGER_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """What a store of so many tokens will be."""

    n_rows: int
    """To train on."""
    n_held_out_rows: int
    n_bytes: int


def store_size(spec: HarvestSpec, widths: Mapping[str, int], n_tokens: int, scheme: str) -> StoreSize:
    """The rows and bytes of a store on "file" or "s3", with what its last chunks are filled up by.

    Special tokens among the text, which may be dropped too, are not known before it is read.
    """
    n_contexts = max(1, n_tokens // spec.context_length)
    n_held_out = (n_contexts + spec.held_out_every - 2) // spec.held_out_every
    n_kept = spec.context_length - spec.drop.first_positions
    n_bytes = sum(_split_bytes(spec, widths, n, scheme) for n in (n_contexts - n_held_out, n_held_out))
    return StoreSize(n_rows=(n_contexts - n_held_out) * n_kept, n_held_out_rows=n_held_out * n_kept, n_bytes=n_bytes)


def _split_bytes(spec: HarvestSpec, widths: Mapping[str, int], n_contexts: int, scheme: str) -> int:
    """Of the segments of one split: full ones, and what is left."""
    a_segment = max(1, spec.segment_tokens // spec.context_length)
    n_full, rest = divmod(n_contexts, a_segment)
    of_full = _segment_bytes(spec, widths, a_segment, scheme) if n_full else 0
    return n_full * of_full + (_segment_bytes(spec, widths, rest, scheme) if rest else 0)


def _segment_bytes(spec: HarvestSpec, widths: Mapping[str, int], n_contexts: int, scheme: str) -> int:
    n_rows = n_contexts * (spec.context_length - spec.drop.first_positions)
    chunk_rows = rows_per_chunk(n_rows, max(widths.values()), spec.dtype, scheme)
    values = _filled(n_rows, chunk_rows) * sum(row_bytes(spec.dtype, width) for width in widths.values())
    columns = _ROW_COLUMNS * _filled(n_rows, column_chunk_rows((n_rows,)))
    shape = (n_contexts, spec.context_length)
    contexts = _filled(n_contexts, column_chunk_rows(shape)) * spec.context_length
    return values + _INTEGER_BYTES * (columns + contexts) + _ARRAY_BYTES * (len(widths) + _ROW_COLUMNS + 1)


def _filled(n_rows: int, chunk_rows: int) -> int:
    """Rows of an array whose last chunk is whole."""
    return -(-n_rows // chunk_rows) * chunk_rows


def committed_tokens(store: Location) -> int:
    """Tokens of the segments that are committed already."""
    places = [
        store.child(split, name)
        for split in get_args(Split)
        for name in store.child(split).list()
        if name.endswith(".json")
    ]
    return sum(parse_commit(place.read_bytes(), place.url).n_tokens for place in places)
