"""A trace of some steps: it is there, it can be read, and it changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnomon.events import EventData, event_json
from gnomon.specs.train import UNTRACED_STEPS
from gnomon_storage.location import Location
from gnomon_workers.parallel.clock import WORK
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.profile import StepProfile
from gnomon_workers.train.run import Training
from tests.support.steps import data, plan_of, step_of

N_STEPS = 16


class MadeUp:
    """Batches that are a function of the step."""

    def batch(self, step: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        rows: np.ndarray[Any, np.dtype[Any]] = data(32, seed=step)[start:stop].numpy()
        return rows


def run(folder: Path, n_traced: int) -> list[tuple[str, dict[str, Any]]]:
    """Train with a trace of n_traced steps; everything that was reported."""
    place = Location.open(f"file://{folder}")
    reports: list[tuple[str, dict[str, Any]]] = []

    def report(told: EventData) -> None:
        reports.append((told.kind, event_json(told)))

    plan = plan_of(token_budget=32 * N_STEPS, log_every=1, checkpoint_every=100)
    train(
        [Training(plan=plan, checkpoints=place.child("checkpoints"), dictionary=place)],
        [step_of(plan)],
        MadeUp(),
        attempt=1,
        observer=Observer(report=report, beat=lambda: None),
        trace=StepProfile(place.child("trace.json.gz"), n_traced, first_step=0, report=report),
    )
    return reports


@pytest.mark.parametrize(("asked", "traced"), [(2, 2), (100, N_STEPS - UNTRACED_STEPS)])
def test_a_trace_is_written_and_the_losses_are_the_same(tmp_path: Path, asked: int, traced: int) -> None:
    reports, plain = run(tmp_path / "traced", asked), run(tmp_path / "plain", 0)
    file = tmp_path / "traced/trace.json.gz"
    said = [data for kind, data in reports if kind == "profile"]
    assert said == [{"url": f"file://{file}", "first_step": UNTRACED_STEPS, "n_steps": traced}]
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::addmm" for event in events) >= traced
    assert not (tmp_path / "plain/trace.json.gz").exists()

    def losses(found: list[tuple[str, dict[str, Any]]]) -> list[float]:
        return [data["loss"] for kind, data in found if kind == "metrics"]

    assert losses(reports) == losses(plain) and len(losses(plain)) == N_STEPS


def test_metrics_say_where_time_and_memory_went(tmp_path: Path) -> None:
    metrics = [data for kind, data in run(tmp_path, 0) if kind == "metrics"]
    for one in metrics:
        assert set(one["times_s"]) == {*WORK, "loader"}
        assert 0 < sum(one["times_s"].values()) <= 1.01 * 32 / one["tokens_per_s"]
        assert all(seconds > 0 for work, seconds in one["times_s"].items() if work != "communication")
        assert one["times_s"]["communication"] == 0
        assert one["peak_memory_bytes"] > 1 << 20
