"""Following a job over broken connections, and what waiting for it amounts to."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import stamina
from rich.console import Console

from gnomon import errors
from gnomon._sse import PATIENCE_S, Deadline, EventCursor, SseDecoder
from gnomon.async_client import AsyncClient
from gnomon.progress import Bars, Lines, make_display
from gnomon.resources import Event, HarvestResult, Job
from tests.support.sdk_server import (
    HARVEST,
    HARVEST_RESULT,
    JOB_ID,
    KEY,
    URL,
    Script,
    answer,
    client_of,
    event,
    job,
    problem,
    sse,
)

FIRST = "job_" + "1" * 26
DONE = event(4, "state", **{"from": "running", "to": "succeeded"})
SUCCEEDED = job(state="succeeded", result=HARVEST_RESULT)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither repeats nor reconnects wait."""

    async def no_sleep(_: float) -> None:
        return None

    stamina.set_testing(True, attempts=2)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    yield
    stamina.set_testing(False)


def test_decoder_joins_data_lines_and_skips_comments() -> None:
    decoder = SseDecoder()
    lines = [": hello", "", "event: x", "id: 1", "data: {", "data:}", "retry: 5", "", ""]
    assert [data for line in lines if (data := decoder.feed(line)) is not None] == ["{\n}"]


def test_follow_reconnects_after_the_last_event_seen() -> None:
    script = Script(
        sse(event(1), event(2), error=httpx2.ReadError("reset")),
        httpx2.ConnectError("restarting"),
        sse(event(2), event(3), DONE),
    )
    found = list(client_of(script).events(JOB_ID, follow=True))
    assert [e.id for e in found] == [1, 2, 3, 4]
    assert [request.headers["Last-Event-ID"] for request in script.requests] == ["0", "2", "2"]
    assert all(request.headers["Accept"] == "text/event-stream" for request in script.requests)


def test_follow_of_a_job_with_nothing_more_to_tell_ends() -> None:
    script = Script(sse(), answer(SUCCEEDED))
    assert list(client_of(script).events(JOB_ID, after=4, follow=True)) == []


def test_follow_goes_on_when_the_server_closes_the_stream_of_a_running_job() -> None:
    script = Script(sse(), answer(job(state="running")), sse(DONE))
    assert len(list(client_of(script).events(JOB_ID, follow=True))) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_follow_of_what_is_not_there_is_an_error(status: int) -> None:
    script = Script(problem(status, "no", "no"))
    with pytest.raises(errors.GnomonError):
        list(client_of(script).events(JOB_ID, follow=True))


def test_follower_gives_up_on_a_server_that_stays_away() -> None:
    now = 0.0
    cursor = EventCursor(job_id=JOB_ID, deadline=Deadline(clock=lambda: now))
    lost = errors.Unavailable("gone")
    cursor.disconnected(lost)
    now = PATIENCE_S - 1
    cursor.disconnected(lost)
    cursor.feed(": ping")
    now = 2 * PATIENCE_S
    cursor.disconnected(lost)
    now = 3 * PATIENCE_S
    with pytest.raises(errors.Unavailable, match="gone"):
        cursor.disconnected(lost)


def test_unreadable_event_is_an_error_of_ours() -> None:
    bad = httpx2.Response(200, text="data: {}\n\n")
    with pytest.raises(errors.GnomonError, match="unreadable"):
        list(client_of(Script(bad)).events(JOB_ID, follow=True))


def test_wait_returns_the_typed_result() -> None:
    script = Script(answer(job(), 201), answer(job()), sse(event(1), DONE), answer(SUCCEEDED))
    result = client_of(script).submit(HARVEST).wait()
    assert result == HarvestResult.read(HARVEST_RESULT)
    assert script.is_over


def test_wait_for_a_failed_job_raises_with_the_reason_of_the_service() -> None:
    failed = job(state="failed", error={"code": "empty_corpus", "message": "no text in 'a.txt'"})
    with pytest.raises(errors.JobFailed, match=r"no text in 'a\.txt'") as caught:
        client_of(Script(answer(failed), answer(failed))).job(JOB_ID).wait()
    assert caught.value.code == "empty_corpus"


