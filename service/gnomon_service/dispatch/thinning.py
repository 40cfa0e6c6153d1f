"""Which events of a job may go, so that what a long job tells does not grow for ever; a pure function.

What measures the same thing again and again is thinned by its step, not by its number: a curve drawn from what is left
has the same shape, only fewer points. The grid of steps only ever grows coarser, by halves, so that events thinned
early, late, often or by several at once leave the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gnomon.events import Logged, Progressed, StateChanged, TrainingMeasured

THINNED: Final = (Progressed.kind, TrainingMeasured.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many events stay."""

    whole_s: float = 3_600.0
    """Events that are younger all stay."""
    recent_s: float = 86_400.0
    """Those that are younger are thinned to n_recent of a line, older ones to n_old."""
    n_recent: int = 2_000
    n_old: int = 400
    n_first_logs: int = 100
    """Of the log of a job that has ended, so many from its beginning, and n_last_logs from its end."""
    n_last_logs: int = 900
    forget_after_s: float | None = None
    """Of a job that ended longer ago, states and the last progress stay alone; None = never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """An event, as far as it matters here."""

    id: int
    kind: str
    age_s: float
    line: tuple[str, ...] = ()
    """What is measured: events of one kind and line are points of one curve."""
    position: float = 0.0
    """Where on the curve: the step, or what is done. Not negative."""


def superfluous(events: Sequence[Told], bounds: Bounds, *, ended_s: float | None) -> list[int]:
    """Ids of the events that may go, of all that are left of a job, in their order.

    ended_s: seconds since the job ended; None where it has not. The last event always stays: followers know the end by
    it.
    """
    if not events:
        return []
    if is_forgotten(bounds, ended_s):
        gone = _all_but_states(events)
    else:
        gone = {event_id for line in _lines(events) for event_id in _between(line, bounds)}
        if ended_s is not None:
            logs = [event.id for event in events if event.kind == Logged.kind]
            gone |= set(logs[bounds.n_first_logs : -bounds.n_last_logs])
    return sorted(gone - {events[-1].id})


def is_forgotten(bounds: Bounds, ended_s: float | None) -> bool:
    """Whether a job ended so long ago that little of it stays."""
    return ended_s is not None and bounds.forget_after_s is not None and ended_s >= bounds.forget_after_s


def _all_but_states(events: Sequence[Told]) -> set[int]:
    stay = {event.id for event in events if event.kind == StateChanged.kind}
    stay.update([event.id for event in events if event.kind == Progressed.kind][-1:])
    return {event.id for event in events} - stay


def _lines(events: Iterable[Told]) -> Iterable[list[Told]]:
    found: defaultdict[tuple[str, ...], list[Told]] = defaultdict(list)
    for event in events:
        if event.kind in THINNED:
            found[event.kind, *event.line].append(event)
    return found.values()


def _between(line: Sequence[Told], bounds: Bounds) -> set[int]:
    """Those between the points of a curve that stay: the first in each cell of the grid, and the last of all."""
    valid = _valid(line)
    most = valid[-1].position
    recent, old = (_first_in_cells(valid, _stride(most, n)) | {valid[-1].id} for n in (bounds.n_recent, bounds.n_old))
    return {
        event.id
        for event in line
        if event.age_s > bounds.whole_s and event.id not in (recent if event.age_s <= bounds.recent_s else old)
    }


def _valid(line: Sequence[Told]) -> list[Told]:
    """Points that no later one at the same or an earlier position has undone.

    An attempt that goes on from a checkpoint makes steps again that the one before had made: the curve is then its own.
    """
    valid: list[Told] = []
    for event in line:
        while valid and valid[-1].position >= event.position:
            valid.pop()
        valid.append(event)
    return valid


def _stride(most: float, n_cells: int) -> float:
    """The smallest power of two that divides what lies before `most` into at most so many cells."""
    stride = 1.0
    while most // stride >= n_cells:
        stride *= 2
    return stride


def _first_in_cells(valid: Sequence[Told], stride: float) -> set[int]:
    first: dict[float, int] = {}
    for event in valid:
        first.setdefault(event.position // stride, event.id)
    return set(first.values())
