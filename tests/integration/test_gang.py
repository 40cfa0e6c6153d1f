"""Gangs on a real Ray: losing one member loses the gang, soon and clearly."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray

from gnomon.errors import CorruptArtifact, GnomonError
from gnomon_workers.runtime import gang as gangs
from gnomon_workers.runtime.answers import answers
from gnomon_workers.runtime.gang import Gang
from gnomon_workers.runtime.protocol import Report
from gnomon_workers.runtime.reporting import Cancelled, Reporter, WorkerLost
from tests.support.rays import local_ray
from tests.support.waiting import wait_until


class Member:
    """Sleeps, and says who it is."""

    def __init__(self, index: int) -> None:
        self.index = index

    def beat(self) -> float:
        return 0.0

    def pid(self) -> int:
        return os.getpid()

    @answers
    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.index

    @answers
    def fail(self) -> None:
        raise OSError(errno.EIO, "out of luck")

    @answers
    def stumble(self) -> None:
        raise ValueError("no such shape")

    @answers
    def refuse(self) -> None:
        raise CorruptArtifact("shard 3 is damaged", shard=3)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(n_cpus=3):
        yield


def test_members_run_and_are_gone_afterwards() -> None:
    with Gang.start(Member, 2, Reporter()) as gang:
        pids = ray.get([member.pid.remote() for member in gang.members])
        ticks: list[int] = []
        values = gang.watch([m.work.remote(0.5) for m in gang.members], lambda: ticks.append(1))
    assert values == [0, 1] and len(ticks) >= 2
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the end of all members")


def test_a_killed_member_is_noticed_while_another_works() -> None:
    with Gang.start(Member, 2, Reporter()) as gang:
        running = [m.work.remote(60) for m in gang.members]
        os.kill(ray.get(gang.members[1].pid.remote()), signal.SIGKILL)
        with pytest.raises(WorkerLost, match="died"):
            gang.watch(running, lambda: None)


def test_a_failing_member_is_noticed_with_its_reason() -> None:
    with Gang.start(Member, 2, Reporter()) as gang:
        running = [gang.members[0].work.remote(60), gang.members[1].fail.remote()]
        with pytest.raises(WorkerLost, match="out of luck"):
            gang.watch(running, lambda: None)


def test_a_death_is_told_and_not_what_the_others_met_for_it() -> None:
    """Ranks that live find their connections broken, and say so, before Ray says who died."""
    with Gang.start(Member, 2, Reporter()) as gang:
        os.kill(ray.get(gang.members[1].pid.remote()), signal.SIGKILL)
        with pytest.raises(WorkerLost, match="a worker died"):
            gang.watch([gang.members[0].fail.remote()], lambda: None)


def test_an_error_that_would_come_again_is_the_jobs_own_with_its_place() -> None:
    with Gang.start(Member, 2, Reporter()) as gang:
        running = [gang.members[0].work.remote(60), gang.members[1].stumble.remote()]
        with pytest.raises(GnomonError, match=r"no such shape \(at test_gang.py:\d+ in stumble\)") as caught:
            gang.watch(running, lambda: None)
    assert (caught.value.code, caught.value.retryable) == ("internal", False)
    assert caught.value.detail["trace"].rstrip().endswith("ValueError: no such shape")


def test_a_members_refusal_is_raised_as_the_error_that_it_is_while_another_works() -> None:
    with Gang.start(Member, 2, Reporter()) as gang:
        running = [gang.members[0].work.remote(600), gang.members[1].refuse.remote()]
        with pytest.raises(CorruptArtifact, match="shard 3 is damaged") as caught:
            gang.watch(running, lambda: None)
    assert (caught.value.code, caught.value.detail) == ("corrupt_artifact", {"shard": 3})


def test_a_stopped_member_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gangs, "STALL_S", 10.0)
    with Gang.start(Member, 2, Reporter()) as gang:
        gang.watch([m.work.remote(1.5) for m in gang.members], lambda: None)
        running = [m.work.remote(60) for m in gang.members]
        pid = ray.get(gang.members[1].pid.remote())
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost, match="worker 1 has not answered"):
            gang.watch(running, lambda: None)
    wait_until(lambda: not psutil.pid_exists(pid), "the end of the stopped member")


def test_a_gang_waits_for_room_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gangs, "NO_ROOM_S", 1.0)
    first, second = Reporter(), Reporter()
    second.phase("train", total=100, unit="tokens")
    with ThreadPoolExecutor(1) as pool:
        with Gang.start(Member, 2, first):
            waiting = pool.submit(Gang.start, Member, 3, second)
            wait_until(lambda: _last(second).data.get("code") == "no_room", "word of the wait")
        with waiting.result(timeout=60) as gang:
            assert sorted(gang.watch([m.work.remote(0) for m in gang.members], lambda: None)) == [0, 1, 2]
    assert "no room for 3 workers (a core each); it has 3 cores" in _last(second, "waiting").data["message"]
    assert _last(second).data["phase"] == "train"
    assert not any(report.kind == "log" for report in first.after(0))


def test_a_gang_that_waits_for_room_can_be_cancelled() -> None:
    reporter = Reporter()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(Gang.start, Member, 9, reporter)
        reporter.cancel()
        with pytest.raises(Cancelled):
            waiting.result(timeout=60)


def _last(reporter: Reporter, phase: str = "") -> Report:
    """The last progress told, of a phase or of any."""
    told = [each for each in reporter.after(0) if each.kind == "progress"]
    return next(each for each in reversed(told) if phase in ("", each.data["phase"]))
