"""Checkpoints: one safetensors file for each feature shard, and a manifest with digests, written last.

    checkpoints/<job>/step-00000500.a0002/shard-0000-of-0002.safetensors ... manifest.json

Rows are features in global order, so any other number of shards reads slices. A checkpoint without a manifest does
not exist; one whose digests do not match is passed over for the one before. The attempt is part of the name, so a
stale attempt can overwrite nothing.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gnomon.errors import CorruptArtifact, GnomonError, NotFound
from gnomon_storage.location import Location
from gnomon_workers.train.metrics import max_alignment_deviation
from gnomon_workers.train.step import TrainStep

FORMAT = "gnomon-checkpoint-1"
N_KEPT = 2
"""Checkpoints kept: the last, and the one before it in case the last is found damaged."""
_NAME = re.compile(r"^step-(\d{8})\.a(\d{4})$")
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
    threshold: float
    max_alignment_deviation: float
    shards: tuple[Shard, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"step-{self.step:08d}.a{self.attempt:04d}"


def state_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Everything that training continues from, but the threshold and the step number."""
    optimizer = step.optimizer
    state = dict(optimizer.params)
    state |= {f"first.{name}": moment for name, moment in optimizer.first.items()}
    state |= {f"second.{name}": moment for name, moment in optimizer.second.items()}
    return state | {"n_tokens_since_fired": step.n_tokens_since_fired}


def save_checkpoint(folder: Location, step: TrainStep, *, number: int, attempt: int) -> Checkpoint:
    """Write the state after `number` steps; collective. Replica 0 writes, the others compare.

    Raises CorruptArtifact where a replica's state differs from replica 0's.
    """
    mesh = step.mesh
    place = folder.child(f"step-{number:08d}.a{attempt:04d}")
    file = f"shard-{mesh.shard:04d}-of-{mesh.features:04d}.safetensors"
    with tempfile.TemporaryDirectory(prefix="gnomon-checkpoint-") as temp:
        local = Path(temp) / file
        save_file({name: tensor.contiguous() for name, tensor in state_tensors(step).items()}, local)
        with local.open("rb") as stream:
            digest = _digest(stream)
        _check_replicas(step, digest)
        if mesh.replica == 0:
            place.child(file).upload(local)
        n_bytes = local.stat().st_size
    # This gather is also the barrier: it returns once every shard is written.
    digests = [bytes(d.tolist()) for d in mesh.all_gather(_as_tensor(digest), "features")]
    sizes = mesh.all_gather(torch.tensor([n_bytes]), "features")
    n_local = step.parameters.n_local
    shards = tuple(
        Shard(
            file=f"shard-{i:04d}-of-{mesh.features:04d}.safetensors",
            start=i * n_local,
            stop=(i + 1) * n_local,
            n_bytes=int(size),
            digest=d.hex(),
        )
        for i, (d, size) in enumerate(zip(digests, sizes, strict=True))
    )
    checkpoint = Checkpoint(
        step=number,
        attempt=attempt,
        threshold=step.threshold,
        max_alignment_deviation=max_alignment_deviation(step),
        shards=shards,
    )
    if mesh.rank == 0:
        place.child("manifest.json").write_json({"format": FORMAT, **asdict(checkpoint)})
        _delete_older(folder, keep=N_KEPT)
    mesh.barrier()
    return checkpoint


def load_checkpoint(folder: Location, checkpoint: Checkpoint, step: TrainStep) -> None:
    """Fill a step with a checkpoint's state; the checkpoint may have any number of shards."""
    start, stop = step.mesh.feature_range(step.plan.d_sae)
    target = state_tensors(step)
    for shard in checkpoint.shards:
        lo, hi = max(start, shard.start), min(stop, shard.stop)
        if lo < hi:
            with open_shard(folder.child(checkpoint.name), shard) as tensors:
                for name, tensor in target.items():
                    part = tensors.get_slice(name)
                    if name in _WHOLE:
                        tensor.copy_(part[:])
                    else:
                        tensor[lo - start : hi - start] = part[lo - shard.start : hi - shard.start]
    for counter in step.optimizer.steps.values():
        counter.fill_(checkpoint.step)
    step.threshold = checkpoint.threshold


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
    found = [(int(m[1]), int(m[2]), m[0]) for m in map(_NAME.match, folder.list()) if m]
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
    damaged: list[str] = []
    for checkpoint in committed_checkpoints(folder):
        try:
            for shard in checkpoint.shards:
                _verify(folder.child(checkpoint.name, shard.file), shard)
        except GnomonError as error:
            damaged.append(error.message)
            continue
        return checkpoint, damaged
    return None, damaged


def _verify(location: Location, shard: Shard) -> None:
    with location.open_read() as stream:
        if _digest(stream).hex() != shard.digest:
            raise CorruptArtifact(f"{location.url} is not what was committed (wanted digest {shard.digest[:16]}...)")


def _delete_older(folder: Location, *, keep: int) -> None:
    """Delete all but the last committed checkpoints; what was never committed stays until a later one is."""
    names = [checkpoint.name for checkpoint in committed_checkpoints(folder)]
    if len(names) > keep:
        for name in (n for n in folder.list() if _NAME.match(n) and n < names[keep - 1]):
            folder.child(name).delete()


def _check_replicas(step: TrainStep, digest: bytes) -> None:
    digests = step.mesh.all_gather(_as_tensor(digest), "dp")
    differ = [i for i, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if differ:
        raise CorruptArtifact(
            f"replicas {differ} of shard {step.mesh.shard} differ from replica 0: a device computes wrongly, or "
            "memory is damaged; the last checkpoint is intact"
        )


def _digest(stream: BinaryIO) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    while block := stream.read(1 << 22):
        digest.update(block)
    return digest.digest()


def _as_tensor(digest: bytes) -> Tensor:
    return torch.tensor(list(digest), dtype=torch.uint8)
