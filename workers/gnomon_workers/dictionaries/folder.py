"""A dictionary's folder: the files of SAELens, and a manifest that publishes them.

dictionaries/<id>/attempt-0002/
  cfg.json  sae_weights.safetensors  sparsity.safetensors  runner_cfg.json
  gnomon.json      manifest with digests and the record, written last: the folder is published iff it exists
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from gnomon.errors import NotFound
from gnomon_storage.digests import fast_digest
from gnomon_storage.location import Location

MANIFEST: Final = "gnomon.json"
FORMAT: Final = "gnomon-dictionary-1"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_ATTEMPT: Final = re.compile(r"^attempt-\d{4}$")


def published(dictionary: Location) -> dict[str, Any] | None:
    """The record of a dictionary that some attempt published, or None."""
    for name in filter(_ATTEMPT.match, dictionary.list()):
        manifest = dictionary.child(name, MANIFEST)
        if manifest.exists():
            record: dict[str, Any] = manifest.read_json()["record"]
            return record
    return None


def is_published(folder: Location) -> bool:
    """Whether an attempt's folder is a published dictionary."""
    return folder.child(MANIFEST).is_file()


def unpublished(dictionary: Location) -> list[Location]:
    """What attempts left that did not come to publish a dictionary, if none is at work any more."""
    attempts = [dictionary.child(name) for name in filter(_ATTEMPT.match, dictionary.list())]
    return [attempt for attempt in attempts if not is_published(attempt)]


def published_digests(folder: Location) -> dict[str, str]:
    """BLAKE2b-256 of the files of a published folder, hexadecimal, by name; empty where its manifest says nothing."""
    try:
        manifest = folder.child(MANIFEST).read_json()
    except NotFound:
        return {}
    found = manifest.get("blake2b") if isinstance(manifest, dict) else None
    known = found.items() if isinstance(found, dict) else ()
    return {str(name): digest for name, digest in known if isinstance(digest, str) and _DIGEST.fullmatch(digest)}


def publish(
    folder: Location, local: Path, record: Mapping[str, Any], *, uploaded: Collection[str] = ()
) -> dict[str, Any]:
    """Upload a local folder, then its manifest; returns the record with location and files added.

    What is named as uploaded was uploaded before, and stays what it is.
    """
    files = {file.name: file for file in sorted(local.iterdir())}
    for name in sorted(set(files) - set(uploaded)):
        folder.child(name).upload(files[name])
    whole = {
        **record,
        "location": folder.url,
        "files": {name: file.stat().st_size for name, file in files.items()},
    }
    digests = {}
    for name, file in files.items():
        with file.open("rb") as stream:
            digests[name] = fast_digest(stream)
    folder.child(MANIFEST).write_json({"format": FORMAT, "record": whole, "blake2b": digests})
    return whole
