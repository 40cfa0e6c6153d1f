"""Safetensors files written and read a piece at a time: no tensor is ever in memory twice.

The format is that of the safetensors library, which reads these files; bytes depend on the tensors alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, Protocol

import torch
from torch import Tensor

from gnomon.errors import CorruptArtifact
from gnomon_workers.runtime.failpoints import Failpoint, failpoint

PIECE_BYTES: Final = 16 << 20
"""What is copied at once: all that a device's tensors need of the host's memory."""
MAX_HEADER_BYTES: Final = 1 << 20
_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Rows(Protocol):
    """What a tensor of a file is written from, where no tensor holds it whole."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def pieces(self) -> Iterator[Tensor]:
        """Ranges of rows, in order; each is done with before the next is asked for."""


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor | Rows]) -> int:
    """Write tensors in the order of their names; returns the size of the file."""
    header: dict[str, Any] = {}
    position = 0
    # Every tensor begins at a multiple of its item's size if the larger items come first.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        tensor = tensors[name]
        n_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        extent = [position, position + n_bytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": extent}
        position += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = tensors[name]
        for piece in pieces(tensor) if isinstance(tensor, Tensor) else tensor.pieces():
            stream.write(_raw(piece.contiguous().cpu()))
        failpoint(Failpoint.COPY_DURING)
    return 8 + len(text) + position


class TensorReader:
    """The tensors of one file, read into tensors that are there already."""

    def __init__(self, stream: BinaryIO) -> None:
        """A seekable stream; raises CorruptArtifact where it does not begin like a safetensors file."""
        self._stream = stream
        n_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < n_bytes <= MAX_HEADER_BYTES:
            raise CorruptArtifact(f"a safetensors header of {n_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
        try:
            self._header: dict[str, Any] = json.loads(stream.read(n_bytes))
        except ValueError as error:
            raise CorruptArtifact(f"the header of a safetensors file is not JSON: {error}") from error
        self._base = 8 + n_bytes

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill `target` (n, ...) with rows [start, start + n) of a tensor.

        Raises CorruptArtifact where there is no such tensor, or of another type or shape.
        """
        entry: dict[str, Any] = self._header.get(name, {"dtype": "none", "shape": [0]})
        n_rows, dtype, shape = start + len(target), _DTYPES[target.dtype], list(target.shape[1:])
        if (entry["dtype"], entry["shape"][1:]) != (dtype, shape) or entry["shape"][0] < n_rows:
            raise CorruptArtifact(
                f"tensor {name!r}: wanted {n_rows} rows of {dtype} {shape}, got {entry['dtype']} {entry['shape']}; "
                "the checkpoint is of another dictionary"
            )
        row_bytes = target.element_size() * math.prod(target.shape[1:])
        self._stream.seek(self._base + entry["data_offsets"][0] + start * row_bytes)
        for piece in pieces(target):
            # what is not plain memory of this process is read beside it
            direct = piece.device.type == "cpu" and piece.is_contiguous()
            buffer = piece if direct else torch.empty(piece.shape, dtype=piece.dtype)
            view = _raw(buffer)
            if self._stream.readinto(view) != len(view):  # type: ignore[attr-defined]
                raise CorruptArtifact(f"tensor {name!r}: the file ends before it does")
            if not direct:
                piece.copy_(buffer)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor by ranges of rows, about PIECE_BYTES each."""
    if tensor.dim() == 0:
        tensor = tensor[None]
    row_bytes = max(1, tensor.element_size() * math.prod(tensor.shape[1:]))
    n_rows = max(1, PIECE_BYTES // row_bytes)
    return iter(tensor[start : start + n_rows] for start in range(0, len(tensor), n_rows))


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
