"""Failpoints: what is asked for happens at the named place, rank and passage, and nowhere else."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from gnomon.errors import StoreUnavailable
from gnomon_workers.runtime import failpoints
from gnomon_workers.runtime.failpoints import VARIABLE, Failpoint, arm, failing_during, failpoint
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def disarmed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.delenv(VARIABLE, raising=False)
    arm(0)


def test_nothing_happens_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    arm(0)
    for point in Failpoint:
        failpoint(point)
        with failing_during(point):
            pass
    assert failpoints.environment() == {}


def test_the_named_passage_of_the_named_rank_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "step.before@rank=1,hit=3:raise; run.end:kill")
    assert failpoints.environment() == {VARIABLE: "step.before@rank=1,hit=3:raise; run.end:kill"}
    for rank, failing in ((0, []), (1, [3])):
        arm(rank)
        failed = []
        for passage in range(1, 6):
            failpoint(Failpoint.STEP_BEFORE_UPDATE)
            try:
                failpoint(Failpoint.STEP_BEFORE)
            except StoreUnavailable:
                failed.append(passage)
        assert failed == failing


def test_a_place_that_lasts_fails_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "checkpoint.during_upload:raise")
    arm(0)
    reached = False
    with pytest.raises(StoreUnavailable, match=r"checkpoint\.during_upload"), failing_during(Failpoint.UPLOAD_DURING):
        reached = True
    assert reached


@pytest.mark.parametrize(
    "text",
    ["step.before", "step.before:explode", "nowhere:kill", "step.before@node=1:kill", "step.before@rank=x:kill"],
)
def test_what_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError):
        arm(0)


def _come_by(text: str, lasting: bool) -> None:
    os.environ[VARIABLE] = text
    arm(2)
    if lasting:
        with failing_during(Failpoint.UPLOAD_DURING):
            pass
    else:
        failpoint(Failpoint.RUN_START)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_process_is_killed_or_stopped(lasting: bool) -> None:
    name = "checkpoint.during_upload" if lasting else "run.start"
    context = multiprocessing.get_context("spawn")
    killed, stopped = (
        context.Process(target=_come_by, args=(f"{name}@rank=2:{action}", lasting)) for action in ("kill", "stop")
    )
    killed.start()
    stopped.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    wait_until(lambda: _is_stopped(stopped.pid or 0), "the stop")
    stopped.kill()
    stopped.join()


def _is_stopped(pid: int) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
    return found == pid and os.WIFSTOPPED(status)
