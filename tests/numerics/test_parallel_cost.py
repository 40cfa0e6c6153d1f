"""What parallel training costs, and that the ways to pay it agree."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from gnomon.specs import Alignment, Mesh, TopK
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint
from gnomon_workers.parallel.clock import WORK, StepClock
from gnomon_workers.parallel.mesh import Axis, ProcessMesh
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.state import load_checkpoint
from gnomon_workers.train.step import TrainStep
from tests.support.ranks import RankPool
from tests.support.steps import D_IN, data, plan_of, step_of

BATCH, K = 64, 5


def _step_on(mesh: ProcessMesh, **fields: Any) -> TrainStep:
    shape = Mesh(dp=mesh.dp, features=mesh.features)
    plan = plan_of(mesh=shape, batch_size=BATCH, token_budget=BATCH * 100, activation=TopK(k=K), **fields)
    return step_of(plan, mesh)


def _traffic_on(mesh: ProcessMesh, scheme: Literal["batch", "dense"]) -> tuple[Counter[Axis], int]:
    """Bytes of the second step, and the active features of this rank."""
    step = _step_on(mesh, gradient_exchange=scheme)
    first, last = mesh.token_range(BATCH)
    step(0, data(BATCH, seed=0)[first:last])
    before = mesh.sent_bytes.copy()
    result = step(1, data(BATCH, seed=1)[first:last])
    return mesh.sent_bytes - before, result.n_active


@pytest.mark.parametrize(("dp", "features"), [(1, 2), (2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("scheme", ["batch", "dense"])
def test_a_step_sends_what_the_documentation_says(
    ranks: RankPool, scheme: Literal["batch", "dense"], dp: int, features: int
) -> None:
    answers = ranks.run(_traffic_on, dp, features, scheme)
    n_tokens = BATCH // dp
    over_features = 4 * n_tokens * K + 4 * n_tokens * D_IN + 4 * D_IN + 8
    for rank, (sent, _) in enumerate(answers):
        picks = max(n for other, (_, n) in enumerate(answers) if other % features == rank % features)
        exchanged = 8 * n_tokens * D_IN + 16 * picks + 8
        dense = 4 * (96 // features) * (2 * D_IN + 2) + 8 * D_IN
        over_dp = (exchanged if scheme == "batch" else dense) + 16
        assert sent["features"] == (over_features if features > 1 else 0)
        assert sent["dp"] == (over_dp if dp > 1 else 0)
        assert sent["world"] == 0


def _losses_on(mesh: ProcessMesh, scheme: Literal["batch", "dense"]) -> tuple[list[float], list[torch.Tensor]]:
    step = _step_on(mesh, gradient_exchange=scheme, dead_after_tokens=200)
    first, last = mesh.token_range(BATCH)
    losses = [step(t, data(BATCH, seed=t)[first:last]).loss for t in range(20)]
    return losses, [*step.parameters.tensors().values(), step.n_tokens_since_fired]


@pytest.mark.parametrize(("dp", "features"), [(2, 1), (2, 2), (4, 1)])
def test_dense_gradients_lead_where_the_exchanged_batch_does(ranks: RankPool, dp: int, features: int) -> None:
    expected, _ = _losses_on(ProcessMesh.single(), "batch")
    answers = ranks.run(_losses_on, dp, features, "dense")
    for losses, _ in answers:
        assert losses == pytest.approx(expected, rel=1e-6)
    for rank, (_, state) in enumerate(answers):
        replica_0 = answers[rank % features][1]
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(state, replica_0, strict=True))


def test_the_cheaper_scheme_is_chosen_by_size() -> None:
    large = plan_of(d_in=512, d_sae=2**17, batch_size=4096, token_budget=4096, mesh=Mesh(dp=2), activation=TopK(k=32))
    small = plan_of(d_in=512, d_sae=1024, batch_size=4096, token_budget=4096, mesh=Mesh(dp=2), activation=TopK(k=32))
    assert large.shape.exchanges_batch and not small.shape.exchanges_batch
    forced = plan_of(d_in=512, d_sae=2**17, batch_size=4096, token_budget=4096, gradient_exchange="dense")
    assert not forced.shape.exchanges_batch


def test_nested_time_counts_for_the_innermost(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 2.0, 6.0, 7.0])
    monkeypatch.setattr("gnomon_workers.parallel.clock.time.perf_counter", lambda: next(moments))
    clock = StepClock()
    with clock.section("sparse"), clock.section("communication"):
        pass
    times = clock.lap()
    assert set(times) == set(WORK)
    assert (times["sparse"], times["communication"]) == (3.0, 4.0)
    assert times["gemm"] == 0 and not any(clock.lap().values())


def test_every_class_of_work_of_a_step_is_timed(ranks: RankPool) -> None:
    for times in ranks.run(_times_on, 2, 2):
        assert set(times) == set(WORK) and all(seconds > 0 for seconds in times.values())


def _times_on(mesh: ProcessMesh) -> dict[str, float]:
    step = _step_on(mesh)
    first, last = mesh.token_range(BATCH)
    step(0, data(BATCH)[first:last])
    return mesh.clock.lap()


def _sharded_on(
    mesh: ProcessMesh, folder: str, shard: bool, alignment: Alignment
) -> tuple[list[float], int, Checkpoint]:
    """Losses of 12 steps with a save and a load between, bytes of moments, and the checkpoint."""
    fields = {"shard_optimizer": shard, "gradient_exchange": "batch", "alignment": alignment, "d_sae": 100}
    place = Location.open(folder)
    first, last = mesh.token_range(BATCH)
    step = _step_on(mesh, **fields)
    losses = [step(t, data(BATCH, seed=t)[first:last]).loss for t in range(6)]
    saved = save_checkpoint(place, step, number=6, attempt=1)
    resumed = _step_on(mesh, **fields)
    load_checkpoint(place, saved, resumed)
    losses += [resumed(t, data(BATCH, seed=t)[first:last]).loss for t in range(6, 12)]
    n_bytes = sum(moment.nbytes for moment in (*resumed.optimizer.first.values(), *resumed.optimizer.second.values()))
    return losses, n_bytes, saved


@pytest.mark.parametrize("alignment", ["orth", "tied", "scale"])
@pytest.mark.parametrize(("dp", "features"), [(2, 1), (2, 2), (4, 1)])
def test_sharing_the_optimizer_changes_its_memory_alone(
    ranks: RankPool, tmp_path: Path, alignment: Alignment, dp: int, features: int
) -> None:
    """Losses, and the very bytes of checkpoints, are those of replicas that each keep all moments."""
    folders = [(tmp_path / name).as_uri() for name in ("whole", "shared")]
    whole = ranks.run(_sharded_on, dp, features, folders[0], False, alignment)
    shared = ranks.run(_sharded_on, dp, features, folders[1], True, alignment)
    for (losses, n_bytes, saved), (expected, all_bytes, wanted) in zip(shared, whole, strict=True):
        assert losses == expected
        assert [shard.digest for shard in saved.shards] == [shard.digest for shard in wanted.shards]
        assert n_bytes < (1 / dp + 0.1) * all_bytes
