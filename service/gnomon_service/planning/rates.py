"""How fast jobs run here, learned from those of the project that finished.

The model of costs says by how much one job is slower than another; what a finished job really took says how fast this
cluster is. The nearer the finished job, the smaller the error: near in widths, batch, active features, mesh and kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError
from sqlalchemy import Connection, select

from gnomon.resources import HarvestResult, TrainedOn, TrainResult
from gnomon.specs import HarvestSpec, Mesh, TrainSpec, chooses_k
from gnomon_service.db.tables import jobs
from gnomon_workers.sae.costs import TrainJob
from gnomon_workers.sae.speeds import SPEEDS

MOST_JOBS: Final = 100
"""Finished jobs that are looked at, the newest."""
NEAREST: Final = 5
"""Of them, those that count."""
PRIOR_ERROR: Final = 1.0
"""Of a documented machine's rate: another may be half or twice as fast."""
LEAST_ERROR: Final = 0.1
"""Between two runs of one job on a machine that others use as well."""
ERROR_OF_DISTANCE: Final = 0.15
"""What every doubling of something adds."""
FAR: Final = 8.0
"""Doublings beyond which a job says no more than the documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens a second, and how sure that is."""

    tokens_per_s: float
    error: float
    n_jobs: int
    """Finished jobs that it was learned from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job that ran here, as a point among others."""

    place: tuple[float, ...]
    """Its sizes as powers of two."""
    ratio: float
    """Its rate over that of the model of costs."""


def learned(modelled: float, place: tuple[float, ...], finished: Sequence[Finished]) -> Rate:
    """A modelled rate, corrected by what the nearest finished jobs took."""
    near = sorted((math.dist(place, job.place), math.log(job.ratio)) for job in finished)[:NEAREST]
    near = [(distance, log) for distance, log in near if distance <= FAR]
    if not near:
        return Rate(tokens_per_s=modelled, error=PRIOR_ERROR, n_jobs=0)
    weights = [(0.25 + distance) ** -2 for distance, _ in near]
    total = sum(weights)
    mean = sum(weight * log for weight, (_, log) in zip(weights, near, strict=True)) / total
    spread = sum(weight * (log - mean) ** 2 for weight, (_, log) in zip(weights, near, strict=True)) / total
    error = LEAST_ERROR + math.sqrt(spread) + ERROR_OF_DISTANCE * near[0][0]
    return Rate(tokens_per_s=modelled * math.exp(mean), error=min(PRIOR_ERROR, error), n_jobs=len(near))


# ---------------------------------------------------------------------------------------------- trainings


@dataclass(frozen=True, slots=True)
class TrainingRates:
    """What trainings of a project took on each kind of device."""

    finished: dict[str, list[Finished]]

    def of(self, job: TrainJob, mesh: Mesh) -> Rate:
        """The rate of a training on a mesh, in tokens of its batches, whatever the number of variants."""
        return learned(_modelled(job, mesh), _place(job, mesh), self.finished.get(job.device, []))


def training_rates(connection: Connection, project: str) -> TrainingRates:
    """Those of the project's newest trainings."""
    finished: dict[str, list[Finished]] = {}
    for spec, result in _finished(connection, project, "train"):
        try:
            ran = TrainResult.read(result).run
            if ran is None or ran.device not in SPEEDS:
                continue
            job = TrainJob.of(
                TrainSpec.read(spec), ran.d_in, d_out=ran.d_out, device="gpu" if ran.device == "gpu" else "cpu"
            )
        except ValueError:  # of another release, which this one cannot read
            continue
        finished.setdefault(ran.device, []).append(finished_training(job, ran))
    return TrainingRates(finished)


def finished_training(job: TrainJob, ran: TrainedOn) -> Finished:
    """A training as a point among others."""
    return Finished(place=_place(job, ran.mesh), ratio=ran.tokens_per_s / _modelled(job, ran.mesh))


def _modelled(job: TrainJob, mesh: Mesh) -> float:
    return job.spec.batch_size / job.step_seconds(mesh)


def _place(job: TrainJob, mesh: Mesh) -> tuple[float, ...]:
    """Powers of two of what a step depends on; kinds of activations are set apart by as much as their steps differ."""
    shape = job.shapes(mesh)[0]
    kind = 0.0 if chooses_k(shape.spec.activation) else 4.0
    sub_kind = {"topk": 0.0, "batchtopk": 0.3, "matryoshka": 0.8, "gated": 0.8, "jumprelu": 0.3}
    return (
        math.log2(shape.row_width),
        math.log2(shape.d_sae),
        math.log2(shape.spec.batch_size),
        math.log2(shape.n_picks) if chooses_k(shape.spec.activation) else 0.0,
        math.log2(mesh.dp),
        math.log2(mesh.features),
        math.log2(len(job.specs)),
        kind + sub_kind.get(shape.spec.activation.kind, 0.0),
        0.0 if shape.may_round else 0.5,
        0.0 if shape.spec.alignment == "none" else 0.2,
    )


# ---------------------------------------------------------------------------------------------- harvests


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestSize:
    """What the rate of a harvest depends on."""

    spec: HarvestSpec
    n_parameters: int
    n_workers: int
    device: str

    @property
    def modelled(self) -> float:
        """Tokens a second: two operations a parameter, at half the speed of a large product."""
        speeds = SPEEDS["gpu" if self.device == "gpu" else "cpu"]
        flops = speeds.bfloat16_flops if self.spec.model.dtype == "bfloat16" else speeds.float32_flops
        return self.n_workers * flops / 2 / (2 * max(1, self.n_parameters))

    @property
    def place(self) -> tuple[float, ...]:
        """Powers of two of its sizes."""
        return (
            math.log2(max(1, self.n_parameters)),
            math.log2(self.n_workers),
            math.log2(self.spec.context_length) / 2,
            math.log2(self.spec.batch_contexts) / 2,
            0.0 if self.spec.model.dtype == "bfloat16" else 1.0,
        )


def harvest_rate(connection: Connection, project: str, size: HarvestSize) -> Rate:
    """The rate of a harvest, learned from the project's newest ones."""
    finished: list[Finished] = []
    for spec, result in _finished(connection, project, "harvest"):
        try:
            done, its_spec = HarvestResult.read(result), HarvestSpec.read(spec)
        except ValidationError:  # of another release
            continue
        if done.run is None or not done.tokens_per_s or done.run.device != size.device:
            continue
        its_size = HarvestSize(
            spec=its_spec, n_parameters=done.run.n_parameters, n_workers=done.run.n_workers, device=done.run.device
        )
        finished.append(Finished(place=its_size.place, ratio=done.tokens_per_s / its_size.modelled))
    return learned(size.modelled, size.place, finished)


def _finished(connection: Connection, project: str, kind: str) -> list[tuple[Any, Any]]:
    """Spec and result of the newest jobs of a kind that succeeded."""
    statement = (
        select(jobs.c.spec, jobs.c.result)
        .where(jobs.c.project == project, jobs.c.kind == kind, jobs.c.state == "succeeded", jobs.c.result.is_not(None))
        .order_by(jobs.c.created_at.desc())
        .limit(MOST_JOBS)
    )
    return [(row.spec, row.result) for row in connection.execute(statement)]
