"""A gang: actors of one class, on resources reserved for all of them at once.

Ranks of a training live and die together: losing one loses the gang, whoever runs it raises WorkerLost, the attempt
ends as lost, and the job runs again from its last checkpoint. Members that do not depend on one another are replaced
one by one (see `crew`). All are owned by the supervisor, so they die with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Self

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gnomon.errors import Unavailable
from gnomon_workers.runtime.answers import value_of
from gnomon_workers.runtime.deaths import lost_as_such
from gnomon_workers.runtime.devices import Devices, free_devices
from gnomon_workers.runtime.reporting import Reporter, WorkerLost

NODE_LABEL: Final = "ray.io/node-id"
"""Label that Ray gives every node."""
NO_ROOM_S: Final = 5.0
"""Without a place for this long, a gang says that it waits for room,"""
SAY_EVERY_S: Final = 300.0
"""and again as often as this."""
DEATH_S: Final = 10.0
"""Longest wait for the death of members that were killed, or for a word of one that may be dead."""
STALL_S: Final = 20.0
"""A member that has not answered for this long is taken for dead: a stopped process is noticed by nothing else."""
START_S: Final = 180.0
"""The same for its first answer: a fresh process imports torch first, and a machine may be busy."""
BEAT_EVERY_S: Final = 1.0


@dataclass(slots=True)
class Gang:
    """n actors of one class, one core or one whole GPU each; a context manager that ends them all.

    A member has a method `beat()`, answered while it works, and methods that work, which are marked with `answers`.
    """

    members: list[Any]
    groups: list[PlacementGroup]
    """The one in which all have their places, or one for each member of a gang whose members are apart."""
    _begin: Callable[[PlacementGroup, int, int], Any]
    """Starts a member, with its index, in the place of a group that has the number given."""
    last_beats: list[Any] = field(default_factory=list)
    """What each member last answered to `beat()`."""
    _asked: dict[int, tuple[Any, float]] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)

    @classmethod
    def start(
        cls,
        actor_class: Any,
        n_members: int,
        reporter: Reporter,
        *,
        places: Sequence[str] = (),
        apart: bool = False,
        env: dict[str, str] | None = None,
    ) -> Self:
        """Reserve resources and start the members, with their index as the only argument.

        places: the node of each member, by Ray's id; without them, wherever there is room. Members that are apart come
        and go one by one, and may be placed elsewhere. Waits for as long as the cluster has no room for all of them, or
        for the first that is apart, and says so; raises Cancelled, Left, and WorkerLost where a node has gone.
        """
        devices = Devices.of_cluster()
        if apart:
            groups = [_ask_for_one(devices, node) for node in (*places, *[None] * (n_members - len(places)))]
            _wait_for(groups[0], groups, (), n_members, reporter)
        else:
            groups = [_ask_for_all(devices, n_members, places)]
            _wait_for(groups[0], groups, places, n_members, reporter)
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}

        def begin(group: PlacementGroup, place: int, index: int) -> Any:
            options = ray.remote(actor_class).options(
                **devices.options,
                max_restarts=0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
                runtime_env={"env_vars": threads},
            )
            return options.remote(index)

        made = cls(members=[], groups=groups, _begin=begin, last_beats=[0] * n_members)
        made.members = [begin(*made._place(index), index) for index in range(n_members)]
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            # a busy actor outlives its dropped handle
            ray.kill(member)
        deadline = time.monotonic() + DEATH_S
        for member in self.members:
            # the next gang of this attempt writes the same paths
            with suppress(RayError):
                ray.get(member.beat.remote(), timeout=max(0.0, deadline - time.monotonic()))
        for group in self.groups:
            remove_placement_group(group)

    def _place(self, index: int) -> tuple[PlacementGroup, int]:
        """The group and the number in it of a member's place."""
        return (self.groups[0], index) if self._is_together else (self.groups[index], 0)

    @property
    def _is_together(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].bundle_count > 1

    def watch(self, running: Sequence[Any], on_tick: Callable[[], None], *, every_s: float = 0.2) -> list[Any]:
        """Wait until all `running` references are done and return their values; on_tick runs meanwhile.

        Raises as `done`, at the first member that refuses or is lost: the others may be waiting for it.
        """
        values: dict[Any, Any] = {}
        while len(values) < len(running):
            values |= self.done([each for each in running if each not in values], every_s=every_s)
            on_tick()
        return [values[reference] for reference in running]

    def done(self, running: Sequence[Any], *, every_s: float = 0.2) -> dict[Any, Any]:
        """The values of those references that are done, waiting for the first of them for every_s seconds at most.

        Raises the error of a member that refused, and WorkerLost when one died, failed or stopped answering.
        """
        done, _ = ray.wait(list(running), num_returns=1, timeout=every_s)
        try:
            with lost_as_such():
                answers = ray.get(done)
        except WorkerLost:
            self._look_for_a_death()
            raise
        values = {reference: value_of(answer) for reference, answer in zip(done, answers, strict=True)}
        self.check_beats()
        return values

    def _look_for_a_death(self) -> None:
        """Raise WorkerLost for a member that died: those who live may meet its broken connections before Ray tells."""
        beats = [member.beat.remote() for member in self.members]
        for beat in ray.wait(beats, num_returns=len(beats), timeout=DEATH_S)[0]:
            with lost_as_such():
                ray.get(beat)

    def check_beats(self) -> None:
        """Ask for beats that are due; raises WorkerLost when a member died or stopped answering."""
        for index in range(len(self.members)):
            self.check_beat(index)

    def check_beat(self, index: int) -> None:
        """The same of one member."""
        now, member = time.monotonic(), self.members[index]
        beat, sent = self._asked.get(index, (None, 0.0))
        # one question under way a member: more would only queue up behind one that is stopped
        if beat is None:
            self._asked[index] = (member.beat.remote(), now)
        elif now - sent > BEAT_EVERY_S and ray.wait([beat], timeout=0)[0]:
            with lost_as_such():
                self.last_beats[index] = ray.get(beat)
            self._asked[index] = (member.beat.remote(), now)
            self._started.add(index)
        elif now - sent > (STALL_S if index in self._started else START_S):
            raise WorkerLost(f"worker {index} has not answered for {now - sent:.0f} s")

    def replace(self, index: int) -> None:
        """Start another member in a place, as soon as there is room for it.

        The one before is ended, but may go on for a while where its machine cannot be reached: both must not write the
        same paths.
        """
        ray.kill(self.members[index])
        self.members[index] = self._begin(*self._place(index), index)
        self.last_beats[index] = 0
        self._asked.pop(index, None)
        self._started.discard(index)

    def add(self, node: str) -> int:
        """Start another member of a gang whose members are apart, on a node if it has room; returns its index."""
        index = len(self.members)
        self.groups.append(_ask_for_one(Devices.of_cluster(), node))
        self.last_beats.append(0)
        self.members.append(self._begin(self.groups[index], 0, index))
        return index

    def remove(self, index: int) -> None:
        """End a member of a gang whose members are apart, and free its place; the index stays empty."""
        ray.kill(self.members[index])
        remove_placement_group(self.groups[index])
        self._asked.pop(index, None)

    def node_of(self, index: int) -> str | None:
        """The node on which a member is, by Ray's id; None as long as there is no room for it."""
        group, place = self._place(index)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return nodes.get(place) or None if self.is_placed(index) else None

    def is_placed(self, index: int) -> bool:
        """Whether a member has a machine: all have one, or none, where they are together."""
        return bool(placement_group_table(self._place(index)[0])["state"] == "CREATED")

    def unplaced(self, indices: Sequence[int]) -> list[int]:
        """Those members that wait for room, since their machine has gone: a silence that is no loss."""
        waiting = [index for index in indices if index not in self._started and not self.is_placed(index)]
        now = time.monotonic()
        self._asked |= {index: (self._asked[index][0], now) for index in waiting if index in self._asked}
        return waiting


