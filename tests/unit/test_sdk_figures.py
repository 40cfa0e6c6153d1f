"""Figures show the numbers they are given."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from gnomon.errors import NotFound
from gnomon.events import TrainingMeasured, event_json
from gnomon.figures import alignment_histogram, density_histogram, training_curves
from gnomon.metrics import DensityHistogram, DictionaryMetrics, Histogram
from gnomon.resources import Event
from tests.support.metrics import make_alignment


def metrics_event(number: int, step: int, fvu: float) -> Event:
    """A metrics event."""
    told = TrainingMeasured(
        step=step, tokens=step, loss=fvu, objective=fvu, fvu=fvu, explained_variance=1 - fvu, l0=32.0,
        dead_fraction=0.0, lr=1e-3, grad_norm=1.0, alignment_min=1.0,
    )  # fmt: skip
    data = event_json(told)
    return Event(id=number, job_id="j", attempt=1, kind="metrics", created_at=datetime.now(UTC), data=data)


@pytest.mark.parametrize("block", ["import gnomon.figures", "import gnomon; gnomon.load('x')"])
def test_what_is_missing_is_named_with_what_to_install(block: str) -> None:
    hidden = "import sys\nfor name in ('plotly', 'torch', 'safetensors'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", hidden + block], capture_output=True, text=True)
    extra = "viz" if "figures" in block else "torch"
    assert f"in your checkout of Gnomon, pip install '.[{extra}]'" in done.stderr.splitlines()[-1]


def test_histograms_show_every_bin() -> None:
    metrics = DictionaryMetrics(
        alignment=make_alignment(histogram=Histogram(edges=(0.0, 0.5, 1.0), counts=(3, 5))),
        density_histogram=DensityHistogram(log10_edges=(-2.0, -1.5, -1.0), counts=(1, 2)),
    )
    assert list(alignment_histogram(metrics).data[0].y) == [3, 5]
    assert list(density_histogram(metrics).data[0].x) == [-2.0, -1.5]


def test_curves_draw_a_repeated_step_once() -> None:
    figure = training_curves([metrics_event(1, 10, 0.5), metrics_event(2, 20, 0.4), metrics_event(3, 20, 0.4)])
    assert len(figure.data) == 4
    assert list(figure.data[0].x) == [10, 20] and list(figure.data[0].y) == [0.5, 0.4]


def test_curves_of_variants_are_told_apart() -> None:
    events = [metrics_event(number, 10 * (number // 2), number / 10) for number in range(2, 6)]
    for event in events:
        event.data["variant"] = "k8" if event.id % 2 else "transcoder"
    figure = training_curves(events)
    assert [(line.name, list(line.y)) for line in figure.data[::4]] == [("transcoder", [0.2, 0.4]), ("k8", [0.3, 0.5])]
    assert figure.layout.showlegend and len({line.line.color for line in figure.data}) == 2


def test_a_curve_that_a_variant_does_not_have_is_left_out() -> None:
    event = metrics_event(1, 10, 0.5)
    del event.data["alignment_min"]  # a transcoder's
    assert list(training_curves([event]).data[3].y) == [None]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(NotFound, match="density_histogram"):
        density_histogram(DictionaryMetrics())
    with pytest.raises(NotFound, match="no metrics"):
        training_curves([])
