"""What the CLI writes: tables for people, JSON for programs, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gnomon.errors import GnomonError
from gnomon.events import Logged, StateChanged
from gnomon.resources import ApiKey, Event, HarvestedOn, HarvestResult, Job, Remaining, TrainedOn, TrainResult

_HINTS = {
    "unauthenticated": "set GNOMON_API_KEY; on the service's host, `gnomon keys create` makes a key",
    "forbidden": "this needs a key with another scope; see `gnomon keys list`",
    "job_failed": "see `gnomon logs JOB` for what happened",
}


def out() -> Console:
    """Standard output; wide where nobody looks, so that nothing is cut in a pipe."""
    return Console(width=None if sys.stdout.isatty() else 400, highlight=False)


def plain(value: object) -> str:
    """Text that cannot move a cursor or colour a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns without lines."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(value)) for value in row))
    out().print(table)


def show_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line; pairs without a value are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, ""):
            table.add_row(name, Text(plain(value)))
    out().print(table)


def show_keys(keys: Iterable[ApiKey]) -> None:
    """A table of API keys."""
    show_table(
        ("ID", "NAME", "SCOPES", "CREATED", "EXPIRES", "REVOKED"),
        (
            (k.id, k.name, " ".join(k.scopes), moment(k.created_at), moment(k.expires_at), moment(k.revoked_at))
            for k in keys
        ),
    )


def show_json(value: BaseModel | Sequence[BaseModel]) -> None:
    """One JSON document: an object, or an array."""
    data: Any = (
        value.model_dump(mode="json")
        if isinstance(value, BaseModel)
        else [item.model_dump(mode="json") for item in value]
    )
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_line(text: str) -> None:
    """One line of plain text."""
    out().print(Text(plain(text)), soft_wrap=True)


def show_error(error: Exception) -> None:
    """One line that says what is wrong, and one that says what to do, where there is more to say."""
    console = Console(stderr=True, highlight=False)
    console.print(Text("error: ", style="bold red") + Text(plain(error)), soft_wrap=True)
    hint = _HINTS.get(error.code) if isinstance(error, GnomonError) else None
    if hint:
        console.print(Text("hint: ", style="bold") + Text(hint), soft_wrap=True)


def show_note(text: str) -> None:
    """A remark on standard error, where it does not disturb a pipe."""
    Console(stderr=True, highlight=False).print(Text(plain(text)), soft_wrap=True)


def moment(time: datetime | None) -> str:
    """A time in this machine's zone, to the second."""
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def progress_text(job: Job) -> str:
    """How far a running job is, and what a queued one waits for."""
    if job.state == "queued" and job.queue is not None:
        place = "" if job.queue.position is None else f"place {job.queue.position}: "
        return f"{place}{job.queue.code}"
    if job.progress is None or job.state != "running":
        return ""
    progress = job.progress
    if progress.phase == "waiting":
        return f"waiting: {progress.code}"
    if not progress.total:
        return f"{progress.phase} {progress.done:,} {progress.unit}"
    return f"{progress.phase} {progress.done / progress.total:.0%}"


def ran_on_text(result: object) -> str:
    """What the last attempt at a job ran on, and how fast, where its result says so."""
    match result:
        case TrainResult(run=TrainedOn() as ran):
            return f"{ran.mesh.dp} x {ran.mesh.features} of {ran.device}, {ran.tokens_per_s:,.0f} tokens/s in its steps"
        case HarvestResult(run=HarvestedOn() as ran):
            return f"{ran.n_workers} of {ran.device}"
        case _:
            return ""


def event_text(event: Event) -> str:
    """One line of a job's log."""
    match event.told:
        case StateChanged():
            text = _state_text(event.told)
        case Logged(message=message):
            text = message
        case _:
            text = " ".join(f"{name}={short(value)}" for name, value in event.data.items())
    return f"{moment(event.created_at)}  #{event.attempt}  {event.kind:<10}  {text}"


def _state_text(told: StateChanged) -> str:
    """From what state to which, and why."""
    text = f"{told.before or '-'} -> {told.to}"
    why = ": ".join(part for part in (told.code, told.message) if part)
    again = "" if told.retry_in_s is None else f"; again in {told.retry_in_s:.0f} s"
    return f"{text}  {why}{again}" if why else text


def short(value: object) -> str:
    """A value on one line, with at most six digits of every number that is not whole."""
    match value:
        case float():
            return f"{value:.6g}"
        case Mapping():
            return "{" + ", ".join(f"{name}={short(item)}" for name, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(short, value)) + "]"
        case _:
            return str(value)


def span_text(left: Remaining) -> str:
    """How long something will still take, with its spread where that is worth a word."""
    text = duration(left.expected)
    return text if left.most < 1.25 * left.least else f"{text} ({duration(left.least)} to {duration(left.most)})"


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
