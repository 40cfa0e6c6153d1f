"""How a row of activations lies on disk: as float32, as the bits of bfloat16, or as int8 with a scale of its own."""

from __future__ import annotations

from typing import Final

import numpy as np

from gnomon.specs import StoredDtype
from gnomon_storage.arrays import Array

SCALE_BYTES: Final = 4
"""Of an int8 row: its scale, float32, stands before its values, so that a chunk holds all that its rows need."""
INT8_MOST: Final = 127
"""Largest stored value: a row's scale is its largest magnitude over this."""
_VALUES: Final[dict[StoredDtype, str]] = {"float32": "float32", "bfloat16": "uint16", "int8": "uint8"}
_SCALES: Final[dict[StoredDtype, int]] = {"float32": 0, "bfloat16": 0, "int8": SCALE_BYTES}


def raw_dtype(dtype: StoredDtype) -> str:
    """NumPy's name of what a stored row consists of."""
    return _VALUES[dtype]


def raw_width(dtype: StoredDtype, d_in: int) -> int:
    """How many of these a row of d_in values has."""
    return d_in + _SCALES[dtype]


def row_bytes(dtype: StoredDtype, d_in: int) -> int:
    """Bytes of a row of d_in values."""
    return np.dtype(_VALUES[dtype]).itemsize * raw_width(dtype, d_in)


def decode(raw: Array, dtype: StoredDtype) -> Array:
    """Float32 values (n, d_in) of stored rows (n, raw_width)."""
    if dtype == "float32":
        return raw
    if dtype == "bfloat16":
        return float32_from_bfloat16(raw)
    scales = np.ascontiguousarray(raw[:, :SCALE_BYTES]).view("<f4")
    values: Array = raw[:, SCALE_BYTES:].view(np.int8).astype(np.float32)
    values *= scales
    return values


def float32_from_bfloat16(raw: Array) -> Array:
    """The float32 values of bfloat16 bits held as uint16."""
    out = np.zeros((*raw.shape, 2), dtype="<u2")
    out[..., 1] = raw
    values: Array = out.view("<f4")[..., 0]
    return values
