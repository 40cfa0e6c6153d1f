"""A train job, as its supervisor runs it: check, train, evaluate, export, publish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import ray

from gnomon.errors import GnomonError
from gnomon.events import EventData, Logged, Progressed, TrainingMeasured, read_event
from gnomon.metrics import DictionaryMetrics
from gnomon.resources import TrainedDictionary, TrainedOn, TrainResult
from gnomon_workers.checkpoints.format import Checkpoint, committed_checkpoints, latest_common, remove_unfinished
from gnomon_workers.dictionaries.folder import published
from gnomon_workers.runtime import failpoints
from gnomon_workers.runtime.deaths import lost_as_such
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.gang import Gang
from gnomon_workers.runtime.protocol import Assignment, Report
from gnomon_workers.runtime.reporting import Left, Reporter, WorkerLost
from gnomon_workers.sae.costs import checkpoint_bytes
from gnomon_workers.sae.plan import TrainPlan
from gnomon_workers.train.publishing import export
from gnomon_workers.train.rank import TrainRank
from gnomon_workers.train.run import TrainRun, resolve

SILENT_S: Final = 900.0
"""A gang of which no rank has done anything for this long hangs, in a read that never ends, say: it is given up."""
SALVAGE_S: Final = 1.0
"""Longest wait for the last words of a gang's rank 0."""


def run_train(assignment: Assignment, reporter: Reporter) -> Mapping[str, Any]:
    """Train, evaluate and publish; every part that an earlier attempt finished is kept."""
    run = resolve(assignment)
    done = {each.variant: record for each in run.trainings if (record := published(each.dictionary)) is not None}
    measured = MeanRate()
    if len(done) < len(run.trainings):
        checkpoints, tokens_per_s = train_gang(run, reporter, measured)
        for training, checkpoint in zip(run.trainings, checkpoints, strict=True):
            if training.variant not in done:
                record = export(run, training, checkpoint, reporter, tokens_per_s=tokens_per_s)
                done[training.variant] = record
    return _result(run, done, measured)


def _result(run: TrainRun, records: Mapping[str, dict[str, Any]], measured: MeanRate) -> Mapping[str, Any]:
    """What the job answers, from the record of each variant."""
    first = run.trainings[0]
    result = TrainResult(
        dictionary_id=first.dictionary_id,
        store_id=run.assignment.store_id,
        n_steps=run.plan.spec.n_steps,
        metrics=_metrics(records[first.variant]),
        dictionaries={
            each.variant: TrainedDictionary(dictionary_id=each.dictionary_id, metrics=_metrics(records[each.variant]))
            for each in run.trainings
            if each.variant
        },
        run=_measured_run(run.plan, measured),
    )
    return {**result.model_dump(mode="json"), "records": [records[each.variant] for each in run.trainings]}


def _measured_run(plan: TrainPlan, measured: MeanRate) -> TrainedOn | None:
    """What plans of other jobs are learned from; None where this attempt made no step."""
    if measured.tokens_per_s is None:
        return None
    return TrainedOn(
        mesh=plan.mesh,
        device=Devices.of_cluster().kind,
        d_in=plan.d_in,
        d_out=plan.target.width if plan.target is not None else None,
        tokens_per_s=measured.tokens_per_s,
        peak_memory_bytes=measured.peak_memory_bytes,
    )


def _metrics(record: Mapping[str, Any]) -> DictionaryMetrics:
    """Those of a record that an attempt of another release may have written."""
    return DictionaryMetrics.read(record["metrics"])


