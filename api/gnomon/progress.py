"""Progress of jobs for people: bars on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from gnomon.events import TERMINAL_STATES, Progressed, StateChanged, TrainingMeasured
from gnomon.resources import Event, Job

LINE_S: Final = 10.0
"""Between two lines of one phase."""


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
    """A line when a job or a phase begins and ends, and some between: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._is_full = False
        self._printed_at = 0.0
        self._is_told = False

    def begin(self, _: Job, /) -> None:
        """Nothing yet: the job's events tell how it came to where it is."""
        self._phase, self._is_told = "", False

    def show(self, job: Job, event: Event) -> None:
        """Print state changes, and of each phase the first progress, the last, and one every LINE_S."""
        told = event.told
        if isinstance(told, StateChanged):
            self._is_told = told.to in TERMINAL_STATES
            self._print(job, _state_text(event, told))
        elif isinstance(told, Progressed) and self._is_due(told):
            self._print(job, f"{_phase(told)} {_amount(told)}")

    def _is_due(self, told: Progressed) -> bool:
        """Whether there is to be a line: not twice for a phase that is complete."""
        now, is_full = time.monotonic(), told.total is not None and told.done >= told.total
        is_pause_over = now - self._printed_at >= LINE_S
        if _phase(told) == self._phase and (self._is_full or not (is_full or is_pause_over)):
            return False
        self._phase, self._is_full, self._printed_at = _phase(told), is_full, now
        return True

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
        told = event.told
        if isinstance(told, StateChanged) and self._waiting is not None:
            self._progress.update(self._waiting, description=f"{job.kind}: {_state_text(event, told)}")
        elif isinstance(told, Progressed):
            self._advance(job, told)
        elif isinstance(told, TrainingMeasured) and (job.id, "train") in self._tasks:
            self._progress.update(self._tasks[job.id, "train"], note=self._metrics_text(told))

    def end(self, job: Job) -> None:
        """Complete the bars of a job that succeeded; say how it ended otherwise."""
        self._forget_waiting()
        for (job_id, _), task in self._tasks.items():
            if job_id == job.id and job.state == "succeeded":
                self._finish(task)
        if job.state in TERMINAL_STATES and job.state != "succeeded":
            self._progress.console.print(Text(f"{job.kind} {job.id}: {job.state}{_reason(job)}"))

    def _advance(self, job: Job, told: Progressed) -> None:
        self._forget_waiting()
        key = (job.id, _phase(told))
        if key not in self._tasks:
            for task in self._tasks.values():  # phases follow one another
                self._finish(task)
            self._tasks[key] = self._progress.add_task(key[1], total=told.total, amount="", note="")
        amount = _amount(told, _short)
        self._progress.update(self._tasks[key], completed=told.done, total=told.total, amount=amount)

    def _metrics_text(self, told: TrainingMeasured) -> str:
        numbers = (told.fvu, told.dead_fraction, told.loss, told.l0)
        texts = ("FVU {:.3f}", "dead {:.1%}", "loss {:.4g}", "L0 {:.1f}")
        n_shown = 4 if self._is_wide else 2
        shown = list(zip(texts, numbers, strict=True))[:n_shown]
        values = [text.format(number) for text, number in shown if number is not None]
        return "  ".join([f"{told.variant}:", *values] if told.variant else values)

    def _finish(self, task: TaskID) -> None:
        total = self._progress.tasks[self._progress.task_ids.index(task)].total
        self._progress.update(task, total=total or 1, completed=total or 1)

    def _forget_waiting(self) -> None:
        if self._waiting is not None:
            self._progress.remove_task(self._waiting)
            self._waiting = None


def _phase(told: Progressed) -> str:
    """The phase, and of which of several variants."""
    return f"{told.phase} {told.variant}" if told.variant else told.phase


def _amount(told: Progressed, number: Callable[[float], str] = "{:,.0f}".format) -> str:
    done = number(told.done)
    text = f"{done} {told.unit}" if told.total is None else f"{done}/{number(told.total)} {told.unit}"
    return text if told.rate is None else f"{text}, {number(told.rate)}/s"


def _short(count: float) -> str:
    """A count in at most five characters: 9,999, 316k, 1.16M, 2.30G."""
    for size, suffix, digits in ((1e9, "G", 2), (1e6, "M", 2), (1e4, "k", 0)):
        if count >= size:
            return f"{count / (1e3 if suffix == 'k' else size):.{digits}f}{suffix}"
    return f"{count:,.0f}"


def _state_text(event: Event, told: StateChanged) -> str:
    attempt = f" (attempt {event.attempt})" if event.attempt > 1 else ""
    return f"{told.to}{attempt}"


def _reason(job: Job) -> str:
    return f": {job.error.message}" if job.error else ""
