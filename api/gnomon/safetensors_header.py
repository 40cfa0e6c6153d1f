"""The header of a safetensors file, written and read: the only place that knows the format; standard library only.

8 bytes   size of the header, little endian
header    JSON: by tensor its dtype, shape and extent, [start, stop) counted from the end of the header
data      the tensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gnomon.errors import CorruptArtifact

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 64
SIZES_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_METADATA = "__metadata__"
_DICTIONARY_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of a file by name, and where their bytes begin."""

    tensors: Mapping[str, TensorInfo]
    n_bytes: int
    """Bytes of the file before the first tensor's."""


def encode_header(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, Header]:
    """The bytes before the tensors of a file that holds (dtype, shape) by name, in the order given."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata is not None else {}
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for name, (dtype, shape) in shapes.items():
        stop = position + SIZES_BYTES[dtype] * prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        tensors[name] = TensorInfo(dtype=dtype, shape=tuple(shape), start=position, stop=stop)
        position = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text, Header(tensors=tensors, n_bytes=8 + len(text))


def read_header(stream: BinaryIO, *, max_bytes: int = MAX_HEADER_BYTES) -> Header:
    """The header at the beginning of a stream; raises ValueError, in words that fit behind the file's name."""
    prefix = stream.read(8)
    n_bytes = int.from_bytes(prefix, "little") if len(prefix) == 8 else 0
    if not 2 <= n_bytes <= max_bytes:
        raise ValueError(f"not a safetensors file: a header of {n_bytes} bytes, wanted 2 to {max_bytes}")
    raw = stream.read(n_bytes)
    if len(raw) < n_bytes:
        raise ValueError(f"not a safetensors file: a header of {n_bytes} bytes in a file of {8 + len(raw)}")
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is not an object")
    tensors = {name: _parse(name, entry) for name, entry in entries.items() if name != _METADATA}
    return Header(tensors=tensors, n_bytes=8 + n_bytes)


def read_dictionary_header(path: Path) -> Mapping[str, TensorInfo]:
    """Tensors of a dictionary's file by name, after checking every bound; raises CorruptArtifact.

    The header must be at most 1 MiB of JSON with at most 64 tensors of float type, whose bytes fill the
    rest of the file exactly, without gaps or overlaps.
    """
    with path.open("rb") as file:
        try:
            header = read_header(file)
        except ValueError as error:
            raise _corrupt(path, str(error)) from error
    if len(header.tensors) > MAX_TENSORS:
        raise _corrupt(path, f"{len(header.tensors)} tensors, at most {MAX_TENSORS} are allowed")
    for name, info in header.tensors.items():
        if info.dtype not in _DICTIONARY_DTYPES:
            raise _corrupt(path, f"{name} has dtype {info.dtype}, wanted one of {list(_DICTIONARY_DTYPES)}")
        if not all(0 < size < 2**48 for size in info.shape) or len(info.shape) > 2:
            raise _corrupt(path, f"{name} has the impossible shape {list(info.shape)}")
    _check_extents(path, header.tensors, path.stat().st_size - header.n_bytes)
    return header.tensors


def check_shapes(path: Path, found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CorruptArtifact unless the file holds exactly the wanted tensors in the wanted shapes."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise _corrupt(path, f"tensors missing: {missing}, not expected: {extra}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise _corrupt(path, f"{name} has shape {found[name].shape}, cfg.json says {shape}")


def _parse(name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if all(type(size) is int for size in shape):
                return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, stop=stop)
    raise ValueError(f"the header's entry of {name!r} is malformed")


def _check_extents(path: Path, tensors: Mapping[str, TensorInfo], n_data_bytes: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        n_bytes = SIZES_BYTES[info.dtype] * prod(info.shape)
        if info.start != position or info.stop - info.start != n_bytes:
            raise _corrupt(path, f"{name} claims bytes {info.start} to {info.stop}, its shape needs {n_bytes}")
        position = info.stop
    if position != n_data_bytes:
        raise _corrupt(path, f"tensors end at byte {position} of {n_data_bytes}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _corrupt(path: Path, what: str) -> CorruptArtifact:
    return CorruptArtifact(f"{str(path)!r}: {what}; export or download the dictionary again")