def test_wait_for_a_cancelled_job_says_so() -> None:
    cancelled = job(state="cancelled")
    with pytest.raises(errors.JobFailed, match="was cancelled"):
        client_of(Script(answer(cancelled), answer(cancelled))).job(JOB_ID).wait()


def test_result_of_a_running_job_is_not_there_yet() -> None:
    with pytest.raises(errors.Conflict, match="is running"):
        _ = client_of(Script(answer(job(state="running")))).job(JOB_ID).result


def test_wait_shows_what_the_job_depends_on_first() -> None:
    waiting = job(depends_on=[FIRST])
    script = Script(
        answer(waiting),
        answer(waiting),
        answer(job(id=FIRST, state="running")),
        answer(waiting),
        sse(event(1, job_id=FIRST), event(2, "state", job_id=FIRST, to="succeeded")),
        answer(job(id=FIRST, state="succeeded", result=HARVEST_RESULT)),
        sse(DONE),
        answer(SUCCEEDED),
    )
    client_of(script).job(JOB_ID).wait()
    paths = [request.url.path.split("/")[3] for request in script.requests]
    assert paths == [JOB_ID, JOB_ID, FIRST, JOB_ID, FIRST, FIRST, JOB_ID, JOB_ID]


def test_wait_does_not_stay_with_a_dependency_when_the_job_itself_has_ended() -> None:
    waiting, running = job(depends_on=[FIRST]), job(id=FIRST, state="running")
    cancelled = answer(job(depends_on=[FIRST], state="cancelled"))
    script = Script(*map(answer, [waiting, waiting, running, waiting, running]), cancelled)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(errors.JobFailed, match="was cancelled"):
        patch.setattr("gnomon.client.GLANCE_S", 0.0)
        client_of(script).job(JOB_ID).wait()
    assert script.is_over


def test_glance_ends_at_a_silence_which_does_not_count_as_a_lost_server() -> None:
    now = 0.0
    cursor = EventCursor(job_id=JOB_ID, deadline=Deadline(clock=lambda: now), glance_s=5.0)
    for _ in range(100):
        cursor.begin()
        assert not cursor.is_over()
        assert cursor.read_timeout_s == 5.0
        now += 5.0
        assert cursor.is_over()
        cursor.disconnected(errors.Unavailable("silence", code="timeout"))
    assert now > PATIENCE_S


def test_wait_ends_at_its_time_limit_and_the_job_goes_on() -> None:
    script = Script(answer(job()), answer(job()), sse(event(1)))
    with pytest.raises(TimeoutError, match="goes on"):
        client_of(script).job(JOB_ID).wait(timeout_s=0)


def test_async_wait_does_the_same() -> None:
    async def run() -> None:
        script = Script(
            answer(job()),
            answer(job()),
            sse(event(1), error=httpx2.ReadError("reset")),
            sse(event(2), DONE),
            answer(SUCCEEDED),
        )
        async with AsyncClient(URL, KEY, transport=script.transport) as client:
            handle = await client.job(JOB_ID)
            assert isinstance(await handle.wait(), HarvestResult)
        assert script.is_over

    asyncio.run(run())


