"""One object owns the mesh: which rank is where, and the process group of each axis."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

Axis = Literal["dp", "features", "world"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMesh:
    """dp * features ranks; rank r is replica r // features and shard r % features.

    An axis of size 1 needs no process group: its collectives return their input, so a single process runs the
    same code without torch.distributed.
    """

    dp: int = 1
    features: int = 1
    rank: int = 0
    groups: dict[Axis, dist.ProcessGroup]

    @classmethod
    def single(cls) -> Self:
        """The mesh of one process."""
        return cls(groups={})

    @classmethod
    def create(cls, *, dp: int, features: int, timeout_s: float) -> Self:
        """The mesh of an initialised process group; every rank must call this, with the same arguments."""
        world = dist.get_world_size()
        if world != dp * features:
            raise ValueError(f"a {dp} x {features} mesh needs {dp * features} ranks, the process group has {world}")
        rank = dist.get_rank()
        groups: dict[Axis, dist.ProcessGroup] = {"world": dist.group.WORLD} if dist.group.WORLD else {}
        timeout = timedelta(seconds=timeout_s)
        # new_group is collective: every rank makes every group, and keeps its own.
        rows = [[r * features + s for s in range(features)] for r in range(dp)]
        columns = [[r * features + s for r in range(dp)] for s in range(features)]
        lists: tuple[tuple[Axis, list[list[int]]], ...] = (("features", rows), ("dp", columns))
        for axis, members in lists:
            for ranks in members:
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    groups[axis] = group
        return cls(dp=dp, features=features, rank=rank, groups=groups)

    @property
    def replica(self) -> int:
        """Coordinate on the dp axis."""
        return self.rank // self.features

    @property
    def shard(self) -> int:
        """Coordinate on the features axis."""
        return self.rank % self.features

    def size(self, axis: Axis) -> int:
        """Ranks along an axis."""
        return {"dp": self.dp, "features": self.features, "world": self.dp * self.features}[axis]

    def feature_range(self, d_sae: int) -> tuple[int, int]:
        """Features [start, stop) of this rank's shard."""
        n_local = d_sae // self.features
        return self.shard * n_local, (self.shard + 1) * n_local

    def token_range(self, batch_size: int) -> tuple[int, int]:
        """Tokens [start, stop) of the global batch that this rank's replica encodes."""
        n_tokens = batch_size // self.dp
        return self.replica * n_tokens, (self.replica + 1) * n_tokens

    def all_reduce(self, tensor: Tensor, axis: Axis) -> Tensor:
        """Sum over an axis, in place."""
        if self.size(axis) > 1:
            dist.all_reduce(tensor, group=self.groups[axis])
        return tensor

    def all_gather(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """The tensor of every rank along an axis, in rank order; shapes must agree."""
        if self.size(axis) == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size(axis))]
        dist.all_gather(gathered, tensor.contiguous(), group=self.groups[axis])
        return gathered

    def all_gather_ragged(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """As all_gather for tensors of shape (n, ...) whose n differs between ranks."""
        if self.size(axis) == 1:
            return [tensor]
        length = torch.tensor([len(tensor)], device=tensor.device)
        lengths = [int(n) for n in torch.cat(self.all_gather(length, axis)).tolist()]
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        return [part[:n] for part, n in zip(self.all_gather(padded, axis), lengths, strict=True)]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size("world") > 1:
            dist.barrier(group=self.groups["world"])
