"""Checkpoints: one safetensors file for each feature shard, and a manifest with digests, written last.

    checkpoints/<job>/step-00000500.a0002/
      shard-0000-of-0002.safetensors ...     written by replica 0 of each shard
      receipt-0000-of-0002.r0001.json ...    what each rank saw of its shard
      manifest.json                          written last: without it the checkpoint does not exist

Rows are features in global order, so any other number of shards reads slices. A checkpoint whose digests do not match
is passed over for the one before. The attempt is part of the name, so a stale attempt can overwrite nothing.
`saving.py` writes what is read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from safetensors import safe_open

from gnomon.errors import CorruptArtifact, NotFound
from gnomon_storage.digests import fast_digest
from gnomon_storage.location import Location
from gnomon_workers.runtime.scratch import scratch_folder

FORMAT = "gnomon-checkpoint-1"
T = TypeVar("T")
NAME = re.compile(r"^step-(\d{8})\.a(\d{4})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a checkpoint: features [start, stop)."""

    file: str
    start: int
    stop: int
    n_bytes: int
    digest: str
    """BLAKE2b-256 of the file, hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint: which step of which attempt, and the files that hold it."""

    step: int
    """Optimizer steps made."""
    attempt: int
    state: dict[str, float]
    """Running numbers of the variant, e.g. BatchTopK's threshold."""
    max_alignment_deviation: float | None
    """None for a transcoder, whose score is undefined."""
    shards: tuple[Shard, ...]
    dp: int = 0
    """Replicas of the mesh that it was made on; 0 where an earlier release did not note it."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step-{self.step:08d}.a{self.attempt:04d}"

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.n_bytes for shard in self.shards)


@contextmanager
def open_shard(place: Location, shard: Shard) -> Iterator[Any]:
    """The tensors of one shard file, downloaded first where it is remote."""
    location = place.child(shard.file)
    with ExitStack() as stack:
        path = location.local_path()
        if path is None:
            path = stack.enter_context(scratch_folder()) / "shard.safetensors"
            location.download(path)
        yield stack.enter_context(safe_open(path, framework="pt"))


def committed_checkpoints(folder: Location) -> Iterator[Checkpoint]:
    """Checkpoints with a readable manifest, the latest first."""
    found = [(int(m[1]), int(m[2]), m[0]) for m in map(NAME.match, folder.list()) if m]
    for _, _, name in sorted(found, reverse=True):
        try:
            raw = folder.child(name, "manifest.json").read_json()
            if raw["format"] == FORMAT:
                yield _known(Checkpoint, {**raw, "shards": tuple(_known(Shard, shard) for shard in raw["shards"])})
        except (NotFound, CorruptArtifact, KeyError, TypeError, AttributeError):
            continue


def _known(cls: Callable[..., T], raw: Mapping[str, Any]) -> T:
    """What a manifest of any release says, as far as this one knows its fields."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in raw.items() if name in names})


def remove_unfinished(folder: Location, attempt: int) -> None:
    """Delete what an earlier run of this very attempt left of a checkpoint that it could not commit.

    The run's ranks are gone; a receipt of theirs would be taken for another gang's.
    """
    whole = {checkpoint.name for checkpoint in committed_checkpoints(folder)}
    for match in filter(None, map(NAME.match, folder.list())):
        if int(match[2]) == attempt and match[0] not in whole:
            folder.child(match[0]).delete()


def latest_common(folders: Sequence[Location]) -> tuple[tuple[Checkpoint, ...] | None, list[str]]:
    """Whole checkpoints of one step, of each folder one: of the last step of which all folders have one.

    Dictionaries that are trained together were last saved at the same step, unless the gang was lost in between.
    """
    damaged: list[str] = []
    by_step = [_by_step(folder) for folder in folders]
    for step in sorted(set.intersection(*map(set, by_step)), reverse=True):
        found: list[Checkpoint] = []
        for folder, checkpoints in zip(folders, by_step, strict=True):
            whole = next((c for c in checkpoints[step] if _is_whole(folder, c, damaged)), None)
            if whole is None:
                break
            found.append(whole)
        else:
            return tuple(found), damaged
    return None, damaged


def _by_step(folder: Location) -> dict[int, list[Checkpoint]]:
    """Committed checkpoints by step, those of the latest attempt first."""
    by_step: dict[int, list[Checkpoint]] = {}
    for checkpoint in committed_checkpoints(folder):
        by_step.setdefault(checkpoint.step, []).append(checkpoint)
    return by_step


def _is_whole(folder: Location, checkpoint: Checkpoint, damaged: list[str]) -> bool:
    """Whether every byte is what was committed; if not, what is wrong is added to `damaged`."""
    try:
        for shard in checkpoint.shards:
            _verify(folder.child(checkpoint.name, shard.file), shard)
    except (CorruptArtifact, NotFound) as error:  # a store that is away says nothing of what it holds
        damaged.append(error.message)
        return False
    return True


def _verify(location: Location, shard: Shard) -> None:
    with location.open_read() as stream:
        if fast_digest(stream) != shard.digest:
            raise CorruptArtifact(f"{location.url} is not what was committed (wanted digest {shard.digest[:16]}...)")
