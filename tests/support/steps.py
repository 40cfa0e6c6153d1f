"""Small training steps for the numerics tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.specs import Mesh, StoredActivations, TrainSpec
from gnomon_workers.kernels.blocks import BlockedUpdate
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.parameters import make_parameters
from gnomon_workers.sae.plan import HookRows, TrainPlan, make_joint_plan, make_plan
from gnomon_workers.sae.products import RowGradients
from gnomon_workers.sae.variants import make_variant
from gnomon_workers.train.step import StepResult, TrainStep

D_IN = 24
STORE = StoredActivations(id="act_" + "0" * 32)


def plan_of(*, mesh: Mesh | None = None, d_in: int = D_IN, **fields: Any) -> TrainPlan:
    """A plan for inputs of unit mean squared norm."""
    return make_plan(_spec(mesh, **fields), d_in=d_in, mesh=mesh or Mesh(), mean_squared_norm=1.0)


def joint_plan_of(
    *inputs: HookRows, target: HookRows | None = None, mesh: Mesh | None = None, **fields: Any
) -> TrainPlan:
    """A plan for a crosscoder of several hooks, or a transcoder from one to another."""
    return make_joint_plan(_spec(mesh, **fields), inputs=inputs, target=target, mesh=mesh or Mesh())


def _spec(mesh: Mesh | None, **fields: Any) -> TrainSpec:
    given: dict[str, Any] = {"d_sae": 96, "batch_size": 32, "token_budget": 32 * 100, **fields}
    return TrainSpec(activations=STORE, mesh=mesh or Mesh(), **given)


def data(n: int, *, seed: int = 0, d_in: int = D_IN, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs (n, d_in) with a few strong directions, of unit mean squared norm."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(4 * d_in, d_in, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, 4 * d_in, generator=generator, dtype=torch.float64) ** 12
    x = weights @ directions + 0.1
    return (x / x.square().sum(1).mean().sqrt()).to(dtype)


def step_of(
    plan: TrainPlan,
    mesh: ProcessMesh | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> TrainStep:
    """A fresh step; b_dec is not zero, so that its part in the gradient shows."""
    mesh = mesh or ProcessMesh.single()
    start, stop = mesh.feature_range(plan.d_sae)
    b_dec = torch.linspace(-0.1, 0.1, plan.d_out, dtype=dtype, device=device)
    parameters = make_parameters(
        seed=plan.spec.seed,
        d_in=plan.d_in,
        start=start,
        stop=stop,
        b_dec=b_dec,
        tied=plan.spec.alignment == "tied",
        vectors=make_variant(plan.spec.activation, plan.setting).initial_vectors(),
        is_transcoder=plan.target is not None,
        dtype=dtype,
    )
    return TrainStep(plan, parameters, mesh)


def unsettle(step: TrainStep, *, seed: int = 1) -> None:
    """Move the parameters off their special start (w = d, b_enc = 0) along the constraint."""
    from gnomon_workers.sae.alignment import RULES

    generator = torch.Generator().manual_seed(seed)
    for tensor in step.parameters.tensors().values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype))
    RULES[step.plan.spec.alignment].retract(step.parameters.W_enc_rows, step.parameters.W_dec)


def gradients_of(
    step: TrainStep, x: Tensor, monkeypatch: pytest.MonkeyPatch, *, number: int = 0
) -> tuple[dict[str, Tensor], StepResult]:
    """Gradients as the optimizer would see them, before clipping, dense and by name; nothing is updated."""
    seen: dict[str, Tensor] = {}

    def catch(self: BlockedUpdate, gradients: RowGradients, **_: object) -> None:
        rows = {"W_dec": gradients.decoder, "W_enc_rows": gradients.encoder}
        for name, tensor in step.parameters.tensors().items():
            if name in rows:
                seen[name] = torch.zeros_like(tensor).index_add_(0, gradients.touched, rows[name])
            else:
                seen[name] = gradients.vectors[name].clone()

    with monkeypatch.context() as patch:
        patch.setattr(BlockedUpdate, "apply", catch)
        result = step(number, x)
    return seen, result
