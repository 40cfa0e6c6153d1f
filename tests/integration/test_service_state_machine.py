"""Random histories of one job against a model of the state machine; on PostgreSQL too with `make chaos`."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from gnomon_service.db.tables import LEGAL_TRANSITIONS
from tests.chaos.counts import IS_CHAOS, count, tell
from tests.support.job_history import VERBS, JobHistory, JobHistoryOnPostgreSQL

NOT_OF_ONE_JOB: Final = {("queued", "succeeded"), ("queued", "failed")}
"""Changes that another job or a deadline brings about."""


@pytest.mark.parametrize(
    "machine",
    [
        JobHistory,
        pytest.param(JobHistoryOnPostgreSQL, marks=pytest.mark.skipif(not IS_CHAOS, reason="minutes: make chaos")),
    ],
)
def test_random_histories_are_those_of_the_model(machine: type[JobHistory]) -> None:
    machine.reached = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count(40, 200, 2000),
            stateful_step_count=count(30, 50, 50),
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    tell(
        machine=machine.__name__,
        steps=sum(machine.reached[verb] for verb in set(VERBS)),
        stale_writes_tried=machine.reached["stale write"],
    )
    everything = {f"{before} -> {to}" for before, to in LEGAL_TRANSITIONS if (before, to) not in NOT_OF_ONE_JOB}
    wanted = everything | {"attempt 3"} if IS_CHAOS else {"attempt 2"}
    assert wanted | {*VERBS, "stale write"} <= set(machine.reached), "much of the model was never reached"
