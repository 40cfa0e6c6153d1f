"""No variant depends on the mesh: what a step leaves is the same, up to the rounding of float64, on any."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gnomon.specs import Mesh
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.train.step import TrainStep
from tests.support.ranks import RankPool
from tests.support.steps import data, plan_of, step_of
from tests.support.variants import FIELDS, VARIANTS

N_STEPS = 8
"""Enough for dead features, for a threshold that moves, and for the first update of p."""
N_FEW = 3
"""For eight ranks, which take turns on a small machine."""
BATCH = 64
EIGHT = ["topk", "batchtopk", "matryoshka"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a rank has after some steps."""

    start: int
    losses: list[tuple[float, ...]]
    """Loss, objective, its parts and the gradient's norm, of every step."""
    n_active: list[int]
    """Of this rank."""
    state: dict[str, float]
    tensors: dict[str, Tensor]


def train_on(mesh: ProcessMesh, names: list[str], n_steps: int = N_STEPS, exchange: str = "auto") -> dict[str, Trained]:
    """Train the named variants, one after the other."""
    return {name: _train(mesh, name, n_steps, exchange) for name in names}


def _train(mesh: ProcessMesh, name: str, n_steps: int, exchange: str) -> Trained:
    shape = Mesh(dp=mesh.dp, features=mesh.features)
    plan = plan_of(mesh=shape, activation=VARIANTS[name], gradient_exchange=exchange, **FIELDS)
    step = step_of(plan, mesh, dtype=torch.float64)
    first, last = mesh.token_range(BATCH)
    results = [step(t, data(BATCH, seed=t, dtype=torch.float64)[first:last]) for t in range(n_steps)]
    return Trained(
        start=step.parameters.start,
        losses=[(r.loss, r.objective, *r.parts.values(), r.grad_norm) for r in results],
        n_active=[r.n_active for r in results],
        state=step.state,
        tensors=tensors_of(step),
    )


def tensors_of(step: TrainStep) -> dict[str, Tensor]:
    """Parameters and counters."""
    return {**step.parameters.tensors(), "n_tokens_since_fired": step.n_tokens_since_fired}


@pytest.fixture(scope="module")
def alone() -> dict[str, Trained]:
    """Every variant on one process."""
    return train_on(ProcessMesh.single(), list(VARIANTS))


def check(answers: list[dict[str, Trained]], alone: dict[str, Trained], names: list[str]) -> None:
    """Every rank has what one process has, as far as it is its own."""
    for name in names:
        parts, whole = [answer[name] for answer in answers], alone[name]
        assert [sum(n) for n in zip(*(part.n_active for part in parts), strict=True)] == whole.n_active, name
        for part in parts:
            for mine, wanted in zip(part.losses, whole.losses, strict=True):
                assert mine == pytest.approx(wanted, rel=1e-10, abs=1e-14), name
            assert part.state == pytest.approx(whole.state, rel=1e-10), name
            for tensor_name, tensor in part.tensors.items():
                wanted_rows = whole.tensors[tensor_name]
                if tensor_name != "b_dec":
                    wanted_rows = wanted_rows[part.start : part.start + len(tensor)]
                torch.testing.assert_close(tensor, wanted_rows, rtol=1e-8, atol=1e-10, msg=f"{name}: {tensor_name}")


@pytest.mark.parametrize(
    ("dp", "features", "exchange"), [(1, 2, "auto"), (2, 1, "batch"), (2, 1, "dense"), (2, 2, "batch")]
)
def test_every_variant_on_small_meshes(
    ranks: RankPool, alone: dict[str, Trained], dp: int, features: int, exchange: str
) -> None:
    check(ranks.run(train_on, dp, features, list(VARIANTS), N_STEPS, exchange), alone, list(VARIANTS))


@pytest.mark.parametrize(("dp", "features"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_the_topk_family_on_eight_ranks(ranks: RankPool, dp: int, features: int) -> None:
    few = train_on(ProcessMesh.single(), EIGHT, N_FEW)
    check(ranks.run(train_on, dp, features, EIGHT, N_FEW), few, EIGHT)


def test_the_runs_reach_what_they_are_meant_to_compare(alone: dict[str, Trained]) -> None:
    assert any(parts[2] > 0 for parts in alone["topk+aux"].losses), "no feature died"
    assert alone["batchtopk"].state["threshold"] > 0
    assert alone["p_anneal"].state["l1_coefficient"] != VARIANTS["p_anneal"].l1_coefficient  # type: ignore[union-attr]
    assert alone["jumprelu"].tensors["log_threshold"].std() > 0