def console(*, terminal: bool) -> Console:
    """A console that keeps what it shows."""
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def text_of(console: Console) -> str:
    """What a console showed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(display: Any) -> None:
    """A training run in a few events."""
    running = Job.read(job(state="running", kind="train"))
    display.begin(running)
    story: list[tuple[str, dict[str, Any]]] = [
        ("state", {"from": "scheduled", "to": "running"}),
        ("progress", {"phase": "train", "done": 0, "total": 10, "unit": "steps"}),
        ("progress", {"phase": "train", "done": 10, "total": 10, "unit": "steps", "rate": 5.0}),
        ("metrics", {"step": 10, "loss": 0.25, "fvu": 0.2, "l0": 32.0, "dead_fraction": 0.01}),
        ("progress", {"phase": "evaluate", "done": 5, "total": None, "unit": "tokens"}),
        ("log", {"message": "[bold]not markup[/bold]"}),
    ]
    for number, (kind, data) in enumerate(story):
        display.show(running, Event.read(event(number + 1, kind, **data)))
    display.end(Job.read(SUCCEEDED | {"kind": "train"}))


def test_bars_show_every_phase_and_the_metrics() -> None:
    screen = console(terminal=True)
    with make_display(True, screen) as display:
        assert isinstance(display, Bars)
        play(display)
    shown = text_of(screen)
    assert "10/10 steps, 5/s" in shown
    assert "loss 0.25" in shown
    assert "FVU 0.200" in shown
    assert "evaluate" in shown


def test_lines_come_now_and_then_and_a_complete_phase_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase of a quarter of an hour is not silent where no one can see a bar, nor does it flood a log."""
    now, screen = 1000.0, console(terminal=False)
    monkeypatch.setattr("gnomon.progress.time.monotonic", lambda: now)
    running = Job.read(job(state="running", kind="train"))
    with make_display(True, screen) as display:
        display.begin(running)
        for phase in ("harvest", "train"):
            for done in [*range(101), 100, 100]:
                now += 0.5
                told = {"phase": phase, "done": done, "total": 100, "unit": "tokens"}
                display.show(running, Event.read(event(1, "progress", **told)))
    lines = text_of(screen).splitlines()
    assert len(lines) == 2 * (1 + 5)  # of 50 s each: the first, one every 10 s; the last of these is complete
    assert [line.split(": ")[1] for line in lines[4:7]] == [
        "harvest 80/100 tokens", "harvest 100/100 tokens", "train 0/100 tokens",
    ]  # fmt: skip


def test_bars_say_which_variant_is_meant() -> None:
    screen = console(terminal=True)
    running = Job.read(job(state="running", kind="train"))
    story: list[tuple[str, dict[str, Any]]] = [
        ("progress", {"phase": "train", "done": 1, "total": 10}),
        ("metrics", {"variant": "k8", "step": 10, "fvu": 0.2}),
        ("progress", {"phase": "evaluate", "variant": "k8", "done": 1, "total": 10}),
        ("progress", {"phase": "evaluate", "variant": "k4", "done": 1, "total": 10}),
    ]
    with make_display(True, screen) as display:
        for number, (kind, data) in enumerate(story):
            display.show(running, Event.read(event(number + 1, kind, **data)))
    shown = text_of(screen)
    assert all(text in shown for text in ("k8:  FVU 0.200", "evaluate k8", "evaluate k4"))


def test_bars_fit_a_narrow_terminal() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    running = Job.read(job(state="running", kind="train"))
    numbers: dict[str, Any] = {"phase": "train", "done": 875_520, "total": 1_159_168, "unit": "tokens", "rate": 5830.0}
    with make_display(True, screen) as display:
        display.show(running, Event.read(event(1, "progress", **numbers)))
        display.show(running, Event.read(event(2, "metrics", step=1, fvu=0.187, dead_fraction=0.002, loss=0.08)))
    assert "876k/1.16M tokens, 5,830/s" in text_of(screen)
    assert "FVU 0.187  dead 0.2%" in text_of(screen)
    assert "\u2026" not in text_of(screen)


def test_lines_show_the_same_without_control_characters() -> None:
    screen = console(terminal=False)
    with make_display(True, screen) as display:
        assert isinstance(display, Lines)
        play(display)
    shown = text_of(screen)
    assert "\x1b" not in shown
    assert "train 0/10 steps" in shown
    assert "train 10/10 steps, 5/s" in shown
    assert shown.rstrip().endswith("succeeded")


@pytest.mark.parametrize("terminal", [True, False])
def test_failure_is_shown_with_its_reason(terminal: bool) -> None:
    screen = console(terminal=terminal)
    failed = job(state="failed", error={"code": "x", "message": "the store [act_1] is damaged"})
    with make_display(True, screen) as display:
        display.begin(Job.read(job(state="running")))
        display.end(Job.read(failed))
    assert "the store [act_1] is damaged" in text_of(screen)


def test_nothing_is_shown_unless_asked_for() -> None:
    screen = console(terminal=True)
    with make_display(False, screen) as display:
        play(display)
    assert text_of(screen) == ""