@dataclass(slots=True)
class MeanRate:
    """The rate of all steps that rank 0 has told of, from the rates of those between two reports."""

    n_tokens: int = 0
    """Trained on, those of earlier attempts included."""
    peak_memory_bytes: int | None = None
    _n_timed: int = 0
    _seconds: float = 0.0

    def add(self, told: EventData) -> None:
        """Count a report; of several variants all tell the same, and one counts."""
        if not isinstance(told, TrainingMeasured) or not told.tokens_per_s or told.tokens is None:
            return
        n_new = max(0, told.tokens - self.n_tokens)
        self.n_tokens += n_new
        self._n_timed += n_new
        self._seconds += n_new / told.tokens_per_s
        self.peak_memory_bytes = told.peak_memory_bytes

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second; None before there was a report."""
        return self._n_timed / self._seconds if self._seconds > 0 else None


def train_gang(
    run: TrainRun, reporter: Reporter, measured: MeanRate | None = None
) -> tuple[tuple[Checkpoint, ...], float | None]:
    """Train from the last step of which all have a whole checkpoint to the end.

    Returns the final checkpoints, and the tokens that this attempt read a second, its start included; `measured` is
    told of the steps.
    """
    plan, spec = run.plan, run.plan.spec
    folders = [each.checkpoints for each in run.trainings]
    reporter.phase("train", total=spec.n_steps * spec.batch_size, unit="tokens")
    resume, damaged = latest_common(folders)
    for message in damaged:
        reporter.report(Logged(level="warning", message=message))
    first_step = 0
    if resume is not None:
        first_step = resume[0].step
        attempts = " and ".join(str(attempt) for attempt in sorted({checkpoint.attempt for checkpoint in resume}))
        reporter.report(Logged(message=f"resuming from step {first_step} of attempt {attempts}"))
        if first_step >= spec.n_steps:
            return resume, None
        run = run.resumed(resume)
    for folder in folders:
        remove_unfinished(folder, run.assignment.attempt)
    # before the work, or a full disk would be found at every checkpoint anew, after all of its steps
    folders[0].check_room(sum(checkpoint_bytes(each.plan.shape) for each in run.trainings))
    began = time.monotonic()
    places = run.assignment.places
    with Gang.start(TrainRank, plan.n_ranks, reporter, places=places, env=failpoints.environment()) as gang:
        _drive(gang, run, reporter, measured or MeanRate())
    tokens_per_s = (spec.n_steps - first_step) * spec.batch_size / (time.monotonic() - began)
    return tuple(next(committed_checkpoints(folder)) for folder in folders), tokens_per_s


def _drive(gang: Gang, run: TrainRun, reporter: Reporter, measured: MeanRate) -> None:
    """Run the gang's ranks to the end, passing on what rank 0 says."""
    with lost_as_such():
        address: str = ray.get(gang.members[0].address.remote())
    running = [member.run.remote(run, address) for member in gang.members]
    measured.n_tokens = run.trainings[0].first_step * run.plan.spec.batch_size
    forward = _Forwarder(gang.members[0], reporter, measured)

    def tick() -> None:
        forward()
        if reporter.is_leaving:
            gang.members[0].leave.remote()  # again and again: it may not have been there to hear it
        quiet_s = min(map(float, gang.last_beats))
        if quiet_s > SILENT_S:
            raise WorkerLost(f"no rank has got on for {quiet_s:.0f} s")

    try:
        have_left = gang.watch(running, tick)
    except WorkerLost:
        # if rank 0 lives, what it has said belongs to steps that may never be made again
        forward.salvage()
        raise
    except GnomonError:
        forward.finish()
        raise
    forward.finish()
    if any(have_left):
        raise Left


class _Forwarder:
    """Passes rank 0's reports on, asking again only when the last question is answered."""

    def __init__(self, rank: Any, reporter: Reporter, measured: MeanRate) -> None:
        self._rank = rank
        self._reporter = reporter
        self._measured = measured
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

    def salvage(self) -> None:
        """Pass on what the rank can still say of a gang that is lost."""
        for _ in range(2):
            if ray.wait([self._asked], timeout=SALVAGE_S)[0]:
                with suppress(WorkerLost):
                    self._pass_on()

    def _pass_on(self) -> None:
        with lost_as_such():
            reports: tuple[Report, ...] = ray.get(self._asked)
        for report in reports:
            told = read_event(report.kind, report.data)
            self._measured.add(told)
            if isinstance(told, Progressed):
                self._reporter.progress(told.done, rate=told.rate)
            else:
                self._reporter.pass_on(report)
        self._seq = reports[-1].seq if reports else self._seq
        self._asked = self._rank.reports.remote(self._seq)
