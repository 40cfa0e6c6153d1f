"""Object stores, through obstore's fsspec interface. Endpoint and credentials come from the environment only."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from urllib.parse import quote

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.fsspec import FsspecStore
from obstore.store import from_url

from gnomon.errors import NotFound
from gnomon_storage.backends import Backend

if TYPE_CHECKING:
    from zarr.abc.store import Store

OBJECT_STORES: Final = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
}
"""Schemes, of those that obstore knows, and the environment variables that obstore takes the access to each from."""
_WRITE_ID: Final = "gnomon-write-id"


class ObjectBackend(Backend):
    """One bucket; what obstore's fsspec interface lacks or does too slowly goes to an obstore client, set up alike."""

    stream_bytes: ClassVar[int] = 4 << 20

    def __init__(self, scheme: str, bucket: str) -> None:
        # Its signatures know the schemes only one by one. fsspec would give out one instance for ever, with the
        # endpoint and keys of its first day, whatever the environment has become since.
        file_system = cast("Any", FsspecStore)(scheme, skip_instance_cache=True, **_options())
        super().__init__(file_system, OBJECT_STORES[scheme])
        self._url = f"{scheme}://{bucket}"
        self._bucket = bucket
        self._store = from_url(self._url, **_options())

    def create(self, path: str, data: bytes) -> bool:
        # FsspecStore ignores mode="create" and overwrites; this is the conditional put. The client repeats a request
        # whose answer was lost, and then meets its own object: the id tells it from another writer's.
        write_id = uuid.uuid4().hex
        with self._mapped(path):
            try:
                obstore.put(self._store, self._key(path), data, mode="create", attributes={_WRITE_ID: write_id})
            except AlreadyExistsError:
                return obstore.get(self._store, self._key(path)).attributes.get(_WRITE_ID) == write_id
        return True

    def is_file(self, path: str) -> bool:
        # FsspecStore calls every failure an absence; and some servers answer for the bucket as if it were a file.
        if path == self._bucket:
            return False
        try:
            with self._mapped(path):
                obstore.head(self._store, self._key(path))
        except NotFound:
            return False
        return True

    def exists(self, path: str) -> bool:
        # FsspecStore believes a server that goes on naming a folder whose last file is gone.
        if self.is_file(path):
            return True
        with self._mapped(path):
            return any(page for page in obstore.list(self._store, self._key(path), chunk_size=1))

    def walk(self, path: str) -> dict[str, int]:
        # FsspecStore lists one folder at a time, and every chunk of an array has a folder of its own.
        folder = self._key(path + "/")
        with self._mapped(path):
            items = [item for page in obstore.list(self._store, folder, chunk_size=1000) for item in page]
        sizes = {item["path"].removeprefix(folder): int(item["size"]) for item in items}
        return dict(sorted(sizes.items()))

    def delete(self, path: str) -> None:
        # FsspecStore takes * and ? in keys for patterns, and deletes one key per request.
        keys = [self._key(f"{path}/{name}") for name in self.walk(path)]
        if self.is_file(path):
            keys.append(self._key(path))
        if keys:
            with self._mapped(path):
                obstore.delete(self._store, keys)

    def zarr_store(self, path: str) -> Store:
        # Zarr asks for ranges without an end, which FsspecStore does not have.
        from zarr.storage import ObjectStore

        store = from_url(f"{self._url}/{quote(self._key(path))}", **_options())
        return ObjectStore(store)

    def _key(self, path: str) -> str:
        return path.removeprefix(self._bucket).removeprefix("/")


def _options() -> dict[str, Any]:
    return {
        "client_options": {
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"),
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=60),
        },
        "retry_config": {"max_retries": 8, "retry_timeout": timedelta(seconds=90)},
    }
