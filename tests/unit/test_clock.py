"""The clock of a step's parts on a GPU: the device's own, read in time, and of bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from gnomon_workers.parallel import clock as clocks
from gnomon_workers.parallel.clock import StepClock


@dataclass(slots=True)
class Device:
    """A device without a GPU: every event is one second after the one before."""

    now_s: int = 0
    n_alive: int = 0

    def event(self, *, enable_timing: bool) -> Event:
        assert enable_timing
        self.n_alive += 1
        return Event(self)


@dataclass(slots=True)
class Event:
    """What `torch.cuda.Event` is to the clock."""

    device: Device
    at_s: int = field(default=-1)

    def record(self) -> None:
        self.device.now_s += 1
        self.at_s = self.device.now_s

    def synchronize(self) -> None:
        assert self.at_s >= 0

    def elapsed_time(self, later: Event) -> float:
        return 1000.0 * (later.at_s - self.at_s)

    def __del__(self) -> None:
        self.device.n_alive -= 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The machine that runs the tests may have no GPU, and what is tested is the book-keeping."""
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(clocks, "MAX_EVENTS", 64)
    return device


@pytest.mark.parametrize("n_steps", [0, 1, 15, 16, 17, 1000])
def test_a_clock_that_is_not_read_holds_few_events_and_misses_nothing(device: Device, n_steps: int) -> None:
    clock = StepClock(on_gpu=True)
    for _ in range(n_steps):
        with clock.section("gemm"), clock.section("selection"):
            assert device.n_alive <= 64
    # of four events a second apart: gemm, selection, gemm, and what lies between steps
    assert clock.lap() == {
        "gemm": 2.0 * n_steps,
        "selection": 1.0 * n_steps,
        "sparse": 0.0,
        "optimizer": 0.0,
        "communication": 0.0,
    }
    assert device.n_alive == 0


def test_laps_do_not_run_into_each_other(device: Device) -> None:
    clock = StepClock(on_gpu=True)
    for _ in range(3):
        with clock.section("sparse"):
            pass
        assert clock.lap()["sparse"] == 1.0
