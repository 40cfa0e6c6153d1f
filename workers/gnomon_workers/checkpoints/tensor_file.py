"""Safetensors files written and read a piece at a time: no tensor is ever in memory twice.

The format is that of the safetensors library, which reads these files; bytes depend on the tensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import BinaryIO, Final, Protocol

import torch
from torch import Tensor

from gnomon.errors import CorruptArtifact
from gnomon.safetensors_header import TensorInfo, encode_header, read_header
from gnomon_workers.runtime.failpoints import Failpoint, failpoint

PIECE_BYTES: Final = 16 << 20
"""What is copied at once: all that a device's tensors need of the host's memory."""
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


_ABSENT: Final = TensorInfo(dtype="none", shape=(0,), start=0, stop=0)


class PiecewiseTensor(Protocol):
    """What a tensor of a file is written from, where no tensor holds it whole."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def pieces(self) -> Iterator[Tensor]:
        """Ranges of rows, in order; each is done with before the next is asked for."""


def write_tensors(stream: BinaryIO, tensors: Mapping[str, Tensor | PiecewiseTensor]) -> int:
    """Write tensors in the order of their names; returns the size of the file."""
    # Every tensor begins at a multiple of its item's size if the larger items come first.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    prefix, header = encode_header({name: (_DTYPES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names})
    stream.write(prefix)
    for name in names:
        tensor = tensors[name]
        for piece in pieces(tensor) if isinstance(tensor, Tensor) else tensor.pieces():
            stream.write(_raw(piece.contiguous().cpu()))
        failpoint(Failpoint.COPY_DURING)
    return header.n_bytes + max((info.stop for info in header.tensors.values()), default=0)


class TensorReader:
    """The tensors of one file, read into tensors that are there already."""

    def __init__(self, stream: BinaryIO) -> None:
        """A seekable stream; raises CorruptArtifact where it does not begin like a safetensors file."""
        self._stream = stream
        try:
            self._header = read_header(stream)
        except ValueError as error:
            raise CorruptArtifact(f"{error}; the checkpoint is damaged") from error

    def read_rows(self, name: str, start: int, target: Tensor) -> None:
        """Fill `target` (n, ...) with rows [start, start + n) of a tensor.

        Raises CorruptArtifact where there is no such tensor, or of another type or shape.
        """
        info = self._header.tensors.get(name, _ABSENT)
        n_rows, dtype, shape = start + len(target), _DTYPES[target.dtype], tuple(target.shape[1:])
        if (info.dtype, info.shape[1:]) != (dtype, shape) or info.shape[0] < n_rows:
            raise CorruptArtifact(
                f"tensor {name!r}: wanted {n_rows} rows of {dtype} {list(shape)}, got {info.dtype} {list(info.shape)}; "
                "the checkpoint is of another dictionary"
            )
        row_bytes = target.element_size() * math.prod(target.shape[1:])
        self._stream.seek(self._header.n_bytes + info.start + start * row_bytes)
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
