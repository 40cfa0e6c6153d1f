"""The training loop of one rank, legible aloud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from gnomon_storage.location import Location
from gnomon_workers.train.checkpoints import save_checkpoint
from gnomon_workers.train.metrics import step_metrics
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


def train(
    step: TrainStep,
    source: BatchSource,
    *,
    first_step: int,
    attempt: int,
    checkpoints: Location,
    observer: Observer,
) -> None:
    """Run steps [first_step, n_steps) and leave a checkpoint after the last."""
    plan = step.plan
    start, stop = step.mesh.token_range(plan.batch_size)
    device = step.parameters.W_dec.device
    clock = _Clock()
    observer.progress(first_step, plan.batch_size, force=True)
    for t in range(first_step, plan.n_steps):
        with clock.loading():
            x = torch.from_numpy(source.batch(t, start, stop)).to(device)
        result = step(t, x)
        number = t + 1
        if number % plan.log_every == 0 or number == plan.n_steps:
            observer.report("metrics", **step_metrics(step, result, number), **clock.lap(plan.batch_size))
        if number % plan.checkpoint_every == 0 or number == plan.n_steps:
            began = time.monotonic()
            saved = save_checkpoint(checkpoints, step, number=number, attempt=attempt)
            observer.report(
                "checkpoint",
                step=number,
                max_alignment_deviation=saved.max_alignment_deviation,
                n_bytes=sum(shard.n_bytes for shard in saved.shards),
                duration_s=time.monotonic() - began,
            )
        observer.progress(number, plan.batch_size, force=number == plan.n_steps)


class _Clock:
    """Tokens per second and the share of time spent waiting for data, since the last lap."""

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

    def lap(self, batch_size: int) -> dict[str, float]:
        """Rates since the last lap."""
        now = time.monotonic()
        elapsed_s = max(now - self._start, 1e-9)
        rates = {
            "tokens_per_s": self._n_steps * batch_size / elapsed_s,
            "loader_stall_fraction": self._loading_s / elapsed_s,
        }
        self._start, self._loading_s, self._n_steps = now, 0.0, 0
        return rates
