"""Checkpoints: resume is exact, on another mesh close; a checkpoint is whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.specs import Activation, AuxK, BatchTopK, Mesh, TopK
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.shuffle import BatchReader
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.train.checkpoints import latest_checkpoint, load_checkpoint, state_tensors
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.rank import make_step
from gnomon_workers.train.step import TrainStep
from tests.numerics.ranks import RankPool
from tests.numerics.steps import plan_of
from tests.stores import HOOK, make_store

BATCH, N_STEPS, D_IN = 64, 40, 16


class Stopped(Exception):
    """The process died here."""


def run(
    mesh: ProcessMesh, root: Path, folder: str, activation: Activation, *, attempt: int = 1, stop_at: int = N_STEPS
) -> tuple[TrainStep, dict[int, float]]:
    """Train as a rank does, from the last checkpoint, until the end or a sudden stop; losses by step."""
    plan = plan_of(
        d_in=D_IN,
        d_sae=64,
        mesh=Mesh(dp=mesh.dp, features=mesh.features),
        batch_size=BATCH,
        token_budget=BATCH * N_STEPS,
        activation=activation,
        dead_after_tokens=500,
        optimizer={"lr": 5e-3},
        log_every=1,
        checkpoint_every=8,
    )
    checkpoints = Location.open(f"file://{root}").child(folder)
    store = ActivationStore.open(Location.open(f"file://{root}").child("activations", "act_" + "1" * 32))
    losses: dict[int, float] = {}

    def report(kind: str, **data: Any) -> None:
        if kind == "metrics":
            losses[data["step"]] = data["loss"]
            if data["step"] == stop_at < N_STEPS:
                raise Stopped

    resume, _ = latest_checkpoint(checkpoints)
    with BatchReader(store, HOOK, seed=plan.seed, batch_size=BATCH) as reader:
        step = make_step(plan, mesh, reader.first_sample(512), torch.device("cpu"))
        if resume is not None:
            load_checkpoint(checkpoints, resume, step)
        try:
            train(
                step,
                reader,
                first_step=resume.step if resume else 0,
                attempt=attempt,
                checkpoints=checkpoints,
                observer=Observer(report=report, beat=lambda: None),
            )
        except Stopped:
            mesh.barrier()
    return step, losses


def _run_on(mesh: ProcessMesh, *args: Any) -> tuple[dict[str, Tensor], dict[int, float], float]:
    step, losses = run(mesh, *args[:3], attempt=args[3], stop_at=args[4])
    return state_tensors(step), losses, step.threshold


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    make_store(tmp_path, d_in=D_IN)
    yield tmp_path


ACTIVATIONS: list[Activation] = [TopK(k=4), BatchTopK(k=4), TopK(k=4, aux=AuxK(k=4))]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["topk", "batchtopk", "topk+aux"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(ranks: RankPool, root: Path, activation: Activation) -> None:
    whole = ranks.run(_run_on, 2, 2, root, "whole", activation, 1, N_STEPS)
    first = ranks.run(_run_on, 2, 2, root, "cut", activation, 1, 21)
    second = ranks.run(_run_on, 2, 2, root, "cut", activation, 2, N_STEPS)
    assert min(second[0][1]) == 17  # from the checkpoint of step 16; 17 to 21 are replayed
    for (state, losses, threshold), (_, before, _), (resumed, after, threshold_after) in zip(
        whole, first, second, strict=True
    ):
        assert {**before, **after} == losses
        assert all(after[t] == before[t] for t in range(17, 22))
        assert threshold_after == threshold
        assert all(torch.equal(state[name], resumed[name]) for name in state)


def test_resume_on_another_mesh_continues_the_same_run(ranks: RankPool, root: Path) -> None:
    activation = BatchTopK(k=4)
    _, losses = run(ProcessMesh.single(), root, "whole", activation)
    ranks.run(_run_on, 2, 2, root, "cut", activation, 1, 21)
    _, after = run(ProcessMesh.single(), root, "cut", activation, attempt=2)
    assert min(after) == 17
    assert max(abs(after[t] - losses[t]) / losses[t] for t in after) <= 1e-5


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(root: Path) -> None:
    activation = TopK(k=4)
    _, losses = run(ProcessMesh.single(), root, "cut", activation)
    folders = sorted(path for path in (root / "cut").iterdir())
    assert [path.name for path in folders] == ["step-00000032.a0001", "step-00000040.a0001"]
    shard = folders[1] / "shard-0000-of-0001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    found, damaged = latest_checkpoint(Location.open(f"file://{root}").child("cut"))
    assert found is not None and found.step == 32
    assert len(damaged) == 1 and "not what was committed" in damaged[0]
    _, after = run(ProcessMesh.single(), root, "cut", activation, attempt=2)
    assert after == {t: losses[t] for t in range(33, N_STEPS + 1)}


def test_a_checkpoint_without_manifest_does_not_exist(root: Path) -> None:
    run(ProcessMesh.single(), root, "cut", TopK(k=4))
    for path in (root / "cut").iterdir():
        (path / "manifest.json").unlink()
    assert latest_checkpoint(Location.open(f"file://{root}").child("cut")) == (None, [])


def test_checkpoints_record_the_alignment_and_keep_it(root: Path) -> None:
    run(ProcessMesh.single(), root, "cut", TopK(k=4))
    found, _ = latest_checkpoint(Location.open(f"file://{root}").child("cut"))
    assert found is not None and 0 < found.max_alignment_deviation <= 1e-5


def _differing_replica_on(mesh: ProcessMesh, root: Path) -> str:
    plan = plan_of(mesh=Mesh(dp=2), d_in=D_IN, d_sae=64)
    step = make_step(plan, mesh, torch.zeros(4, D_IN).numpy(), torch.device("cpu"))
    step.parameters.b_enc[3] += mesh.replica * 1e-7
    from gnomon_workers.train.checkpoints import save_checkpoint

    try:
        save_checkpoint(Location.open(f"file://{root}").child("replicas"), step, number=1, attempt=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_replicas_that_differ_stop_the_job(ranks: RankPool, root: Path) -> None:
    answers = ranks.run(_differing_replica_on, 2, 1, root)
    assert all("CorruptArtifact: replicas [1] of shard 0 differ" in answer for answer in answers)
    assert latest_checkpoint(Location.open(f"file://{root}").child("replicas")) == (None, [])
