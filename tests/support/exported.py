"""Small dictionaries trained on raw inputs, and their SAELens folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from gnomon.specs import Activation, Alignment, Mesh
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint
from gnomon_workers.dictionaries.saelens import saelens_config
from gnomon_workers.dictionaries.weights import WEIGHTS, write_weights
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.plan import HookRows, TrainPlan
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.step import TrainStep
from tests.support.steps import data, joint_plan_of, plan_of, step_of

SCALE = 40.0
"""Raw inputs are this many times larger than the normalised ones."""


def trained(plan: TrainPlan, mesh: ProcessMesh) -> TrainStep:
    """A step after 30 batches of raw inputs."""
    step = step_of(plan, mesh)
    lo, hi = mesh.token_range(plan.spec.batch_size)
    for t in range(30):
        parts = [data(plan.spec.batch_size, seed=t, d_in=hook.width)[lo:hi] / hook.scale for hook in plan.hooks]
        step(t, torch.cat(parts, dim=1))
    return step


def scaled_plan(activation: Activation, alignment: Alignment = "orth", features: int = 1) -> TrainPlan:
    """A plan for raw inputs."""
    plan = plan_of(
        activation=activation,
        alignment=alignment,
        mesh=Mesh(features=features),
        optimizer={"lr": 1e-2},
        batch_size=64,
        token_budget=64 * 100,
    )
    return dataclasses.replace(plan, inputs=(HookRows(name="model.layers.3", width=plan.d_in, scale=1 / SCALE),))


def exported(folder: Path, plan: TrainPlan, checkpoint: Checkpoint, checkpoints: Location) -> Path:
    """The SAELens folder of a checkpoint."""
    folder.mkdir()
    write_weights(folder / WEIGHTS, plan, checkpoint, checkpoints)
    (folder / "cfg.json").write_text(json.dumps(saelens_config(plan, {"model_name": "m"})))
    return folder


def trained_folder(folder: Path, activation: Activation) -> Path:
    """The SAELens folder of a dictionary trained here and now; inputs are `data` times SCALE."""
    return _saved(folder, scaled_plan(activation))


def transcoder_folder(folder: Path, activation: Activation) -> Path:
    """The folder of a transcoder from `data` times SCALE to a narrower hook, trained here and now."""
    plan = joint_plan_of(
        HookRows(name="model.layers.3", width=24, scale=1 / SCALE),
        target=HookRows(name="model.layers.4", width=16, scale=0.5),
        activation=activation,
        alignment="none",
        optimizer={"lr": 1e-2},
        batch_size=64,
        token_budget=64 * 100,
    )
    return _saved(folder, plan)


def _saved(folder: Path, plan: TrainPlan) -> Path:
    checkpoints = Location.open(f"file://{folder.parent}").child(f"{folder.name}-checkpoints")
    checkpoint = save_checkpoint(checkpoints, trained(plan, ProcessMesh.single()), number=30, attempt=1)
    return exported(folder, plan, checkpoint, checkpoints)
