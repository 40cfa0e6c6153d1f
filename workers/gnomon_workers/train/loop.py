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

from gnomon.errors import GnomonError
from gnomon_storage.location import Location
from gnomon_workers.runtime.failpoints import Failpoint, failpoint
from gnomon_workers.train.metrics import step_metrics
from gnomon_workers.train.profile import StepProfile
from gnomon_workers.train.saving import CheckpointWriter, Saved, begin_all
from gnomon_workers.train.step import TrainStep


class BatchSource(Protocol):
    """Where batches come from: a pure function of the step."""

    def batch(self, step: int, start: int, stop: int) -> np.ndarray[Any, np.dtype[Any]]:
        """Rows [start, stop) of global batch `step`, (stop - start, d_in) float32."""


@dataclass(slots=True)
class Observer:
    """What the loop tells: calls are cheap, and only rank 0's are passed on."""

    report: Callable[..., None]
    """report(kind, **data)"""
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
        self.report("progress", done=done * batch_size, rate=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """One of the dictionaries that are trained on the same batches."""

    step: TrainStep
    checkpoints: Location
    name: str = ""
    """The variant's, where the job has variants."""

    @property
    def label(self) -> dict[str, str]:
        """What reports about it carry."""
        return {"variant": self.name} if self.name else {}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let an error say of which variant it is."""
        try:
            yield
        except GnomonError as error:
            if self.name:
                error.message = f"variant {self.name!r}: {error.message}"
            raise


def train(
    learners: Sequence[Learner],
    source: BatchSource,
    *,
    first_step: int,
    attempt: int,
    observer: Observer,
    trace: StepProfile | None = None,
) -> None:
    """Run steps [first_step, n_steps) of every learner and leave a checkpoint of each after the last.

    Learners may differ in all but the batch size, the number of steps and how often they report and are saved.
    """
    plan = learners[0].step.plan
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(learner, attempt, observer)) for learner in learners]
        observer.progress(first_step, plan.spec.batch_size, force=True)
        for number in _steps(learners, source, first_step, observer, trace):
            for writer in writers:
                writer.check()
            if number % plan.spec.checkpoint_every == 0 or number == plan.spec.n_steps:
                begin_all(writers, number)
            observer.progress(number, plan.spec.batch_size, force=number == plan.spec.n_steps)
        for writer in writers:
            writer.finish()


def _writer(learner: Learner, attempt: int, observer: Observer) -> CheckpointWriter:
    def committed(saved: Saved) -> None:
        checkpoint = saved.checkpoint
        observer.report(
            "checkpoint",
            **learner.label,
            step=checkpoint.step,
            max_alignment_deviation=checkpoint.max_alignment_deviation,
            n_bytes=checkpoint.n_bytes,
            copy_s=saved.copy_s,
            duration_s=saved.duration_s,
        )

    step, folder = learner.step, learner.checkpoints
    return CheckpointWriter(folder, step, attempt=attempt, on_commit=committed, beat=observer.beat)


def _steps(
    learners: Sequence[Learner],
    source: BatchSource,
    first_step: int,
    observer: Observer,
    trace: StepProfile | None,
) -> Iterator[int]:
    """Make steps [first_step, n_steps), reporting metrics; yields the number of steps made."""
    step = learners[0].step
    plan = step.plan
    start, stop = step.mesh.token_range(plan.spec.batch_size)
    device = step.parameters.W_dec.device
    clock = _Clock()
    for t in range(first_step, plan.spec.n_steps):
        if trace is not None:
            trace.before(t)
        with clock.loading():
            x = torch.from_numpy(source.batch(t, start, stop)).to(device)
        failpoint(Failpoint.STEP_BEFORE)
        number = t + 1
        is_logged = number % plan.spec.log_every == 0 or number == plan.spec.n_steps
        metrics = [_learn(learner, t, x, is_logged=is_logged) for learner in learners]
        if is_logged:
            lap = clock.lap(step)
            for learner, measured in zip(learners, metrics, strict=True):
                observer.report("metrics", **learner.label, **measured, **lap)
        yield number
    if trace is not None:
        trace.finish(plan.spec.n_steps)


def _learn(learner: Learner, t: int, x: torch.Tensor, *, is_logged: bool) -> dict[str, Any]:
    """Make one step, and measure it where that is due."""
    with learner.named():
        result = learner.step(t, x)
    return step_metrics(learner.step, result, t + 1) if is_logged else {}


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

    def lap(self, step: TrainStep) -> dict[str, Any]:
        """What the steps since the last lap took of this rank: rates, seconds by class of work, memory."""
        now = time.monotonic()
        elapsed_s = max(now - self._start, 1e-9)
        costs = {
            "tokens_per_s": self._n_steps * step.plan.spec.batch_size / elapsed_s,
            "loader_stall_fraction": self._loading_s / elapsed_s,
            "times_s": {**step.mesh.clock.lap(), "loader": self._loading_s},
            "peak_memory_bytes": peak_memory_bytes(step.parameters.W_dec.device),
        }
        self._start, self._loading_s, self._n_steps = now, 0.0, 0
        return costs
