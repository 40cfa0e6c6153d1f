"""Which events may go: of any history, whenever and however often it is thinned."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gnomon_service.dispatch.thinning import THINNED, Bounds, Told, superfluous

HOUR, DAY, LONG = 3_600.0, 86_400.0, 90 * 86_400.0
SMALL = Bounds(n_recent=12, n_old=4, n_first_logs=2, n_last_logs=3)
"""Bounds that small histories reach."""
PHASES = (Phase.explicit, Phase.generate)
"""A seed cannot be made simpler."""
N_CURVES = 3
"""Of a history here, at most."""
FORGETS = replace(SMALL, forget_after_s=LONG)


def curve_of(event: Told) -> tuple[str, ...]:
    return (event.kind, *event.line)


def left(events: Sequence[Told], bounds: Bounds = SMALL, *, later_s: float = 0.0, ended: bool = False) -> list[Told]:
    """What is left of a history that is thinned some time after its last event, at which the job may have ended."""
    aged = [
        Told(id=event.id, kind=event.kind, age_s=event.age_s + later_s, line=event.line, position=event.position)
        for event in events
    ]
    told = superfluous(aged, bounds, ended_s=later_s if ended else None)
    gone = set(told)
    assert told == sorted(gone) and gone <= {event.id for event in events}
    return [event for event in events if event.id not in gone]


def history(seed: int) -> list[Told]:
    """What attempts tell one after the other, each of which goes on from somewhere that the last had reached."""
    dice = Random(seed)
    made: list[tuple[str, tuple[str, ...], float]] = [("state", (), 0.0)]
    reached = 0
    for _ in range(dice.randint(1, 4)):
        reached = dice.randint(0, reached)
        every = dice.choice([1, 7, 100])
        for _ in range(dice.randint(0, 40)):
            reached += every
            kind = dice.choice(["metrics", "metrics", "progress", "log", "segment"])
            line: tuple[str, ...] = (dice.choice(["", "b"]),) if kind == "metrics" else ()
            made.append((kind, line, float(reached)))
        made.append(("state", (), 0.0))
    pauses = dice.choices([0.0, 1.0, 60.0, HOUR / 3, DAY / 3], k=7)
    age_s, told = 0.0, []
    for number in range(len(made), 0, -1):  # the last event is the youngest
        kind, line, position = made[number - 1]
        told.append(Told(id=number, kind=kind, age_s=age_s, line=line, position=position))
        age_s += pauses[number % 7]
    return told[::-1]


HISTORIES = st.integers(0, 2**32).map(history)
LATER = st.sampled_from([0.0, HOUR / 2, 2 * HOUR, DAY / 2, 2 * DAY, LONG / 2, 2 * LONG])


def standing(points: Sequence[Told]) -> list[Told]:
    """Points that none after them undoes."""
    found: list[Told] = []
    for point in reversed(points):
        if not found or point.position < found[-1].position:
            found.append(point)
    return found[::-1]


@settings(max_examples=600, phases=PHASES, deadline=None)
@given(HISTORIES, LATER, LATER, st.booleans())
def test_what_goes_once_goes_at_any_later_time_and_stays_away(
    events: list[Told], one_s: float, more_s: float, ended: bool
) -> None:
    early = left(events, FORGETS, later_s=one_s, ended=ended)
    assert left(early, FORGETS, later_s=one_s, ended=ended) == early
    late = left(events, FORGETS, later_s=one_s + more_s, ended=ended)
    twice = left(early, FORGETS, later_s=one_s + more_s, ended=ended)
    ids, ids_twice, ids_late = ({event.id for event in each} for each in (early, twice, late))
    assert ids_late <= ids_twice <= ids  # between ages one more of a cell may stay, as its first has gone before
    assert len(ids_twice - ids_late) <= N_CURVES


@settings(max_examples=600, phases=PHASES, deadline=None)
@given(HISTORIES, LATER, st.booleans())
def test_the_ends_of_every_curve_stay_and_the_middle_is_bounded(
    events: list[Told], later_s: float, ended: bool
) -> None:
    stay = left(events, later_s=later_s, ended=ended)
    ids = {event.id for event in stay}
    assert events[-1].id in ids
    curves: defaultdict[tuple[str, ...], list[Told]] = defaultdict(list)
    for event in events:
        if event.kind in THINNED:
            curves[curve_of(event)].append(event)
    for curve, points in curves.items():
        valid = standing(points)
        assert valid[0].id in ids and valid[-1].id in ids
        n_old = sum(curve_of(event) == curve and event.age_s + later_s > HOUR for event in stay)
        assert n_old <= SMALL.n_recent + SMALL.n_old + 1
        step = max(1.0, 2 * (valid[-1].position + 1) / SMALL.n_old)
        before = 0.0
        for point in valid:  # none is further from the last that stays before it than the grid is wide
            before = point.position if point.id in ids else before
            assert point.position - before < step


@settings(max_examples=300, phases=PHASES, deadline=None)
@given(HISTORIES, LATER, st.booleans())
def test_young_events_and_those_of_other_kinds_stay(events: list[Told], later_s: float, ended: bool) -> None:
    ids = {event.id for event in left(events, later_s=later_s, ended=ended)}
    for event in events:
        is_young = event.age_s + later_s <= HOUR
        assert event.id in ids or event.kind == "log" or (event.kind in THINNED and not is_young)
    logs = [event.id for event in events if event.kind == "log"]
    n_most = SMALL.n_first_logs + SMALL.n_last_logs
    kept = [number for number in logs if number in ids]
    assert kept == (logs[:2] + logs[-3:] if ended and len(logs) > n_most else logs)


@settings(max_examples=300, phases=PHASES, deadline=None)
@given(HISTORIES)
def test_of_a_job_that_ended_long_ago_states_and_the_last_progress_stay(events: list[Told]) -> None:
    stay = left(events, FORGETS, later_s=LONG, ended=True)
    progress = [event for event in events if event.kind == "progress"][-1:]
    states = [event for event in events if event.kind == "state"]
    assert stay == sorted([*states, *progress], key=lambda event: event.id)
    if any(event.kind == "segment" for event in events):
        assert left(events, SMALL, later_s=LONG, ended=True) != stay


@settings(max_examples=300, phases=PHASES, deadline=None)
@given(HISTORIES, st.lists(st.integers(1, 250), max_size=5))
def test_a_history_that_is_thinned_while_it_grows_keeps_its_bounds(events: list[Told], cuts: list[int]) -> None:
    stay: list[Told] = []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(events)], strict=True):
        stay = [*stay, *events[begin:end]]
        if stay:  # as old as they were when the last of these came
            now = stay[-1].age_s
            stay = left([replace(event, age_s=event.age_s - now) for event in stay])
            stay = [replace(event, age_s=event.age_s + now) for event in stay]
    stay = left(stay, later_s=2 * DAY)
    for curve in {curve_of(event) for event in events if event.kind in THINNED}:
        points = [event for event in stay if curve_of(event) == curve]
        assert points[-1] == [event for event in events if curve_of(event) == curve][-1]
        assert len(points) <= SMALL.n_old + 2
        assert [point.position for point in points] == sorted({point.position for point in points})
    assert [event for event in events if event.kind == "state"] == [event for event in stay if event.kind == "state"]


def test_a_long_job_comes_down_to_some_hundreds_of_each_curve() -> None:
    told = [
        Told(id=2 * step + index, kind="metrics", age_s=50.0 * (20_000 - step), line=(name,), position=10.0 * step)
        for step in range(20_000)
        for index, name in enumerate(("a", "b"), 1)
    ]
    stay = left(told, Bounds())
    for name in ("a", "b"):
        points = [event for event in stay if event.line == (name,)]
        old = [event for event in points if event.age_s > DAY]
        young = [event for event in points if event.age_s <= HOUR]
        assert points[0].position == 0.0 and points[-1].position == 199_990.0
        assert 200 <= len(old) <= 400 and len(young) == 72 and len(points) <= 400 + 2_000 + 72
