"""A train job, as its supervisor runs it: check, train, evaluate, export, publish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from gnomon.errors import GnomonError
from gnomon.resources import TrainResult
from gnomon_workers.export import published
from gnomon_workers.gang import Gang, lost_as_such
from gnomon_workers.protocol import Assignment, Report
from gnomon_workers.reporting import Reporter
from gnomon_workers.train.checkpoints import Checkpoint, committed_checkpoints, latest_checkpoint
from gnomon_workers.train.publish import export
from gnomon_workers.train.rank import RankTask, TrainRank
from gnomon_workers.train.run import TrainRun, resolve


def run_train(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
    """Train, evaluate and publish; every part that an earlier attempt finished is kept."""
    run = resolve(assignment)
    record = published(run.dictionary)
    if record is None:
        checkpoint, tokens_per_s = train_gang(run, reporter)
        record = export(run, reporter, checkpoint, tokens_per_s=tokens_per_s)
    result = TrainResult(
        dictionary_id=assignment.dictionary_id or "",
        store_id=assignment.store_id,
        n_steps=run.plan.n_steps,
        metrics=record["metrics"],
    )
    return {**result.model_dump(mode="json"), "record": record}


def train_gang(run: TrainRun, reporter: Reporter) -> tuple[Checkpoint, float | None]:
    """Train from the last whole checkpoint to the end; returns the final one, and this attempt's tokens/s."""
    plan = run.plan
    reporter.phase("train", total=plan.n_steps * plan.batch_size, unit="tokens")
    resume, damaged = latest_checkpoint(run.checkpoints)
    for message in damaged:
        reporter.report("log", level="warning", message=message)
    if resume is not None:
        reporter.report("log", level="info", message=f"resuming from step {resume.step} of attempt {resume.attempt}")
        if resume.step >= plan.n_steps:
            return resume, None
    task = RankTask(
        plan=plan,
        attempt=run.assignment.attempt,
        hook_name=run.hook_name,
        store=run.store.location.url,
        checkpoints=run.checkpoints.url,
        resume=resume,
    )
    began = time.monotonic()
    with Gang.start(TrainRank, plan.dp * plan.features, use_gpu=bool(ray.cluster_resources().get("GPU"))) as gang:
        _drive(gang, task, reporter)
    n_steps = plan.n_steps - (resume.step if resume else 0)
    return next(committed_checkpoints(run.checkpoints)), n_steps * plan.batch_size / (time.monotonic() - began)


def _drive(gang: Gang, task: RankTask, reporter: Reporter) -> None:
    """Run the gang's ranks to the end, passing on what rank 0 says."""
    with lost_as_such():
        address: str = ray.get(gang.members[0].address.remote())
    running = [member.run.remote(task, address) for member in gang.members]
    forward = _Forwarder(gang.members[0], reporter)
    errors = [error for error in gang.watch(running, forward) if error]
    forward.finish()
    if errors:
        raise GnomonError(errors[0]["message"], code=errors[0]["code"])


class _Forwarder:
    """Passes rank 0's reports on, asking again only when the last question is answered."""

    def __init__(self, rank: Any, reporter: Reporter) -> None:
        self._rank = rank
        self._reporter = reporter
        self._seq = 0
        self._asked: Any = rank.reports.remote(0)

    def __call__(self) -> None:
        self._reporter.check_cancelled()
        if ray.wait([self._asked], timeout=0)[0]:
            self._pass_on()

    def finish(self) -> None:
        """Pass on the rest: the answer under way may have been given before the rank's last word."""
        self._pass_on()
        self._pass_on()

    def _pass_on(self) -> None:
        with lost_as_such():
            reports: tuple[Report, ...] = ray.get(self._asked)
        for report in reports:
            if report.kind == "progress":
                self._reporter.progress(report.data["done"], rate=report.data["rate"])
            else:
                self._reporter.report(report.kind, **report.data)
        self._seq = reports[-1].seq if reports else self._seq
        self._asked = self._rank.reports.remote(self._seq)
