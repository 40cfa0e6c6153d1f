"""A step's state as a checkpoint has it: which tensors, and how they get into a step again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint, Shard
from gnomon_workers.checkpoints.tensor_file import PiecewiseTensor, TensorReader, pieces
from gnomon_workers.runtime.failpoints import Failpoint, failpoint
from gnomon_workers.sae.optimizer import MATRICES, owned_rows
from gnomon_workers.train.step import TrainStep

_WHOLE = frozenset({"b_dec", "first.b_dec", "second.b_dec"})
"""Tensors that every shard holds whole."""


def state_tensors(step: TrainStep) -> dict[str, Tensor]:
    """Everything that training continues from, but the running numbers of the variant and the step number."""
    optimizer = step.optimizer
    state = dict(optimizer.params)
    state |= {f"first.{name}": moment for name, moment in optimizer.first.items()}
    state |= {f"second.{name}": moment for name, moment in optimizer.second.items()}
    return state | {"n_tokens_since_fired": step.n_tokens_since_fired}


def file_tensors(step: TrainStep) -> dict[str, Tensor | PiecewiseTensor]:
    """state_tensors as the file of a shard has them: moments that replicas divide are joined while they are written."""
    whole: dict[str, Tensor | PiecewiseTensor] = dict(state_tensors(step))
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
        """Shape of the whole moment, of all replicas' parts."""
        return torch.Size([self._n_local, *self._own.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the moment, that of this replica's part."""
        return self._own.dtype

    def pieces(self) -> Iterator[Tensor]:
        """The moment's rows in order, piece by piece; collective over replicas, which all must ask alike."""
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
