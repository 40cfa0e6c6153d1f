"""How much room a harvest needs, told before its work from the spec and the beginning of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from gnomon.specs import HarvestSpec
from gnomon_storage.location import Location
from gnomon_storage.manifest import Split, parse_commit

_INTEGER_BYTES: Final = 4
_ROW_COLUMNS: Final = 3
"""Integers of a row: its token, position and context."""


def expected_tokens(spec: HarvestSpec, n_tokens: int, n_bytes_read: int, n_bytes: int) -> int:
    """Tokens of a text of n_bytes whose first n_bytes_read gave n_tokens: a budget may be larger than any text."""
    return min(spec.token_budget, n_tokens * n_bytes // max(1, n_bytes_read))


def needed_bytes(spec: HarvestSpec, widths: Mapping[str, int], n_tokens: int) -> int:
    """About what the segments of so many tokens take; hooks of unknown width count nothing."""
    n_tokens = max(0, n_tokens)
    n_rows = n_tokens * (spec.context_length - spec.drop.first_positions) // spec.context_length
    n_values = sum(widths.get(hook, 0) for hook in spec.hooks)
    of_row = n_values * (2 if spec.dtype == "bfloat16" else 4) + _ROW_COLUMNS * _INTEGER_BYTES
    return n_rows * of_row + n_tokens * _INTEGER_BYTES


def committed_tokens(store: Location) -> int:
    """Tokens of the segments that are committed already."""
    places = [
        store.child(split, name)
        for split in get_args(Split)
        for name in store.child(split).list()
        if name.endswith(".json")
    ]
    return sum(parse_commit(place.read_bytes(), place.url).n_tokens for place in places)
