"""Random histories of what is made and deleted: nothing that is referred to goes, and at the end nothing is left."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.chaos.counts import IS_CHAOS, count, tell
from tests.support.garbage_history import VERBS, GarbageHistory, GarbageHistoryOnPostgreSQL


@pytest.mark.parametrize(
    "machine",
    [
        GarbageHistory,
        pytest.param(GarbageHistoryOnPostgreSQL, marks=pytest.mark.skipif(not IS_CHAOS, reason="minutes: make chaos")),
    ],
)
def test_nothing_that_is_referred_to_is_deleted_and_nothing_else_is_left(machine: type[GarbageHistory]) -> None:
    machine.reached = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count(40, 200, 2000),
            stateful_step_count=count(40, 50, 50),
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    reached = machine.reached
    tell(
        machine=machine.__name__,
        steps=sum(reached[verb] for verb in set(VERBS)),
        collections=reached["collect"],
        cut_off=reached["was cut off"],
        stores_deleted=reached["store deleted"],
        dictionaries_deleted=reached["dictionary deleted"],
        leftovers_deleted=reached["leftovers deleted"],
        begun_anew=reached["begun anew"],
    )
    wanted = {*VERBS, "was cut off", "store deleted", "dictionary deleted", "leftovers deleted"}
    assert wanted <= set(reached), "much of the model was never reached"
