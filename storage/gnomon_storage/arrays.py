"""One Zarr array: made uncompressed, checked before it is opened, and never read as zeros where a chunk is missing."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.storage import MemoryStore, WrapperStore

from gnomon.errors import CorruptArtifact, NotFound
from gnomon_storage.location import Location

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
ZarrArray: TypeAlias = "zarr.Array[Any]"

ALLOWED_DTYPES: Final = frozenset({"uint16", "float32", "int32"})
_BYTES_CODEC: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_OPENING: Final = threading.Lock()
_HAS_ZARRS: Final = importlib.util.find_spec("zarrs") is not None


def float32_from_bfloat16(raw: Array) -> Array:
    """The float32 values of bfloat16 bits held as uint16."""
    out = np.zeros((*raw.shape, 2), dtype="<u2")
    out[..., 1] = raw
    values: Array = out.view("<f4")[..., 0]
    return values


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


def open_array(group: Location, name: str, *, shape: tuple[int, ...], chunk_rows: int, dtype: str) -> ZarrArray:
    """Open an array for reading, once its metadata is seen to be what was committed.

    Raises CorruptArtifact where the metadata is missing, damaged, or asks for another dtype, codec or chunking.
    """
    place = group.child(name)
    try:
        metadata = place.child("zarr.json").read_json()
    except NotFound as error:
        raise CorruptArtifact(f"{place.url} has lost its zarr.json; delete the store and harvest it again") from error
    check_metadata(metadata, place.url, shape=shape, chunk_rows=chunk_rows, dtype=dtype)
    store = group.zarr_store()
    with _pipeline(group):
        return zarr.open_array(store if group.local_path() else _StrictStore(store), path=name, mode="r", zarr_format=3)


def check_metadata(metadata: Any, url: str, *, shape: tuple[int, ...], chunk_rows: int, dtype: str) -> None:
    """Raise CorruptArtifact unless a zarr.json describes exactly the expected plain array."""
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [_BYTES_CODEC],
        "storage_transformers": [],
    }
    if dtype not in ALLOWED_DTYPES:
        raise CorruptArtifact(f"{url} is said to hold {dtype!r}; allowed are {sorted(ALLOWED_DTYPES)}")
    if not isinstance(metadata, dict):
        raise CorruptArtifact(f"{url}/zarr.json is not a JSON object")
    for key, wanted in expected.items():
        got = metadata.get(key, [] if key == "storage_transformers" else None)
        if got != wanted:
            raise CorruptArtifact(
                f"{url}/zarr.json has {key}={json.dumps(got)[:200]}, wanted {json.dumps(wanted)}; "
                "delete the store and harvest it again"
            )


def read_rows(array: ZarrArray, group: Location, name: str, start: int, stop: int) -> Array:
    """Rows [start, stop) as they are stored; raises CorruptArtifact where a chunk is missing or cut short."""
    if not 0 <= start <= stop <= array.shape[0]:
        raise IndexError(f"rows [{start}, {stop}) of {name!r}, which has {array.shape[0]}")
    if start == stop:
        return np.empty((0, *array.shape[1:]), dtype=array.dtype)
    root = group.local_path()
    if root is not None:
        # Zarr, and zarrs with it, reads a missing chunk as zeros.
        n_bytes = int(np.prod(array.chunks)) * array.dtype.itemsize
        for chunk in range(start // array.chunks[0], -(-stop // array.chunks[0])):
            path = root / name / chunk_key(chunk, len(array.shape))
            if not path.is_file() or path.stat().st_size != n_bytes:
                raise CorruptArtifact(
                    f"{path} is missing or not {n_bytes} bytes long; delete the store and harvest it again"
                )
    try:
        return np.asarray(array[start:stop])
    except ValueError as error:
        raise CorruptArtifact(f"a chunk of {group.url}/{name} cannot be decoded ({error})") from error


def chunk_key(chunk: int, n_dims: int) -> str:
    """Path of a chunk inside its array; arrays are chunked along rows only."""
    return "/".join(["c", str(chunk), *["0"] * (n_dims - 1)])


@contextmanager
def _pipeline(group: Location) -> Iterator[None]:
    """Use zarrs for local files where it is installed; object stores go through zarr's own pipeline."""
    # An array takes the pipeline that is configured when it is opened, and the configuration is the whole process's.
    with _OPENING:
        if not _HAS_ZARRS or group.local_path() is None:
            yield
            return
        import zarrs  # noqa: F401 - registers the pipeline

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
            yield


class _StrictStore(WrapperStore[Store]):
    """A store in which a missing chunk is an error and not zeros."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if value is None and "/c/" in key:
            raise CorruptArtifact(f"chunk {key!r} is missing; delete the store and harvest it again")
        return value
