"""A crew: a gang whose members do not depend on one another, so that one that is lost is replaced and the others go on.

What a lost member had under way is given back to whoever handed it out. That is bounded: a place whose members are lost
again and again, without anything done between, stays empty, and with the last place the attempt is lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import ray

from gnomon.events import Logged
from gnomon_workers.runtime.answers import value_of
from gnomon_workers.runtime.deaths import lost_as_such
from gnomon_workers.runtime.gang import BEAT_EVERY_S, Gang, RoomWait
from gnomon_workers.runtime.reporting import Reporter, WorkerLost

MAX_LOSSES: Final = 3
"""Losses of one place in a row, or by one piece of work, that end it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What happened since the last look."""

    values: Mapping[Any, Any]
    """What those references gave that are done."""
    lost: Mapping[int, WorkerLost]
    """Members that were lost, and why: what they had under way is to be begun again."""


@dataclass(slots=True)
class Crew:
    """The members of a gang, each for itself."""

    gang: Gang
    reporter: Reporter
    _empty: set[int] = field(default_factory=set)
    """Places without a member, for good."""
    _n_lost: Counter[int] = field(default_factory=Counter)
    """Members lost in each place since one did something there."""
    _room: RoomWait | None = None
    _room_due: float = 0.0

    @property
    def present(self) -> list[int]:
        """Places that have a member, or wait for one."""
        return [index for index in range(len(self.gang.members)) if index not in self._empty]

    @property
    def places(self) -> tuple[str, ...]:
        """Nodes of the members that have one, by Ray's id."""
        return tuple(node for index in self.present if (node := self.gang.node_of(index)) is not None)

    def grow(self, node: str) -> int:
        """Take in another member, on a node if it has room; returns its place."""
        return self.gang.add(node)

    def shrink(self, index: int) -> None:
        """Let a member go that has nothing under way."""
        self._empty.add(index)
        self.gang.remove(index)

    def look(self, running: Mapping[Any, int], *, every_s: float = 0.2) -> Look:
        """Wait for the first of the references for every_s seconds at most, each of a member's work.

        Raises the error of a member that refused.
        """
        done, _ = ray.wait(list(running), num_returns=1, timeout=every_s)
        values: dict[Any, Any] = {}
        lost: dict[int, WorkerLost] = {}
        for reference in done:
            try:
                with lost_as_such():
                    values[reference] = value_of(ray.get(reference))
            except WorkerLost as error:
                lost[running[reference]] = error
        self._say_where_room_is_missing()
        for index in self.present:
            try:
                self.gang.check_beat(index)
            except WorkerLost as error:
                lost.setdefault(index, error)
        return Look(values=values, lost=lost)

    def did(self, index: int) -> None:
        """A member has done a piece of work: its place is sound."""
        del self._n_lost[index]

    def replace(self, index: int, why: WorkerLost, *, begun: str) -> bool:
        """Put another member in a place, and say so with what is done again; False where it stays empty.

        Raises WorkerLost where it was the last place.
        """
        # a machine's end is often seen twice: its member's, and that of the replacement which was still sent there
        self._n_lost[index] += self.gang.is_placed(index)
        if self._n_lost[index] < MAX_LOSSES:
            self._warn(f"worker {index} is replaced, {begun}: {why}")
            self.gang.replace(index)
            return True
        self._empty.add(index)
        times = f"worker {index} was lost {MAX_LOSSES} times and did nothing between"
        if not self.present:
            raise WorkerLost(f"{times}: {why}") from why
        self._warn(f"{times}, the others go on: {why}")
        ray.kill(self.gang.members[index])
        return False

    def share_out(self, begin: Callable[[Any], Any], on_tick: Callable[[], None], *, every_s: float) -> list[Any]:
        """What `begin`, a member's only piece of work, gave for each member; that of a lost one is begun again.

        Raises as `look` does, and WorkerLost where a piece was begun MAX_LOSSES times.
        """
        running = {begin(member): index for index, member in enumerate(self.gang.members)}
        values: dict[int, Any] = {}
        while running:
            look = self.look(running, every_s=every_s)
            for reference, value in look.values.items():
                values[running.pop(reference)] = value
            for index, why in look.lost.items():
                running = {reference: other for reference, other in running.items() if other != index}
                if index in values:  # nothing is missing of it
                    self._empty.add(index)
                elif self.replace(index, why, begun="and its share begun again"):
                    running[begin(self.gang.members[index])] = index
                else:
                    raise why
            on_tick()
        return [values[index] for index in sorted(values)]

    def _say_where_room_is_missing(self) -> None:
        now = time.monotonic()
        if now < self._room_due:
            return
        self._room_due = now + BEAT_EVERY_S
        unplaced = self.gang.unplaced(self.present)
        if not unplaced:
            self._room = None
            return
        self._room = self._room or RoomWait(self.reporter)
        self._room.say(len(unplaced))

    def _warn(self, message: str) -> None:
        self.reporter.report(Logged(level="warning", message=message))
