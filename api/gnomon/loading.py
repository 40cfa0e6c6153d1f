"""`gnomon.load`: a dictionary from a folder, or by id from the service through a cache on this machine."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gnomon.claims import claim, make_claimed, release
from gnomon.client import Client
from gnomon.errors import GnomonError, InvalidRequest, Unavailable, how_to_install

if TYPE_CHECKING:
    import torch

    from gnomon.dictionary import Dictionary

_ABANDONED_S: Final = 7 * 24 * 3600.0
_ID = re.compile(r"dict_[0-9a-z]{26}")


def load(
    path_or_id: str | Path,
    *,
    client: Client | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Dictionary:
    """Load a dictionary from a folder in SAELens layout, or by its id from the service.

    What was loaded by id once is read from ~/.cache/gnomon afterwards, without asking the service.
    Without `client`, one is made as `Client()` does. `dtype=None` keeps the type the weights are stored in.
    Raises InvalidRequest where torch is missing, NotFound where there is no such dictionary, CorruptArtifact
    where its files are not what they should be.
    """
    try:
        from gnomon.dictionary import load_folder
    except ImportError as error:
        raise InvalidRequest(
            f"loading a dictionary needs torch and safetensors ({error}): {how_to_install('torch')}",
            code="missing_extra",
        ) from error
    if isinstance(path_or_id, str) and _ID.fullmatch(path_or_id):
        path_or_id = fetch(path_or_id, client)
    return load_folder(path_or_id, device=device, dtype=dtype)


def fetch(dictionary_id: str, client: Client | None = None) -> Path:
    """Folder of a dictionary in the cache, downloaded if it is not there; whole or absent, never partial.

    Of several processes that ask at once, one downloads. What one that was cut off had received is gone on with.
    """
    folder = cache_folder() / dictionary_id
    if folder.is_dir():
        return folder
    if client is None:
        with Client() as own:
            return fetch(dictionary_id, own)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    part, held = _own_part(folder)
    try:
        if not folder.is_dir():
            client.dictionary(dictionary_id).download(part)
            part.rename(folder)
    except (GnomonError, OSError) as error:
        if held is None or not isinstance(error, Unavailable):  # else what has arrived is of use the next time
            shutil.rmtree(part, ignore_errors=True)
        if not folder.is_dir():
            raise
    else:
        shutil.rmtree(part, ignore_errors=True)
    finally:
        release(held)
    return folder


def _own_part(folder: Path) -> tuple[Path, int | None]:
    """Where a folder is filled before it has its name, and the descriptor that holds that place for this process."""
    part = folder.with_name(f".{folder.name}.part")

    def make() -> Path:
        part.mkdir(exist_ok=True)
        return part

    _, held = make_claimed(make)
    if held is None:  # nothing can be held in this file system: nobody else may write there
        part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    return part, held


def _remove_abandoned(cache: Path) -> None:
    """Remove what was begun long ago by processes that are gone."""
    for part in cache.glob(".dict_*.part"):
        held = claim(part)
        if held is None:
            continue
        if time.time() - max(path.stat().st_mtime for path in (part, *part.iterdir())) > _ABANDONED_S:
            shutil.rmtree(part, ignore_errors=True)
        release(held)


def cache_folder() -> Path:
    """Where downloaded dictionaries are kept: below $GNOMON_CACHE, or ~/.cache/gnomon."""
    return Path(os.environ.get("GNOMON_CACHE") or Path.home() / ".cache/gnomon") / "dictionaries"