@dataclass(slots=True)
class RoomWait:
    """Says that room is waited for: once it has lasted for NO_ROOM_S, and then every SAY_EVERY_S."""

    reporter: Reporter
    began: float = field(default_factory=time.monotonic)
    _said_at: float | None = None

    def say(self, n_members: int) -> None:
        """There is no room for so many members still."""
        now = time.monotonic()
        due = self.began + NO_ROOM_S if self._said_at is None else self._said_at + SAY_EVERY_S
        if now >= due:
            self._said_at = now
            self.reporter.waiting(_no_room(Devices.of_cluster(), n_members))

    @property
    def was_said(self) -> bool:
        """Whether it lasted long enough to be told."""
        return self._said_at is not None


def _ask_for_all(devices: Devices, n_members: int, places: Sequence[str]) -> PlacementGroup:
    """Room for all members, each on its node."""
    # all or none: two gangs that each held half of the devices would wait for each other for ever
    labels = [{NODE_LABEL: node} for node in places] or None
    bundles = [devices.of_member for _ in range(n_members)]
    group: PlacementGroup = placement_group(bundles, strategy="PACK", bundle_label_selector=labels)
    return group


def _ask_for_one(devices: Devices, node: str | None) -> PlacementGroup:
    """Room for one member, on a node if that has some."""
    group: PlacementGroup = placement_group([devices.of_member], strategy="STRICT_PACK", _soft_target_node_id=node)
    return group


def _wait_for(
    first: PlacementGroup, groups: list[PlacementGroup], places: Sequence[str], n_members: int, reporter: Reporter
) -> None:
    """Wait until there is room for the first group; gives all up where that will never be."""
    wait = RoomWait(reporter)
    try:
        while not first.wait(1.0):
            reporter.check()
            _check_nodes(places)
            wait.say(n_members)
    except BaseException:
        for group in groups:
            remove_placement_group(group)
        raise
    if wait.was_said:
        reporter.resume()


def _check_nodes(places: Sequence[str]) -> None:
    """Raise WorkerLost where a node has gone on which a member was to be: the scheduler finds others."""
    gone = set(places).difference(node["NodeID"] for node in ray.nodes() if node["Alive"])
    if gone:
        raise WorkerLost(f"node {min(gone)} has gone before the gang was there")


def _no_room(devices: Devices, n_members: int) -> Unavailable:
    each = "a GPU" if devices.use_gpu else "a core"
    return Unavailable(
        f"the cluster has no room for {n_members} workers ({each} each); it has {devices}, of which {free_devices()} "
        "are free",
        code="no_room",
    )
