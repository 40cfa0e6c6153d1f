"""Progress of jobs for people: bars on a terminal, a line per phase elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from gnomon.resources import TERMINAL_STATES, Event, Job

_METRICS = (("fvu", "FVU {:.3f}"), ("dead_fraction", "dead {:.1%}"), ("loss", "loss {:.4g}"), ("l0", "L0 {:.1f}"))


class Display(Protocol):
    """Where the progress of jobs is shown; one job after another."""

    def begin(self, job: Job, /) -> None:
        """A job is watched from now on."""

    def show(self, job: Job, event: Event) -> None:
        """Something happened to it."""

    def end(self, job: Job) -> None:
        """It has ended."""


class Silent:
    """Shows nothing."""

    def begin(self, job: Job) -> None:
        """Nothing."""

    def show(self, job: Job, event: Event) -> None:
        """Nothing."""

    def end(self, job: Job) -> None:
        """Nothing."""


def make_display(progress: bool, console: Console | None = None) -> AbstractContextManager[Display]:
    """Bars if the console (default: standard error) is a terminal, lines if not, or nothing."""
    if not progress:
        return nullcontext(Silent())
    console = console or Console(stderr=True)
    return Bars(console) if console.is_terminal else nullcontext(Lines(console))


class Lines:
    """A line when a job or a phase begins and ends: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._is_told = False

    def begin(self, _: Job, /) -> None:
        """Nothing yet: the job's events tell how it came to where it is."""
        self._phase, self._is_told = "", False

    def show(self, job: Job, event: Event) -> None:
        """Print state changes and the first and last progress of each phase."""
        if event.kind == "state":
            self._is_told = event.data.get("to") in TERMINAL_STATES
            self._print(job, _state_text(event))
        elif event.kind == "progress":
            phase, done, total = _phase(event.data), event.data.get("done"), event.data.get("total")
            if phase != self._phase or (total is not None and done == total):
                self._phase = phase
                self._print(job, f"{phase} {_amount(event.data)}")

    def end(self, job: Job) -> None:
        """Print how it ended, where no event has told, and why it failed."""
        if job.state in TERMINAL_STATES and (job.error or not self._is_told):
            self._print(job, f"{job.state}{_reason(job)}")

    def _print(self, job: Job, text: str) -> None:
        self._console.print(Text(f"{job.kind} {job.id}: {text}"), soft_wrap=True)


class Bars:
    """One bar for each phase of each job, live."""

    def __init__(self, console: Console) -> None:
        self._is_wide = console.width >= 110
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30 if self._is_wide else 12),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="cyan", markup=False),
            console=console,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._waiting: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, job: Job) -> None:
        """Show that the job waits, or that there is nothing to wait for."""
        if job.state in TERMINAL_STATES:
            return
        self._waiting = self._progress.add_task(f"{job.kind}: {job.state}", total=None, amount="", note=job.id)

    def show(self, job: Job, event: Event) -> None:
        """Move the bar of the phase the job is in."""
        if event.kind == "state" and self._waiting is not None:
            self._progress.update(self._waiting, description=f"{job.kind}: {_state_text(event)}")
        elif event.kind == "progress":
            self._advance(job, event.data)
        elif event.kind == "metrics" and (job.id, "train") in self._tasks:
            self._progress.update(self._tasks[job.id, "train"], note=self._metrics_text(event.data))

    def end(self, job: Job) -> None:
        """Complete the bars of a job that succeeded; say how it ended otherwise."""
        self._forget_waiting()
        for (job_id, _), task in self._tasks.items():
            if job_id == job.id and job.state == "succeeded":
                self._finish(task)
        if job.state in TERMINAL_STATES and job.state != "succeeded":
            self._progress.console.print(Text(f"{job.kind} {job.id}: {job.state}{_reason(job)}"))

    def _advance(self, job: Job, data: dict[str, Any]) -> None:
        self._forget_waiting()
        phase, total = _phase(data, job.kind), data.get("total")
        key = (job.id, phase)
        if key not in self._tasks:
            for task in self._tasks.values():  # phases follow one another
                self._finish(task)
            self._tasks[key] = self._progress.add_task(phase, total=total, amount="", note="")
        amount = _amount(data, _short)
        self._progress.update(self._tasks[key], completed=data.get("done", 0), total=total, amount=amount)

    def _metrics_text(self, data: dict[str, Any]) -> str:
        shown = _METRICS if self._is_wide else _METRICS[:2]
        values = [text.format(data[name]) for name, text in shown if isinstance(data.get(name), int | float)]
        return "  ".join([f"{data['variant']}:", *values] if data.get("variant") else values)

    def _finish(self, task: TaskID) -> None:
        total = self._progress.tasks[self._progress.task_ids.index(task)].total
        self._progress.update(task, total=total or 1, completed=total or 1)

    def _forget_waiting(self) -> None:
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None


def _phase(data: dict[str, Any], default: str = "") -> str:
    """The phase, and of which of several variants."""
    phase = str(data.get("phase", default))
    return f"{phase} {data['variant']}" if data.get("variant") else phase


def _amount(data: dict[str, Any], number: Callable[[float], str] = "{:,.0f}".format) -> str:
    total, unit, rate = data.get("total"), data.get("unit", "tokens"), data.get("rate")
    done = number(data.get("done", 0))
    text = f"{done} {unit}" if total is None else f"{done}/{number(total)} {unit}"
    return text if rate is None else f"{text}, {number(rate)}/s"


def _short(count: float) -> str:
    """A count in at most five characters: 9,999, 316k, 1.16M, 2.30G."""
    for size, suffix, digits in ((1e9, "G", 2), (1e6, "M", 2), (1e4, "k", 0)):
        if count >= size:
            return f"{count / (1e3 if suffix == 'k' else size):.{digits}f}{suffix}"
    return f"{count:,.0f}"


def _state_text(event: Event) -> str:
    attempt = f" (attempt {event.attempt})" if event.attempt > 1 else ""
    return f"{event.data.get('to', '')}{attempt}"


def _reason(job: Job) -> str:
    return f": {job.error.message}" if job.error else ""
