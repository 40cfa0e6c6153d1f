"""Metrics of a step. Sums travel between ranks, ratios do not: everything is added up first and divided once."""

from __future__ import annotations

from typing import Any

import torch

from gnomon_workers.sae.alignment import alignment_scores
from gnomon_workers.train.step import StepResult, TrainStep


def step_metrics(step: TrainStep, result: StepResult, number: int) -> dict[str, Any]:
    """Metrics of one batch; collective: every rank must call it, and all get the same numbers.

    `number` counts finished steps. Everything but the alignment quantiles is of this batch alone, so a run that
    was interrupted reports what it would have reported.
    """
    plan, mesh = step.plan, step.mesh
    inputs = result.inputs
    variance = float((inputs - inputs.mean(0)).square().sum(1).sum(dtype=torch.float64))
    n_dead = (step.n_tokens_since_fired >= plan.dead_after_tokens).sum()
    n_active = mesh.all_reduce(torch.tensor([result.n_active], device=n_dead.device), "world")
    scores = torch.cat(mesh.all_gather(step.alignment_scores(), "features"))
    fvu = result.loss * plan.batch_size / variance if variance > 0 else 0.0
    metrics = {
        "step": number,
        "tokens": number * plan.batch_size,
        "loss": result.loss,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": int(n_active) / plan.batch_size,
        "dead_fraction": int(mesh.all_reduce(n_dead, "features")) / plan.d_sae,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "alignment_min": float(scores.min()),
        "alignment_median": float(scores.median()),
        "alignment_max": float(scores.max()),
    }
    if plan.aux is not None:
        metrics["aux_loss"] = result.aux_loss
    if step.threshold:
        metrics["threshold"] = step.threshold
    return metrics


def max_alignment_deviation(step: TrainStep) -> float:
    """Largest |<w, d> - 1| over all features of the dictionary; collective."""
    params = step.parameters
    worst = (alignment_scores(params.W_enc_rows, params.W_dec) - 1).abs().max()
    return float(torch.stack(step.mesh.all_gather(worst, "features")).max())
