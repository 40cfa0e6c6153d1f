"""One Zarr array, uncompressed and chunked along its rows alone: a chunk's file holds its rows and nothing else."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from gnomon_storage.location import Location

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


def make_array(
    group: Location, name: str, *, shape: tuple[int, ...], chunk_rows: int, dtype: str, attributes: dict[str, Any]
) -> None:
    """Create an uncompressed array, chunked along its rows only, without its chunks."""
    # Zarr's conditional puts are not made again where their answer is lost; a location's writes are.
    made: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(made),
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
    for key, metadata in made.items():
        group.child(key).write_bytes(metadata.to_bytes())


def chunk_key(chunk: int, n_dims: int) -> str:
    """Path of a chunk inside its array; arrays are chunked along rows only."""
    return "/".join(["c", str(chunk), *["0"] * (n_dims - 1)])
