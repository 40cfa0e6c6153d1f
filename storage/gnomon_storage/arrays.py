"""One Zarr array, uncompressed and chunked along its rows alone: a chunk's file holds its rows and nothing else."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import zarr

from gnomon_storage.location import Location

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def make_array(
    group: Location, name: str, *, shape: tuple[int, ...], chunk_rows: int, dtype: str, attributes: dict[str, Any]
) -> None:
    """Create an uncompressed array, chunked along its rows only, without its chunks."""
    zarr.create_array(
        group.zarr_store(),
        name=name,
        shape=shape,
        chunks=(chunk_rows, *shape[1:]),
        dtype=dtype,
        compressors=None,
        filters=None,
        fill_value=0,
        attributes=attributes,
        zarr_format=3,
    )


def chunk_key(chunk: int, n_dims: int) -> str:
    """Path of a chunk inside its array; arrays are chunked along rows only."""
    return "/".join(["c", str(chunk), *["0"] * (n_dims - 1)])
