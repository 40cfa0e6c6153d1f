"""The training loop of one rank, legible aloud."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from gnomon.events import CheckpointSaved, EventData, Progressed, TrainingMeasured
from gnomon.metrics import Costs
from gnomon_workers.runtime.failpoints import Failpoint, failpoint
from gnomon_workers.train.metrics import step_metrics
from gnomon_workers.train.profile import StepProfile
from gnomon_workers.train.run import Training
from gnomon_workers.train.saving import CheckpointWriter, Saved, begin_all
from gnomon_workers.train.step import StepResult, TrainStep


class BatchSource(Protocol):
    """Where batches come from: a pure function of the step."""

    def batch(self, step: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows [start, stop) of global batch `step`, (stop - start, d_in) float32."""


@dataclass(slots=True)
class Observer:
    """What the loop tells: calls are cheap, and only rank 0's are passed on."""

    report: Callable[[EventData], None]
    beat: Callable[[], None]
    """Something was done; a rank that stops beating is taken for dead."""
    min_interval_s: float = 0.5
    """Between two progress reports."""
    _last: tuple[float, int] = field(default=(0.0, 0))

    def progress(self, done: int, batch_size: int, *, force: bool = False) -> None:
        """Report tokens done and the rate since the last report, at most every min_interval_s."""
        self.beat()
        now = time.monotonic()
        elapsed = now - self._last[0]
        if elapsed < self.min_interval_s and not force:
            return
        rate = (done - self._last[1]) * batch_size / elapsed if self._last[0] and elapsed > 0 else None
        self._last = (now, done)
        self.report(Progressed(phase="train", done=done * batch_size, rate=rate))


def train(
    trainings: Sequence[Training],
    steps: Sequence[TrainStep],
    source: BatchSource,
    *,
    attempt: int,
    observer: Observer,
    is_last: Callable[[int], bool] = lambda _: False,
    trace: StepProfile | None = None,
) -> bool:
    """Make every training's steps, from where it goes on to the last, and leave a checkpoint of each after that.

    is_last(n): whether the step after which n were made is the last one now; returns whether that was before the end.
    steps[i] is that of trainings[i], with its checkpoint loaded. Trainings may differ in all but the batch size, the
    number of steps and how often they report and are saved.
    """
    spec = trainings[0].plan.spec
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_writer(training, step, attempt, observer))
            for training, step in zip(trainings, steps, strict=True)
        ]
        has_left = False
        observer.progress(trainings[0].first_step, spec.batch_size, force=True)
        for number in _steps(trainings, steps, source, observer, trace):
            for writer in writers:
                writer.check()
            leaves = is_last(number)
            has_left = leaves and number < spec.n_steps
            if number % spec.checkpoint_every == 0 or number == spec.n_steps or leaves:
                begin_all(writers, number)
            observer.progress(number, spec.batch_size, force=number == spec.n_steps)
            if leaves:
                break
        for writer in writers:
            writer.finish()
    return has_left


def _writer(training: Training, step: TrainStep, attempt: int, observer: Observer) -> CheckpointWriter:
    def committed(saved: Saved) -> None:
        checkpoint = saved.checkpoint
        observer.report(
            CheckpointSaved(
                step=checkpoint.step,
                max_alignment_deviation=checkpoint.max_alignment_deviation,
                n_bytes=checkpoint.n_bytes,
                copy_s=saved.copy_s,
                duration_s=saved.duration_s,
                variant=training.variant or None,
            )
        )

    return CheckpointWriter(training.checkpoints, step, attempt=attempt, on_commit=committed, beat=observer.beat)


def _steps(
    trainings: Sequence[Training],
    steps: Sequence[TrainStep],
    source: BatchSource,
    observer: Observer,
    trace: StepProfile | None,
) -> Iterator[int]:
    """Make the steps, reporting metrics; yields the number of steps made."""
    first, spec = steps[0], trainings[0].plan.spec
    start, stop = first.mesh.token_range(spec.batch_size)
    device = first.parameters.W_dec.device
    clock = _Clock()
    for t in range(trainings[0].first_step, spec.n_steps):
        if trace is not None:
            trace.before(t)
        with clock.loading():
            x = torch.from_numpy(source.batch(t, start, stop)).to(device)
        failpoint(Failpoint.STEP_BEFORE)
        number = t + 1
        is_logged = number % spec.log_every == 0 or number == spec.n_steps
        results = [_learn(*pair, t, x) for pair in zip(trainings, steps, strict=True)]
        if is_logged:
            metrics = [step_metrics(step, result, number) for step, result in zip(steps, results, strict=True)]
            costs = clock.lap(first)
            for training, measured in zip(trainings, metrics, strict=True):
                told = {**measured.known(), **costs.known(), "variant": training.variant or None}
                observer.report(TrainingMeasured(**told))
        yield number
    if trace is not None:
        trace.finish(spec.n_steps)


def _learn(training: Training, step: TrainStep, t: int, x: torch.Tensor) -> StepResult:
    with training.named():
        return step(t, x)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process ever held: of a GPU what its tensors took, else all that it took of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Clock:
    """What steps take, from one lap to the next."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._loading_s = 0.0
        self._n_steps = 0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Time the loading of one batch."""
        began = time.monotonic()
        yield
        self._loading_s += time.monotonic() - began
        self._n_steps += 1

    def lap(self, step: TrainStep) -> Costs:
        """What the steps since the last lap took of this rank: rates, seconds by class of work, memory."""
        now = time.monotonic()
        elapsed_s = max(now - self._start, 1e-9)
        costs = Costs(
            tokens_per_s=self._n_steps * step.plan.spec.batch_size / elapsed_s,
            loader_stall_fraction=self._loading_s / elapsed_s,
            times_s={**step.mesh.clock.lap(), "loader": self._loading_s},
            peak_memory_bytes=peak_memory_bytes(step.parameters.W_dec.device),
        )
        self._start, self._loading_s, self._n_steps = now, 0.0, 0
        return costs
