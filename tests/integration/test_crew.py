"""Crews on a real Ray of two machines: whoever is lost is replaced, and nobody else notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from gnomon_workers.runtime import gang as gangs
from gnomon_workers.runtime.answers import answers
from gnomon_workers.runtime.crew import Crew
from gnomon_workers.runtime.gang import Gang
from gnomon_workers.runtime.reporting import Cancelled, Reporter, WorkerLost
from tests.support.rays import TwoMachines, two_machines
from tests.support.waiting import wait_until


class Sharer:
    """Does its share once there is a file named `go`, and leaves a note of every beginning."""

    def __init__(self, index: int) -> None:
        self.index = index

    def beat(self) -> int:
        return 1

    @answers
    def share(self, folder: str) -> tuple[int, int]:
        place = Path(folder)
        (place / f"{self.index}-{os.getpid()}").touch()
        while not (place / "go").exists():
            time.sleep(0.02)
        return self.index, os.getpid()

    @answers
    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def machines() -> Iterator[TwoMachines]:
    with two_machines() as machines:
        yield machines


class Sharing(threading.Thread):
    """A crew of two that shares work out in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.reporter = folder, Reporter()
        self.values: list[Any] = []
        self.start()

    def run(self) -> None:
        with Gang.start(Sharer, 2, self.reporter) as gang:
            crew = Crew(gang, self.reporter)
            self.values = crew.share_out(
                lambda member: member.share.remote(str(self.folder)), self.reporter.check_cancelled, every_s=0.1
            )

    def begun(self, index: int) -> list[int]:
        """Processes that have begun a share, in no order."""
        return [int(path.name.split("-")[1]) for path in self.folder.glob(f"{index}-*")]

    def finish(self) -> list[Any]:
        """Let all go on to the end."""
        (self.folder / "go").touch()
        wait_until(lambda: not self.is_alive(), "the end of the crew")
        return self.values

    def said(self, words: str) -> list[str]:
        """Warnings with these words."""
        logs = [report.data["message"] for report in self.reporter.after(0) if report.kind == "log"]
        return [message for message in logs if words in message]


def test_a_lost_share_is_begun_again_and_the_other_goes_on(machines: TwoMachines, tmp_path: Path) -> None:
    sharing = Sharing(tmp_path)
    wait_until(lambda: sharing.begun(0) and sharing.begun(1), "both shares")
    (victim,), (other,) = sharing.begun(1), sharing.begun(0)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: len(sharing.begun(1)) == 2, "the second beginning")
    (second,) = set(sharing.begun(1)) - {victim}
    assert sharing.finish() == [(0, other), (1, second)]
    assert sharing.begun(0) == [other]
    assert len(sharing.said("worker 1 is replaced, and its share begun again: a worker died")) == 1
    assert not sharing.said("waiting")


def test_a_share_that_kills_whoever_does_it_is_a_loss(machines: TwoMachines) -> None:
    reporter = Reporter()
    with Gang.start(Sharer, 1, reporter) as gang, pytest.raises(WorkerLost, match="worker 0 was lost 3 times"):
        Crew(gang, reporter).share_out(lambda member: member.die.remote(), reporter.check_cancelled, every_s=0.1)


def test_where_there_is_no_room_for_another_it_is_waited_for(
    machines: TwoMachines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gangs, "NO_ROOM_S", 1.0)
    monkeypatch.setattr(gangs, "START_S", 15.0)  # a machine that is awaited is no silent member
    sharing = Sharing(tmp_path)
    wait_until(lambda: sharing.begun(0) and sharing.begun(1), "both shares")
    machines.lose_second()
    wait_until(lambda: sharing.said("is replaced"), "the loss")
    wait_until(lambda: sharing.said("waiting (no_room): the cluster has no room for 1 worker"), "word of the wait")
    time.sleep(gangs.START_S)
    machines.add_second()
    wait_until(lambda: len(sharing.begun(0)) + len(sharing.begun(1)) == 3, "the replacement")
    values = sharing.finish()
    assert [index for index, _ in values] == [0, 1]
    assert len(sharing.begun(0)) + len(sharing.begun(1)) == 3


def test_waiting_for_a_replacement_can_be_cancelled(machines: TwoMachines, tmp_path: Path) -> None:
    reporter = Reporter()
    with Gang.start(Sharer, 2, reporter) as gang:
        machines.lose_second()
        reporter.cancel()
        with pytest.raises(Cancelled):
            Crew(gang, reporter).share_out(
                lambda member: member.share.remote(str(tmp_path)), reporter.check_cancelled, every_s=0.1
            )
    machines.add_second()
    assert ray.is_initialized()
