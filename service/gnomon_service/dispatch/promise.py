"""The promise to the first job that finds no room: when it will have some, if all that runs ends as expected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gnomon_service.dispatch.decisions import Gang
from gnomon_service.dispatch.order import Ask
from gnomon_service.dispatch.room import FreeDevices

ASSUMED_S: Final = 3_600.0
"""How long what runs is taken to go on where nothing is known of it."""


@dataclass(slots=True, kw_only=True)
class Promise:
    """FreeDevices that the first job without any will have."""

    job_id: str
    in_s: float
    """When, if what runs ends as expected."""
    room: FreeDevices
    """What is left of the cluster by then, without it: others may have it for as long as they like."""
    ended: frozenset[str]
    """Jobs that are expected to have ended by then, or to have shrunk."""

    @classmethod
    def to(cls, ask: Ask, soon: FreeDevices, gangs: Iterable[Gang]) -> Promise:
        """The earliest: what runs ends one after the other, and elastic jobs shrink at once."""
        room, in_s = soon.copy(), 0.0
        ended: set[str] = set()
        running = [gang for gang in gangs if not gang.is_leaving]
        for gang in running:
            if gang.n_most is not None:
                room.give(gang.places[1:])
                ended.add(gang.job_id)
        found = room.place_any(ask.shapes)
        for gang in sorted(running, key=_end_of):
            if found is not None:
                break
            room.give(gang.places[:1] if gang.n_most is not None else gang.places)
            ended.add(gang.job_id)
            in_s = max(in_s, _end_of(gang))
            found = room.place_any(ask.shapes)
        if found is not None:
            room.take(found[1])
        return cls(job_id=ask.job_id, in_s=in_s, room=room, ended=frozenset(ended))


def _end_of(gang: Gang) -> float:
    return ASSUMED_S if gang.ends_in_s is None else max(0.0, gang.ends_in_s)
