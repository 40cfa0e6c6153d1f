"""Small training steps for the numerics tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnomon.specs import Mesh, StoredActivations, TrainSpec
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.train.plan import TrainPlan, make_plan
from gnomon_workers.train.step import TrainStep

D_IN = 24
STORE = StoredActivations(id="act_" + "0" * 32)


def plan_of(*, mesh: Mesh | None = None, d_in: int = D_IN, **fields: Any) -> TrainPlan:
    """A plan for inputs of unit mean squared norm."""
    given: dict[str, Any] = {"d_sae": 96, "batch_size": 32, "token_budget": 32 * 100, **fields}
    spec = TrainSpec(activations=STORE, mesh=mesh or Mesh(), **given)
    return make_plan(spec, d_in=d_in, mesh=mesh or Mesh(), mean_squared_norm=1.0)


def data(n: int, *, seed: int = 0, d_in: int = D_IN, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs (n, d_in) with a few strong directions, of unit mean squared norm."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, 4 * d_in, generator=generator, dtype=torch.float64) ** 12
    x = weights @ directions + 0.1
    return (x / x.square().sum(1).mean().sqrt()).to(dtype)


def step_of(plan: TrainPlan, mesh: ProcessMesh | None = None, *, dtype: torch.dtype = torch.float32) -> TrainStep:
    """A fresh step; b_dec is not zero, so that its part in the gradient shows."""
    mesh = mesh or ProcessMesh.single()
    start, stop = mesh.feature_range(plan.d_sae)
    b_dec = torch.linspace(-0.1, 0.1, plan.d_in, dtype=dtype)
    parameters = make_parameters(
        seed=plan.seed,
        d_in=plan.d_in,
        start=start,
        stop=stop,
        b_dec=b_dec,
        tied=plan.alignment == "tied",
        dtype=dtype,
    )
    return TrainStep(plan, parameters, mesh)


def unsettle(step: TrainStep, *, seed: int = 1) -> None:
    """Move the parameters off their special start (w = d, b_enc = 0) along the constraint."""
    from gnomon_workers.sae.alignment import RULES

    generator = torch.Generator().manual_seed(seed)
    for tensor in step.parameters.tensors().values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
    RULES[step.plan.alignment].retract(step.parameters.W_enc_rows, step.parameters.W_dec)
