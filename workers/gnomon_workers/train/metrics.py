"""Metrics of a step. Sums travel between ranks, ratios do not: everything is added up first and divided once."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.metrics import StepMetrics
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.alignment import alignment_scores
from gnomon_workers.train.step import StepResult, TrainStep


def step_metrics(step: TrainStep, result: StepResult, number: int) -> StepMetrics:
    """Metrics of one batch; collective: every rank must call it, and all get the same numbers.

    `number` counts finished steps. Everything but the alignment quantiles is of this batch alone, so a run that
    was interrupted reports what it would have reported.
    """
    plan, mesh = step.plan, step.mesh
    variance = _variance(result.targets, mesh)
    n_dead = (step.n_tokens_since_fired >= plan.spec.dead_window).sum()
    n_active = mesh.all_reduce(torch.tensor([result.n_active], device=n_dead.device), "world")
    n_tokens = number * plan.spec.batch_size
    dead_fraction = int(mesh.all_reduce(n_dead, "features")) / plan.d_sae
    fvu = result.loss * plan.spec.batch_size / variance if variance > 0 else 0.0
    return StepMetrics(
        step=number,
        tokens=n_tokens,
        loss=result.loss,
        objective=result.objective,
        fvu=fvu,
        explained_variance=1 - fvu,
        l0=int(n_active) / plan.spec.batch_size,
        dead_fraction=dead_fraction if n_tokens >= plan.spec.dead_window else None,
        lr=result.lr,
        grad_norm=result.grad_norm,
        **result.parts,
        **step.state,
        **_alignment(step),
    )


def _variance(targets: Tensor, mesh: ProcessMesh) -> float:
    """Sum of squared distances from the mean, over the tokens of all replicas; collective."""
    n_tokens = len(targets) * mesh.dp
    mean = mesh.all_reduce(targets.sum(0, dtype=torch.float64), "dp") / n_tokens
    return float(mesh.all_reduce((targets - mean).square().sum(), "dp"))


def _alignment(step: TrainStep) -> dict[str, float]:
    """Quantiles of <w, d>; none for a transcoder."""
    local = step.alignment_scores()
    if local is None:
        return {}
    scores = torch.cat(step.mesh.all_gather(local, "features"))
    return {
        "alignment_min": float(scores.min()),
        "alignment_median": float(scores.median()),
        "alignment_max": float(scores.max()),
    }


def max_alignment_deviation(step: TrainStep) -> float | None:
    """Largest |<w, d> - 1| over all features of the dictionary, None for a transcoder; collective."""
    params = step.parameters
    if step.plan.target is not None:
        return None
    worst = (alignment_scores(params.W_enc_rows, params.W_dec) - 1).abs().max()
    return float(torch.stack(step.mesh.all_gather(worst, "features")).max())
