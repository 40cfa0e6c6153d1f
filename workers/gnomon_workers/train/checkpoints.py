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

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from gnomon.errors import CorruptArtifact, GnomonError, NotFound
from gnomon_storage.location import Location
from gnomon_workers.failpoints import Failpoint, failpoint
from gnomon_workers.train.optimizer import MATRICES, owned_rows
from gnomon_workers.train.step import TrainStep
from gnomon_workers.train.tensor_file import Rows, TensorReader, pieces

FORMAT = "gnomon-checkpoint-1"
NAME = re.compile(r"^step-(\d{8})\.a(\d{4})$")
_WHOLE = frozenset({"b_dec", "first.b_dec", "second.b_dec"})
"""Tensors that every shard holds whole."""


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
    """A committed checkpoint."""

    step: int
    """Optimizer steps made."""
    attempt: int
    state: dict[str, float]
    """Running numbers of the variant, e.g. BatchTopK's threshold."""
    max_alignment_deviation: float | None
    """None for a transcoder, whose score is undefined."""
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step-{self.step:08d}.a{self.attempt:04d}"

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.n_bytes for shard in self.shards)


def state_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Everything that training continues from, but the running numbers of the variant and the step number."""
    optimizer = step.optimizer
    state = dict(optimizer.params)
    state |= {f"first.{name}": moment for name, moment in optimizer.first.items()}
    state |= {f"second.{name}": moment for name, moment in optimizer.second.items()}
    return state | {"n_tokens_since_fired": step.n_tokens_since_fired}


def file_tensors(step: TrainStep) -> dict[str, Tensor | Rows]:
    """state_tensors as the file of a shard has them: moments that replicas divide are joined while they are written."""
    whole: dict[str, Tensor | Rows] = dict(state_tensors(step))
    if len(step.optimizer.own) < step.parameters.n_local:
        for name in filter(_is_shared, list(whole)):
            whole[name] = _SharedRows(step, name)
    return whole


def _is_shared(name: str) -> bool:
    """Whether replicas may divide a tensor's rows."""
    moment, _, parameter = name.partition(".")
    return moment in ("first", "second") and parameter in MATRICES


class _SharedRows:
    """A moment that replicas hold a part of each: every piece comes from its owner, and all replicas must ask."""

    def __init__(self, step: TrainStep, name: str) -> None:
        self._mesh, self._n_local = step.mesh, step.parameters.n_local
        self._own = state_tensors(step)[name]

    @property
    def shape(self) -> torch.Size:
        """That of the whole."""
        return torch.Size([self._n_local, *self._own.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """That of the part."""
        return self._own.dtype

    def pieces(self) -> Iterator[Tensor]:
        """Collective over replicas."""
        for replica in range(self._mesh.dp):
            n_rows = len(owned_rows(self._n_local, replica, self._mesh.dp))
            is_mine = replica == self._mesh.replica
            part = self._own if is_mine else self._own.new_empty(1, 1).expand(n_rows, self.shape[1])
            for piece in pieces(part):
                buffer = piece if is_mine else torch.empty_like(piece, memory_format=torch.contiguous_format)
                self._mesh.broadcast(buffer, replica)
                yield buffer


def load_checkpoint(folder: Location, checkpoint: Checkpoint, step: TrainStep) -> None:
    """Fill a step with a checkpoint's state; the checkpoint may have any number of shards.

    Raises CorruptArtifact where the checkpoint is of another dictionary.
    """
    start, stop = step.mesh.feature_range(step.plan.d_sae)
    target = state_tensors(step)
    for shard in checkpoint.shards:
        if max(start, shard.start) < min(stop, shard.stop):
            with folder.child(checkpoint.name, shard.file).open_read() as stream:
                source = TensorReader(stream)
                for name, tensor in target.items():
                    _read(source, shard, name, tensor, start + (step.optimizer.own.start if _is_shared(name) else 0))
                    failpoint(Failpoint.LOAD_CHECKPOINT)
    step.optimizer.n_steps.fill_(checkpoint.step)
    step.state = dict(checkpoint.state)
    step.replaced()


def _read(source: TensorReader, shard: Shard, name: str, tensor: Tensor, first: int) -> None:
    """Fill what a shard has of a tensor whose rows are features from `first` on."""
    if name in _WHOLE:
        source.read_rows(name, 0, tensor)
        return
    lo, hi = max(first, shard.start), min(first + len(tensor), shard.stop)
    if lo < hi:
        source.read_rows(name, lo - shard.start, tensor[lo - first : hi - first])


class open_shard:  # noqa: N801 - used as a function
    """A context manager over the tensors of one shard file, downloaded first where it is remote."""

    def __init__(self, place: Location, shard: Shard) -> None:
        self._location = place.child(shard.file)
        self._temp: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Any:
        path = self._location.local_path()
        if path is None:
            self._temp = tempfile.TemporaryDirectory(prefix="gnomon-shard-")
            path = Path(self._temp.name) / "shard.safetensors"
            self._location.download(path)
        self._file = safe_open(path, framework="pt")
        return self._file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)
        if self._temp is not None:
            self._temp.cleanup()


def committed_checkpoints(folder: Location) -> Iterator[Checkpoint]:
    """Checkpoints with a readable manifest, the latest first."""
    found = [(int(m[1]), int(m[2]), m[0]) for m in map(NAME.match, folder.list()) if m]
    for _, _, name in sorted(found, reverse=True):
        try:
            raw = folder.child(name, "manifest.json").read_json()
            if raw.pop("format") == FORMAT:
                raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
                yield Checkpoint(**raw)
        except (NotFound, CorruptArtifact, KeyError, TypeError, AttributeError):
            continue


def latest_checkpoint(folder: Location) -> tuple[Checkpoint | None, list[str]]:
    """The last whole checkpoint, every byte checked, and what was found damaged on the way to it."""
    found, damaged = latest_common([folder])
    return (found[0] if found else None), damaged


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
    except GnomonError as error:
        damaged.append(error.message)
        return False
    return True


def _verify(location: Location, shard: Shard) -> None:
    with location.open_read() as stream:
        if digest_of(stream) != shard.digest:
            raise CorruptArtifact(f"{location.url} is not what was committed (wanted digest {shard.digest[:16]}...)")


def digest_of(stream: BinaryIO) -> str:
    """BLAKE2b-256 of the rest of a stream, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()
