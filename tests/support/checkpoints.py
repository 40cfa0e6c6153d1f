"""The checkpoint that a training of one dictionary would go on from."""

from __future__ import annotations

from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint, latest_common


def latest_whole(folder: Location) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint, every byte checked, and what was found damaged on the way to it."""
    found, damaged = latest_common([folder])
    return (found[0] if found else None), damaged
