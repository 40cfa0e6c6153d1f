"""One object owns the mesh: which rank is where, and the process group of each axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from gnomon_workers.parallel.clock import StepClock

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
    clock: StepClock = field(default_factory=StepClock, compare=False)
    sent_bytes: Counter[Axis] = field(default_factory=Counter, compare=False)
    """What this rank has handed to collectives, by axis."""

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
            self._count(tensor, axis)
            with self.clock.section("communication"):
                dist.all_reduce(tensor, group=self.groups[axis])
        return tensor

    def all_gather(self, tensor: Tensor, axis: Axis) -> list[Tensor]:
        """The tensor of every rank along an axis, in rank order; shapes must agree."""
        return self.start_all_gather(tensor, axis)()

    def start_all_gather(self, tensor: Tensor, axis: Axis) -> Callable[[], list[Tensor]]:
        """Begin an all_gather, and return what waits for it and gives its result; the tensor must not change before."""
        if self.size(axis) == 1:
            return lambda: [tensor]
        self._count(tensor, axis)
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size(axis))]
        work = dist.all_gather(gathered, tensor, group=self.groups[axis], async_op=True)

        def finish() -> list[Tensor]:
            with self.clock.section("communication"):
                work.wait()
            return gathered

        return finish

    def _count(self, tensor: Tensor, axis: Axis) -> None:
        self.sent_bytes[axis] += tensor.numel() * tensor.element_size()

    def all_gather_ragged(self, tensors: Sequence[Tensor], axis: Axis) -> list[list[Tensor]]:
        """As all_gather, for each of several tensors (n, ...) of the same n, which may differ between ranks."""
        if self.size(axis) == 1:
            return [[tensor] for tensor in tensors]
        n = len(tensors[0])
        count = torch.tensor([n], device=tensors[0].device)
        lengths: list[int] = torch.cat(self.all_gather(count, axis)).tolist()
        gathered: list[list[Tensor]] = []
        for tensor in tensors:
            padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
            padded[:n] = tensor
            gathered.append([part[:m] for part, m in zip(self.all_gather(padded, axis), lengths, strict=True)])
        return gathered

    def broadcast(self, tensor: Tensor, replica: int) -> None:
        """Overwrite the tensor with that of one replica of this shard."""
        if self.dp > 1:
            if replica == self.replica:
                self._count(tensor, "dp")
            with self.clock.section("communication"):
                dist.broadcast(tensor, src=replica * self.features + self.shard, group=self.groups["dp"])

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size("world") > 1:
            dist.barrier(group=self.groups["world"])
