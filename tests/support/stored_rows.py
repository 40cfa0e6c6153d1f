"""Rows as a harvest stores them, made in NumPy, for made-up rows; and files as Zarr itself reads them."""

from __future__ import annotations

import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from gnomon.specs import StoredDtype
from gnomon_storage.arrays import Array
from gnomon_storage.location import Location


def as_stored(values: Array, dtype: StoredDtype) -> Array:
    """Rows (n, d_in) as a store of this type has them."""
    if dtype == "float32":
        return values
    return bfloat16_from_float32(values) if dtype == "bfloat16" else int8_from_float32(values)


def int8_from_float32(values: Array) -> Array:
    """Each row as the bytes of its scale, then of its values in units of that, to the nearest."""
    scales = (np.abs(values).max(1, keepdims=True) / np.float32(127)).astype("<f4")
    units = np.round(np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)).astype(np.int8)
    return np.concatenate([scales.view(np.uint8), units.view(np.uint8)], 1)


def bfloat16_from_float32(values: Array) -> Array:
    """The bits, as uint16, of the nearest bfloat16; ties to even, NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype("<u2")


def zarr_store_of(folder: Location) -> MemoryStore:
    """All files of a folder as a store of Zarr's."""
    buffer = default_buffer_prototype().buffer
    return MemoryStore({name: buffer.from_bytes(folder.child(name).read_bytes()) for name in folder.walk()})
