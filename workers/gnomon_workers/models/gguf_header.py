"""The header of a GGUF file: its settings, and its tensors' names and shapes. No weight is read, no vocabulary kept.

Layout: magic, version, number of tensors, number of settings; then each setting as (key, type, value), then each
tensor as (name, number of dimensions, dimensions, type, offset). Strings carry their length before them.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MAX_HEADER_BYTES: Final = 256 << 20
"""Vocabularies of large models take tens of megabytes."""
MAX_FIELDS: Final = 1 << 14
MAX_TENSORS: Final = 1 << 18
MAX_ITEMS: Final = 1 << 22
"""Of all arrays together: a vocabulary has up to a few hundred thousand tokens, and as many merges."""
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9
_MAX_DIMS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the harvester needs of a GGUF file's header."""

    fields: Mapping[str, Any]
    """Settings with a single value."""
    arrays: frozenset[str]
    """Names of the settings that are arrays, whose values are left out."""
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor name -> shape, in PyTorch's order."""


def parse_gguf(path: Path) -> GgufHeader:
    """Read the header of a file; raises ValueError where it is not GGUF version 2 or 3, or is damaged."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, min(len(data), MAX_HEADER_BYTES))
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not known")
        n_tensors, n_fields = cursor.scalar("<Q"), cursor.scalar("<Q")
        if n_fields > MAX_FIELDS or n_tensors > MAX_TENSORS:
            raise ValueError(f"it says that it holds {n_fields} settings and {n_tensors} tensors, which is too many")
        fields: dict[str, Any] = {}
        arrays: set[str] = set()
        for _ in range(n_fields):
            key, kind = cursor.string(), cursor.scalar("<I")
            if key in fields or key in arrays:
                raise ValueError(f"it holds setting {key!r} twice")
            if kind == _ARRAY:
                cursor.skip_array()
                arrays.add(key)
            else:
                fields[key] = cursor.value(kind)
        tensors = [_tensor(cursor) for _ in range(n_tensors)]
        shapes = dict(tensors)
        if len(shapes) < len(tensors):
            raise ValueError("it holds two tensors of one name")
        return GgufHeader(fields=fields, arrays=frozenset(arrays), shapes=shapes)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...]]:
    name, n_dims = cursor.string(), cursor.scalar("<I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(n_dims))
    cursor.skip(12)  # type and offset
    return name, shape[::-1]


class _Cursor:
    """A position in the header; every step is checked against its end, so damage ends in ValueError."""

    def __init__(self, data: mmap.mmap, end: int) -> None:
        self._data = data
        self._end = end
        self._position = 0
        self._n_items = 0

    def skip(self, n_bytes: int) -> int:
        """Move on; returns the position before."""
        before = self._position
        if n_bytes > self._end - before:
            raise ValueError("its header is cut short")
        self._position = before + n_bytes
        return before

    def take(self, n_bytes: int) -> bytes:
        start = self.skip(n_bytes)
        return self._data[start : start + n_bytes]

    def scalar(self, layout: str) -> Any:
        return struct.unpack_from(layout, self._data, self.skip(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        return self.scalar(_layout(kind))

    def skip_array(self) -> None:
        kind, n_items = self.scalar("<I"), self.scalar("<Q")
        self._n_items += n_items
        if self._n_items > MAX_ITEMS:
            raise ValueError(f"its arrays hold more than {MAX_ITEMS} items")
        if kind == _ARRAY:
            raise ValueError("it holds an array of arrays")
        if kind != _STRING:
            self.skip(struct.calcsize(_layout(kind)) * n_items)
            return
        for _ in range(n_items):
            self.skip(self.scalar("<Q"))


def _layout(kind: int) -> str:
    layout = _SCALARS.get(kind)
    if layout is None:
        raise ValueError(f"it holds a value of unknown type {kind}")
    return layout
