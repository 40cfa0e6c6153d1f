"""Devices of nodes, free or held, and where on them the members of a gang go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    n_devices: int
    """Whole GPUs, or cores where the cluster has no GPU: what a member of a gang takes one of."""
    is_drained: bool = False
    """Nothing is to be started on it."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What a gang asks for: groups of members, each group on one node.

    Shards of one replica exchange their parts of every token, replicas much less: a group is a replica's shards, and
    only replicas may be on different machines.
    """

    n_groups: int
    group_size: int = 1

    @property
    def n_devices(self) -> int:
        """Devices of all groups."""
        return self.n_groups * self.group_size


@dataclass(slots=True)
class FreeDevices:
    """Devices by node that somebody may take."""

    _n_free: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> Self:
        """All devices of nodes on which may be started."""
        return cls(Counter({node.id: node.n_devices for node in nodes if not node.is_drained}))

    def copy(self) -> FreeDevices:
        """The same devices, counted apart from now on."""
        return FreeDevices(self._n_free.copy())

    @property
    def n_devices(self) -> int:
        """Devices that are here."""
        return sum(max(0, n) for n in self._n_free.values())

    def take(self, places: Iterable[str]) -> None:
        """Have one device less for each node named; nodes that are not here, gone or drained, have none to take."""
        for node, n in Counter(places).items():
            if node in self._n_free:
                self._n_free[node] -= n

    def give(self, places: Iterable[str]) -> None:
        """Have one device more for each node named; none on nodes that are not here."""
        for node, n in Counter(places).items():
            if node in self._n_free:
                self._n_free[node] += n

    def at_most(self, other: FreeDevices) -> FreeDevices:
        """Devices that are here and there."""
        return FreeDevices(Counter({node: min(n, other._n_free[node]) for node, n in self._n_free.items()}))

    def place(self, shape: Shape) -> tuple[str, ...] | None:
        """A node for each member, the members of a group next to each other; None where there is no room.

        The fewest nodes, and of single ones the fullest, so that large gangs find whole nodes.
        """
        size = shape.group_size
        fits = {node: n // size for node, n in self._n_free.items() if n >= size}
        whole = [node for node, n_groups in fits.items() if n_groups >= shape.n_groups]
        if whole:
            fullest = min(whole, key=lambda node: (self._n_free[node], node))
            return (fullest,) * shape.n_devices
        if sum(fits.values()) < shape.n_groups:
            return None
        places: list[str] = []
        for node in sorted(fits, key=lambda node: (-fits[node], node)):
            n_groups = min(fits[node], shape.n_groups - len(places) // size)
            places += [node] * (n_groups * size)
        return tuple(places)

    def place_any(self, shapes: Sequence[Shape]) -> tuple[Shape, tuple[str, ...]] | None:
        """The first of several shapes that has room, and where."""
        for shape in shapes:
            if (places := self.place(shape)) is not None:
                return shape, places
        return None

    def by_node(self) -> Mapping[str, int]:
        """Devices here, of nodes that have any."""
        return {node: n for node, n in self._n_free.items() if n > 0}
