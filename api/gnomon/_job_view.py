"""A job as the CLI shows it to people: what it is, how it is, and what it measured, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gnomon._results import JobResult, read_result
from gnomon._screen import moment, progress_text, ran_on_text, short, show_pairs, show_table, span_text
from gnomon.metrics import DictionaryMetrics
from gnomon.resources import EvaluateResult, Job, TrainResult, UnknownResult


def job_name(job: Job) -> str:
    """Its label; of a harvest without one, whom it is for."""
    return job.name or (f"for {job.made_for}" if job.made_for else "")


def show_job(job: Job) -> None:
    """Everything that is known of a job, but for its spec; of what it measured, the gist."""
    made = read_result(job) if job.result else None
    show_pairs([*_pairs(job), *_result_pairs(made)])
    variants = made.dictionaries if isinstance(made, TrainResult) else {}
    if variants:
        show_table(
            ("VARIANT", "DICTIONARY", "FVU", "L0", "DEAD"),
            ((name, each.dictionary_id, *_columns(each.metrics)) for name, each in variants.items()),
        )


def number(value: float | None) -> str:
    """A number in a table."""
    return "" if value is None else f"{value:.4f}"


def _pairs(job: Job) -> list[tuple[str, object]]:
    return [
        ("id", job.id),
        ("name", job_name(job)),
        ("kind", job.kind),
        ("state", job.state),
        ("class", f"{job.job_class}, priority {job.priority}"),
        ("queue", _queue_text(job)),
        ("runs on", _devices_text(job)),
        ("attempt", job.attempt),
        ("losses", f"{job.n_losses} in a row, of at most {job.max_attempts}" if job.n_losses else None),
        ("created", moment(job.created_at)),
        ("started", moment(job.started_at)),
        ("finished", moment(job.finished_at)),
        ("waits for" if job.state == "queued" else "made from", ", ".join(job.depends_on)),
        ("progress", progress_text(job) if job.state == "running" else None),
        ("error", f"{job.error.message} ({job.error.code})" if job.error else None),
    ]


def _queue_text(job: Job) -> str | None:
    if job.queue is None:
        return job.leave_why and f"asked to leave: {job.leave_why}"
    place = "" if job.queue.position is None else f"place {job.queue.position}: "
    return f"{place}{job.queue.message}"


def _devices_text(job: Job) -> str | None:
    if not job.n_devices:
        return None
    mesh = "" if job.mesh is None else f", mesh {job.mesh[0]} x {job.mesh[1]}"
    left = "" if job.remaining_s is None else f"; {span_text(job.remaining_s)} left of this phase"
    return f"{job.n_devices} device{'s' if job.n_devices > 1 else ''}{mesh}{left}"


def _result_pairs(made: JobResult | None) -> Iterator[tuple[str, object]]:
    """What a job left, by name; a model that knows its own gist is asked for it."""
    if made is None:
        return
    fields: dict[str, Any] = made.fields if isinstance(made, UnknownResult) else dict(made)
    has_variants = isinstance(made, TrainResult) and bool(made.dictionaries)
    # those of the first variant are in the table, too
    hidden = {"metrics", "dictionaries", "run"} | ({"dictionary_id"} if has_variants else set())
    yield from (
        (name, short(value)) for name, value in fields.items() if name not in hidden and value not in (None, ())
    )
    yield "ran on", ran_on_text(made)
    if isinstance(made, TrainResult | EvaluateResult) and not has_variants:
        yield from ((name, short(value)) for name, value in made.metrics.known().items())


def _columns(metrics: DictionaryMetrics) -> tuple[str, ...]:
    return number(metrics.fvu), number(metrics.l0), number(metrics.dead_fraction)
