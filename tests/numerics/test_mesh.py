"""Training does not depend on the mesh: same picks, same losses up to rounding, equal replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.specs import Activation, AuxK, BatchTopK, Mesh, TopK
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.train.step import TrainStep
from tests.support.ranks import RankPool
from tests.support.selections import assembled, dense
from tests.support.steps import data, plan_of, step_of

MESHES = [(1, 2), (2, 1), (2, 2)]
ACTIVATIONS: list[Activation] = [TopK(k=5), BatchTopK(k=5), TopK(k=5, aux=AuxK(k=8))]
BATCH = 64


def _step_on(mesh: ProcessMesh, fields: dict[str, Any]) -> TrainStep:
    plan = plan_of(mesh=Mesh(dp=mesh.dp, features=mesh.features), batch_size=BATCH, token_budget=BATCH * 100, **fields)
    return step_of(plan, mesh)


def _train_on(mesh: ProcessMesh, fields: dict[str, Any], n_steps: int) -> tuple[Tensor, list[float], list[Tensor]]:
    """First picks of this rank, losses of n_steps, and the final weights of this rank."""
    step = _step_on(mesh, fields)
    first, last = mesh.token_range(BATCH)
    picks = dense(step.select(data(BATCH, seed=0)[first:last]), step.parameters.n_local)
    losses = [step(t, data(BATCH, seed=t)[first:last]).loss for t in range(n_steps)]
    return picks, losses, list(step.parameters.tensors().values())


@pytest.mark.parametrize(("dp", "features"), MESHES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["topk", "batchtopk", "topk+aux"])
def test_losses_agree_with_one_process_over_100_steps(
    ranks: RankPool, activation: Activation, dp: int, features: int
) -> None:
    fields = {"activation": activation, "dead_after_tokens": 1000, "optimizer": {"lr": 2e-3}}
    picks, losses, _ = _train_on(ProcessMesh.single(), fields, 100)
    answers = ranks.run(_train_on, dp, features, fields, 100)
    first = assembled([answer[0] for answer in answers], dp, features)
    assert torch.equal(first != 0, picks != 0)
    for _, other, _ in answers:
        worst = max(abs(a - b) / b for a, b in zip(other, losses, strict=True))
        assert worst <= 1e-6
    assert losses[-1] < 0.9 * losses[0]


def test_replicas_stay_equal_to_the_bit(ranks: RankPool) -> None:
    answers = ranks.run(_train_on, 2, 2, {"activation": BatchTopK(k=5)}, 20)
    for shard in range(2):
        for mine, theirs in zip(answers[shard][2], answers[2 + shard][2], strict=True):
            assert torch.equal(mine, theirs)


def test_sharded_initialisation_is_the_unsharded_one() -> None:
    whole = step_of(plan_of(d_sae=1000)).parameters.W_dec
    for shard in range(4):
        mesh = ProcessMesh(dp=1, features=4, rank=shard, groups={})
        part = step_of(plan_of(d_sae=1000, mesh=Mesh(features=4)), mesh).parameters
        assert torch.equal(part.W_dec, whole[part.start : part.start + 250])


def _poisoned_on(mesh: ProcessMesh) -> tuple[str, bool]:
    step = _step_on(mesh, {})
    first, last = mesh.token_range(BATCH)
    before = step.parameters.W_dec.clone()
    x = data(BATCH)[first:last]
    if mesh.rank == 3:
        x[0, 0] = float("nan")
    try:
        step(0, x)
    except Exception as error:
        return type(error).__name__, torch.equal(before, step.parameters.W_dec)
    return "", False


def test_a_nan_on_one_rank_stops_every_rank_at_the_same_step(ranks: RankPool) -> None:
    assert ranks.run(_poisoned_on, 2, 2) == [("NonFinite", True)] * 4
