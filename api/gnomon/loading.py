"""`gnomon.load`: a dictionary from a folder, or by id from the service through a cache on this machine."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gnomon.client import Client
from gnomon.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from gnomon.dictionary import Dictionary

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
            f"loading a dictionary needs torch and safetensors ({error}): pip install 'gnomon[torch]'",
            code="missing_extra",
        ) from error
    if isinstance(path_or_id, str) and _ID.fullmatch(path_or_id):
        path_or_id = fetch(path_or_id, client)
    return load_folder(path_or_id, device=device, dtype=dtype)


def fetch(dictionary_id: str, client: Client | None = None) -> Path:
    """Folder of a dictionary in the cache, downloaded if it is not there; whole or absent, never partial."""
    folder = cache_folder() / dictionary_id
    if folder.is_dir():
        return folder
    if client is None:
        with Client() as own:
            return fetch(dictionary_id, own)
    part = folder.with_name(f".{dictionary_id}.{secrets.token_hex(4)}.part")
    try:
        client.dictionary(dictionary_id).download(part)
        try:
            part.rename(folder)
        except OSError:  # another process has put the same dictionary there meanwhile
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """Where downloaded dictionaries are kept: below $GNOMON_CACHE, or ~/.cache/gnomon."""
    return Path(os.environ.get("GNOMON_CACHE") or Path.home() / ".cache/gnomon") / "dictionaries"
