"""The reporter: numbered reports, kept until asked for, and not too many of them."""

from __future__ import annotations

import pytest

from gnomon.events import Logged
from gnomon_workers.runtime.reporting import Cancelled, Reporter


def test_reports_are_numbered_and_given_again() -> None:
    reporter = Reporter()
    reporter.report(Logged(message="a"))
    reporter.report(Logged(message="b"))
    assert [(r.seq, r.data["message"]) for r in reporter.after(0)] == [(1, "a"), (2, "b")]
    assert [r.seq for r in reporter.after(1)] == [2]
    assert len(reporter.after(0)) == 2


def test_a_day_of_progress_is_some_thousand_reports_and_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter()
    now = 0.0
    monkeypatch.setattr("gnomon_workers.runtime.reporting.time.monotonic", lambda: now)
    reporter.phase("train", total=172_800, unit="tokens")
    for done in range(1, 172_801):
        now = done / 2
        reporter.progress(done)
    seen = [r.data["done"] for r in reporter.after(0) if r.kind == "progress"]
    assert seen[:3] == [0, 1, 2] and seen[-1] == 172_800
    assert 5_000 < len(seen) < 10_000


def test_cancelling_is_noticed_at_the_next_check() -> None:
    reporter = Reporter()
    reporter.check_cancelled()
    reporter.cancel()
    with pytest.raises(Cancelled):
        reporter.check_cancelled()


def test_what_is_acknowledged_is_forgotten_and_numbers_go_on() -> None:
    reporter = Reporter()
    for number in range(1, 1001):
        reporter.report(Logged(message=str(number)))
        reporter.acknowledge(number - 3)
        assert len(reporter.after(0)) <= 3
    assert [r.seq for r in reporter.after(997)] == [998, 999, 1000]
    reporter.acknowledge(990)  # of a dispatcher that was replaced: an answer that came late
    reporter.acknowledge(998)
    assert [r.seq for r in reporter.after(998)] == [r.seq for r in reporter.after(0)] == [999, 1000]
    reporter.acknowledge(5000)
    reporter.report(Logged(message="the last"))
    assert [r.seq for r in reporter.after(1000)] == [1001]
