"""The storage root: made where it is a folder, and asked whether bytes can be put there."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from typing import Final

from gnomon.errors import GnomonError, StoreUnavailable
from gnomon_service.settings import MIB, Settings
from gnomon_storage.location import Location

LEAST_FREE_BYTES: Final = 64 * MIB
"""With less, the next write of a job or of the database fails."""


def make_storage_root(settings: Settings) -> None:
    """Create the folder of a local storage root; other roots exist or are reported by /readyz."""
    local = Location.open(settings.storage_root).local_path()
    if local is not None:
        local.mkdir(parents=True, exist_ok=True)


def check_storage_root(settings: Settings) -> None:
    """Raise StoreUnavailable where the root does not answer, or may not be written to."""
    local = Location.open(settings.storage_root).local_path()
    if local is None:
        Location.open(settings.project_root).exists()
    elif not (local.is_dir() and os.access(local, os.W_OK)):
        raise StoreUnavailable(f"the storage root {local} is not a folder that can be written to")


def is_full(settings: Settings) -> bool:
    """Whether a local storage root has no room left; object stores do not say.

    A service starts and answers all the same: deleting what is not needed takes a service.
    """
    try:
        Location.open(settings.storage_root).check_room(LEAST_FREE_BYTES)
    except StoreUnavailable:
        return True
    return False


def check_within(settings: Settings, most_s: float) -> None:
    """`check_storage_root`, which also raises StoreUnavailable where there is no answer in so many seconds."""
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            check_storage_root(settings)
        except GnomonError as error:
            answer.set_exception(error)
        else:
            answer.set_result(None)

    # a thread that ends with the process: it may wait much longer than anyone wants to know
    threading.Thread(target=ask, name="storage-root", daemon=True).start()
    try:
        answer.result(most_s)
    except NotInTime:
        raise StoreUnavailable(
            f"the storage root {settings.storage_root} has not answered for {most_s:g} s; check GNOMON_STORAGE_ROOT, "
            "the address (AWS_ENDPOINT_URL) and the keys (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        ) from None
