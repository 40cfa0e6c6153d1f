"""The header of a safetensors file, checked before a byte of any tensor is read; standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.errors import CorruptArtifact

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 64
_SIZES_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a file by name, after checking every bound; raises CorruptArtifact.

    The header must be at most 1 MiB of JSON with at most 64 tensors of float type, whose bytes fill the
    rest of the file exactly, without gaps or overlaps.
    """
    n_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        n_header_bytes = int.from_bytes(file.read(8), "little")
        if n_header_bytes > min(MAX_HEADER_BYTES, n_file_bytes - 8):
            raise _corrupt(path, f"header of {n_header_bytes} bytes in a file of {n_file_bytes}")
        raw = file.read(n_header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "header is not an object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _corrupt(path, f"{len(header)} tensors, at most {MAX_TENSORS} are allowed")
    tensors = {name: _parse(path, name, entry) for name, entry in header.items()}
    _check_extents(path, tensors, n_file_bytes - 8 - n_header_bytes)
    return tensors


def check_shapes(path: Path, found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CorruptArtifact unless the file holds exactly the wanted tensors in the wanted shapes."""
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise _corrupt(path, f"tensors missing: {missing}, not expected: {extra}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise _corrupt(path, f"{name} has shape {found[name].shape}, cfg.json says {shape}")


def _parse(path: Path, name: str, entry: Any) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            if dtype not in _SIZES_BYTES:
                raise _corrupt(path, f"{name} has dtype {dtype}, wanted one of {sorted(_SIZES_BYTES)}")
            if not all(type(size) is int and 0 < size < 2**48 for size in shape) or len(shape) > 2:
                raise _corrupt(path, f"{name} has the impossible shape {shape}")
            return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, stop=stop)
    raise _corrupt(path, f"entry of {name!r} is malformed")


def _check_extents(path: Path, tensors: Mapping[str, TensorInfo], n_data_bytes: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        n_bytes = _SIZES_BYTES[info.dtype]
        for size in info.shape:
            n_bytes *= size
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
