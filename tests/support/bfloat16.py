"""bfloat16 in NumPy, which has none: the bits that a harvest stores, for made-up rows."""

from __future__ import annotations

import numpy as np

from gnomon_storage.arrays import Array


def bfloat16_from_float32(values: Array) -> Array:
    """The bits, as uint16, of the nearest bfloat16; ties to even, NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype("<u2")
