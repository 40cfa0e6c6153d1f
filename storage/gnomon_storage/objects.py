"""Object stores, through obstore's fsspec interface. Endpoint and credentials come from the environment only."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Final, TypeVar, cast

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.fsspec import FsspecStore
from obstore.store import from_url

from gnomon.errors import NotFound, StoreUnavailable
from gnomon_storage.backends import Backend

OBJECT_STORES: Final = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
}
"""Schemes, of those that obstore knows, and the environment variables that obstore takes the access to each from."""
_WRITE_ID: Final = "gnomon-write-id"
REPEAT_S: Final = 20.0
"""For so long a call is made again that broke off; where the store is away the client itself tries for longer."""
FIRST_PAUSE_S: Final = 0.1
T = TypeVar("T")


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
        # FsspecStore ignores mode="create" and overwrites; this is the conditional put. A request whose answer was
        # lost is repeated, and then meets its own object: the id tells it from another writer's.
        write_id = uuid.uuid4().hex

        def put() -> bool:
            try:
                obstore.put(self._store, self._key(path), data, mode="create", attributes={_WRITE_ID: write_id})
            except AlreadyExistsError:
                return obstore.get(self._store, self._key(path)).attributes.get(_WRITE_ID) == write_id
            return True

        return self._call(path, put)

    def is_file(self, path: str) -> bool:
        # FsspecStore calls every failure an absence; and some servers answer for the bucket as if it were a file.
        if path == self._bucket:
            return False
        try:
            self._call(path, lambda: obstore.head(self._store, self._key(path)))
        except NotFound:
            return False
        return True

    def exists(self, path: str) -> bool:
        # FsspecStore believes a server that goes on naming a folder whose last file is gone.
        if self.is_file(path):
            return True
        pages = partial(obstore.list, self._store, self._key(path), chunk_size=1)
        return self._call(path, lambda: any(page for page in pages()))

    def walk(self, path: str) -> dict[str, int]:
        # FsspecStore lists one folder at a time, and every chunk of an array has a folder of its own.
        folder = self._key(path + "/")
        pages = partial(obstore.list, self._store, folder, chunk_size=1000)
        items = self._call(path, lambda: [item for page in pages() for item in page])
        sizes = {item["path"].removeprefix(folder): int(item["size"]) for item in items}
        return dict(sorted(sizes.items()))

    def delete(self, path: str) -> None:
        # FsspecStore takes * and ? in keys for patterns, and deletes one key per request.
        keys = [self._key(f"{path}/{name}") for name in self.walk(path)]
        if self.is_file(path):
            keys.append(self._key(path))
        if keys:
            self._call(path, lambda: obstore.delete(self._store, keys))

    def _call(self, path: str, call: Callable[[], T]) -> T:
        # The client repeats what the store refused, and what it knows to change nothing. A list, a deletion, a
        # conditional put or a part of a large object whose answer breaks off it leaves to us: all that are called here
        # may be made again.
        began, pause_s = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return super()._call(path, call)
            except StoreUnavailable as error:
                if not _broke_off(error) or time.monotonic() - began > REPEAT_S:
                    raise
            time.sleep(pause_s)
            pause_s *= 2

    def _key(self, path: str) -> str:
        return path.removeprefix(self._bucket).removeprefix("/")


def _broke_off(error: StoreUnavailable) -> bool:
    """Whether a call broke off: there was no whole answer, or one about an upload that an answer before had ended.

    In the words of the client, whose errors have no other mark.
    """
    return any(words in str(error.__cause__) for words in ("HTTP error", "NoSuchUpload"))


def _options() -> dict[str, Any]:
    return {
        "client_options": {
            "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"),
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=60),
        },
        "retry_config": {"max_retries": 8, "retry_timeout": timedelta(seconds=90)},
    }
