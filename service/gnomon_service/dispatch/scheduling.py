"""What is started, resized and asked to leave: a pure function of what waits, what runs, and what there is.

Gangs are placed whole or not at all. Elastic jobs run on what gangs leave, and give it back. The first job that finds
no room is promised some for as soon as what runs is expected to have ended; others may run meanwhile where they do not
stand in its way by then, and one that does all the same is asked to leave. A job may make those of a lower class leave.
Whatever waits is told why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gnomon_service.dispatch import reasons
from gnomon_service.dispatch.decisions import Decisions, Gang, Leave, Start
from gnomon_service.dispatch.order import Ask, Share, in_order
from gnomon_service.dispatch.promise import Promise
from gnomon_service.dispatch.reasons import Reason
from gnomon_service.dispatch.room import FreeDevices, Node

N_MAKING_ROOM: Final = 64
"""Jobs for which others may be moved in one decision: each looks at all that runs."""
N_TOLD: Final = 500
"""Jobs whose reason is told whole; those behind them wait for their turn, whatever else they wait for."""


def decide(
    asks: Iterable[Ask],
    gangs: Sequence[Gang],
    nodes: Sequence[Node],
    shares: Mapping[str, Share],
    *,
    what: str = "devices",
    starts_nothing: Reason | None = None,
) -> Decisions:
    """Decide about every job that could be started.

    what: what devices are called in sentences. starts_nothing: why, where nothing may be started at all.
    """
    return _Turn(gangs, nodes, shares, what=what, starts_nothing=starts_nothing).decide(asks)


class _Turn:
    """One decision: what is free is counted down while it is given away."""

    def __init__(
        self,
        gangs: Sequence[Gang],
        nodes: Sequence[Node],
        shares: Mapping[str, Share],
        *,
        what: str,
        starts_nothing: Reason | None,
    ) -> None:
        self._gangs = {gang.job_id: gang for gang in gangs}
        self._shares = shares
        self._what = what
        self._starts_nothing = starts_nothing
        self._drained = {node.id for node in nodes if node.is_drained}
        self._empty = FreeDevices.of(nodes)
        self._free = self._empty.copy()
        """Devices in use by nobody, and kept for nobody."""
        for gang in gangs:
            self._free.take(gang.places + gang.gives)
        self._n_free, self._n_devices = self._free.n_devices, self._empty.n_devices
        self._soon = self._free.copy()
        """The same with those of which somebody was asked to go."""
        for gang in gangs:
            self._soon.give(gang.gives + (gang.places if gang.is_leaving else ()))
        self._promised: Promise | None = None
        self._decisions = Decisions()
        self._started: dict[str, tuple[Ask, tuple[str, ...], float | None]] = {}
        self._places = {gang.job_id: list(gang.places) for gang in gangs if gang.n_most is not None}
        """Elastic jobs that run -> the places they keep."""
        self._moved: set[str] = set()
        self._n_jobs = Counter(gang.project for gang in gangs)
        self._n_held: Counter[str] = Counter()
        for gang in gangs:
            self._n_held[gang.project] += len(gang.places)
        self._n_making_room = 0
        self._in_vain: set[tuple[object, ...]] = set()
        self._holders = [gang.job_id for gang in gangs if gang.places]

    def decide(self, asks: Iterable[Ask]) -> Decisions:
        """Go through all jobs in their order, then share out what is left."""
        for gang in self._gangs.values():
            gone = self._drained.intersection(gang.places)
            if gone and not gang.is_leaving:
                self._send_away(gang, f"node {min(gone)!r} is drained")
        n_waiting = 0
        for ask in in_order(asks, self._shares, dict(self._n_held)):
            reason = self._starts_nothing or self._try(ask)
            if reason is not None:
                self._decisions.order.append(ask.job_id)
                n_waiting += 1
                if n_waiting <= N_TOLD:
                    self._decisions.reasons[ask.job_id] = reason
        self._grow()
        return self._finished()

    # ------------------------------------------------------------------------------------------ one job

    def _try(self, ask: Ask) -> Reason | None:
        """Start a job, or say why not; room that is made for it is kept for it."""
        over = self._over_quota(ask)
        if over is not None:
            return over
        # what is there only becomes less in a turn: a job like one that found no room finds none either
        like = (ask.shapes, ask.tier, self._promised is not None and self._is_short(ask, self._promised))
        if like not in self._in_vain:
            if self._start(ask):
                return None
            if self._empty.place_any(ask.shapes) is None:
                return reasons.too_large(ask, self._empty, self._what)
            movers = self._wait_for_leaving(ask) or self._make_room(ask)
            if movers:
                return reasons.room_is_made(movers)
            self._in_vain.add(like)
        first = self._promised is None
        if self._promised is None:
            self._promised = Promise.to(ask, self._soon, self._gangs.values())
        return reasons.no_room(
            ask,
            n_free=self._n_free,
            n_devices=self._n_devices,
            what=self._what,
            holders=self._holders,
            free_in_s=self._promised.in_s if first else None,
            behind=None if first else self._promised.job_id,
        )

    def _wait_for_leaving(self, ask: Ask) -> list[str]:
        """Keep for a job what others are about to leave, if that is enough; returns those others."""
        soon = self._beside_promise(self._soon).place_any(ask.shapes)
        if soon is None:
            return []
        self._keep(soon[1])
        moved = (gang for gang in self._gangs.values() if gang.is_leaving or gang.gives or gang.job_id in self._moved)
        return [gang.job_id for gang in moved]

    def _start(self, ask: Ask) -> bool:
        """Place a job beside what is promised, or in it where it will have ended by then."""
        guest_for_s = None
        found = self._beside_promise(self._free).place_any(ask.shapes)
        if found is None and self._promised is not None and self._is_short(ask, self._promised):
            found = self._free.place_any(ask.shapes)
            guest_for_s = self._promised.in_s
        if found is None:
            return False
        places = found[1]
        self._free.take(places)
        self._keep(places, is_guest=guest_for_s is not None)
        self._n_jobs[ask.project] += 1
        self._n_held[ask.project] += len(places)
        self._started[ask.job_id] = (ask, places, guest_for_s)
        return True

    @staticmethod
    def _is_short(ask: Ask, promise: Promise) -> bool:
        return ask.expected_s is not None and ask.expected_s <= promise.in_s

    def _over_quota(self, ask: Ask) -> Reason | None:
        share = self._shares.get(ask.project, Share())
        n_jobs, n_held = self._n_jobs[ask.project], self._n_held[ask.project]
        if share.n_jobs_most is not None and n_jobs >= share.n_jobs_most:
            return reasons.quota(ask.project, n_jobs, share.n_jobs_most, "running")
        least = min(shape.n_devices for shape in ask.shapes)
        if share.n_devices_most is not None and n_held + least > share.n_devices_most:
            return reasons.quota(ask.project, n_held, share.n_devices_most, self._what)
        return None

    def _keep(self, places: Sequence[str], *, is_guest: bool = False) -> None:
        """Give devices away that are free, or soon will be: to a guest only for as long as they are not promised."""
        self._soon.take(places)
        self._free = self._free.at_most(self._soon)
        self._n_free = self._free.n_devices
        if self._promised is not None and not is_guest:
            self._promised.room.take(places)

    def _beside_promise(self, room: FreeDevices) -> FreeDevices:
        """Of some devices, those that nobody was promised."""
        return room if self._promised is None else room.at_most(self._promised.room)

    # ------------------------------------------------------------------------------------------ making room

    def _make_room(self, ask: Ask) -> list[str]:
        """Have elastic jobs shrink and others leave, no more than needed; returns which, none if that is no use."""
        if self._n_making_room >= N_MAKING_ROOM:
            return []
        self._n_making_room += 1
        chosen: list[_Move] = []
        for move in self._moves(ask):
            chosen.append(move)
            if self._place_after(chosen, ask) is not None:
                break
        else:
            return []
        for move in chosen[:-1]:  # the last was needed for certain
            others = [other for other in chosen if other is not move]
            if self._place_after(others, ask) is not None:
                chosen = others
        places = self._place_after(chosen, ask)
        assert places is not None
        for move in chosen:
            self._move(move, ask)
        self._keep(places)
        return sorted({move.job_id for move in chosen})

    def _place_after(self, moves: Sequence[_Move], ask: Ask) -> tuple[str, ...] | None:
        """Where a job could go after these moves, beside what is promised to another."""
        room = self._soon.copy()
        promised = None if self._promised is None else self._promised.room.copy()
        for move in moves:
            room.give(move.places)
            if promised is not None and self._promised is not None and move.job_id not in self._promised.ended:
                promised.give(move.places)
        found = (room if promised is None else room.at_most(promised)).place_any(ask.shapes)
        return None if found is None else found[1]

    def _moves(self, ask: Ask) -> list[_Move]:
        """What could be freed for a job, the cheapest first."""
        still = [gang for gang in self._gangs.values() if not gang.is_leaving and gang.job_id not in self._moved]
        shrinks = [
            _Move(job_id=gang.job_id, places=tuple(self._places[gang.job_id][1:]))
            for gang in still
            if len(self._places.get(gang.job_id, ())) > 1
        ]
        guests = [gang for gang in still if gang.guest_for_s is not None and gang.guest_for_s < 0]
        lower = [gang for gang in still if gang.tier < ask.tier and gang not in guests]
        # the least work is lost where least has been done
        lower.sort(key=lambda gang: (gang.tier, gang.priority, gang.ran_s, gang.job_id))
        return shrinks + [
            _Move(job_id=gang.job_id, places=self._least_places(gang), is_leave=True) for gang in (*guests, *lower)
        ]

    def _least_places(self, gang: Gang) -> tuple[str, ...]:
        """What a gang still holds after it has shrunk."""
        return gang.places if gang.job_id not in self._places else tuple(self._places[gang.job_id][:1])

    def _move(self, move: _Move, ask: Ask) -> None:
        gang = self._gangs[move.job_id]
        if move.is_leave:
            guest = "it was to be done by now, and job" if gang.guest_for_s is not None else "job"
            self._send_away(gang, f"{guest} {ask.job_id!r} needs its place")
        elif move.job_id in self._places:
            self._places[move.job_id] = self._places[move.job_id][:1]
            self._soon.give(move.places)

    def _send_away(self, gang: Gang, why: str) -> None:
        self._moved.add(gang.job_id)
        self._soon.give(self._places.pop(gang.job_id, gang.places))
        self._decisions.leaves.append(Leave(job_id=gang.job_id, why=why))

    # ------------------------------------------------------------------------------------------ elastic jobs

    def _grow(self) -> None:
        """Give what is left to elastic jobs, one device each in turn: also what is promised, for they give it back."""
        if self._starts_nothing is not None:
            return
        most = {job_id: gang.n_most or 1 for job_id, gang in self._gangs.items() if job_id in self._places}
        for job_id, (ask, places, _) in self._started.items():
            if ask.n_most is not None:
                self._places[job_id], most[job_id] = list(places), ask.n_most
        hungry = [job_id for job_id in self._places if not self._is_leaving(job_id)]
        left = [node for node, n in sorted(self._free.by_node().items()) for _ in range(n)]
        while left and hungry:
            hungry = [
                job_id for job_id in hungry if len(self._places[job_id]) < most[job_id] and not self._is_full(job_id)
            ]
            for job_id in hungry[: len(left)]:
                self._places[job_id].append(left.pop())
                self._n_held[self._project_of(job_id)] += 1

    def _is_leaving(self, job_id: str) -> bool:
        gang = self._gangs.get(job_id)
        return job_id in self._moved or (gang is not None and gang.is_leaving)

    def _is_full(self, job_id: str) -> bool:
        project = self._project_of(job_id)
        most = self._shares.get(project, Share()).n_devices_most
        return most is not None and self._n_held[project] >= most

    def _project_of(self, job_id: str) -> str:
        return self._gangs[job_id].project if job_id in self._gangs else self._started[job_id][0].project

    def _finished(self) -> Decisions:
        for job_id, (_, places, guest_for_s) in self._started.items():
            chosen = tuple(self._places.pop(job_id, places))
            self._decisions.starts.append(Start(job_id=job_id, places=chosen, guest_for_s=guest_for_s))
        for job_id, kept in self._places.items():
            if not self._is_leaving(job_id) and Counter(kept) != Counter(self._gangs[job_id].places):
                self._decisions.sizes[job_id] = tuple(kept)
        return self._decisions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """Devices that a running job could give: all but one of an elastic one, or the rest by leaving."""

    job_id: str
    places: tuple[str, ...]
    is_leave: bool = False
