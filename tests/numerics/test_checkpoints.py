"""Checkpoints: resume is exact, on another mesh close; a checkpoint is whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.events import EventData, TrainingMeasured
from gnomon.specs import Activation, AuxK, BatchTopK, Mesh, TopK
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.shuffle import BatchReader
from gnomon_workers.checkpoints.format import committed_checkpoints
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.rank import make_step
from gnomon_workers.train.run import Training
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.state import load_checkpoint, state_tensors
from gnomon_workers.train.step import TrainStep
from tests.support.checkpoints import latest_whole
from tests.support.ranks import RankPool
from tests.support.steps import data, plan_of, step_of
from tests.support.stores import HOOK, make_store
from tests.support.waiting import wait_until

BATCH, N_STEPS, LONG, D_IN = 64, 40, 132, 16
EVERY = 8
"""Steps between two checkpoints."""


class Stopped(Exception):
    """The process died here."""


def run(
    mesh: ProcessMesh,
    root: Path,
    folder: str,
    activation: Activation,
    *,
    attempt: int = 1,
    n_steps: int = N_STEPS,
    stop_at: int | None = None,
) -> tuple[TrainStep, dict[int, float]]:
    """Train as a rank does, from the last checkpoint, until the end or a sudden stop; losses by step."""
    plan = plan_of(
        d_in=D_IN,
        d_sae=64,
        mesh=Mesh(dp=mesh.dp, features=mesh.features),
        batch_size=BATCH,
        token_budget=BATCH * n_steps,
        activation=activation,
        dead_after_tokens=500,
        optimizer={"lr": 5e-3},
        log_every=1,
        checkpoint_every=EVERY,
    )
    checkpoints = Location.open(f"file://{root}").child(folder)
    store = ActivationStore.open(Location.open(f"file://{root}").child("activations", "act_" + "1" * 32))
    losses: dict[int, float] = {}

    def report(told: EventData) -> None:
        if isinstance(told, TrainingMeasured):
            losses[told.step] = told.loss or 0.0
            if stop_at is not None and told.step == stop_at:
                wait_for(checkpoints, stop_at - stop_at % EVERY)
                raise Stopped

    resume, _ = latest_whole(checkpoints)
    with BatchReader(store, HOOK, seed=plan.spec.seed, batch_size=BATCH) as reader:
        step = make_step(plan, mesh, reader.first_sample(512), torch.device("cpu"))
        if resume is not None:
            load_checkpoint(checkpoints, resume, step)
        try:
            train(
                [Training(plan=plan, checkpoints=checkpoints, dictionary=checkpoints, resume=resume)],
                [step],
                reader,
                attempt=attempt,
                observer=Observer(report=report, beat=lambda: None),
            )
        except Stopped:
            mesh.barrier()
    return step, losses


def wait_for(checkpoints: Location, step: int) -> None:
    """Wait until the checkpoint of a step is committed."""
    wait_until(
        lambda: next((found.step for found in committed_checkpoints(checkpoints)), 0) >= step,
        f"the checkpoint of step {step}",
        every_s=0.01,
    )


def _run_on(
    mesh: ProcessMesh, *args: Any, **options: Any
) -> tuple[dict[str, Tensor], dict[int, float], dict[str, float]]:
    step, losses = run(mesh, *args, **options)
    return state_tensors(step), losses, step.state


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    make_store(tmp_path, d_in=D_IN)
    yield tmp_path


ACTIVATIONS: list[Activation] = [TopK(k=4), BatchTopK(k=4), TopK(k=4, aux=AuxK(k=4))]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["topk", "batchtopk", "topk+aux"])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(ranks: RankPool, root: Path, activation: Activation) -> None:
    whole = ranks.run(_run_on, 2, 2, root, "whole", activation)
    first = ranks.run(_run_on, 2, 2, root, "cut", activation, stop_at=21)
    second = ranks.run(_run_on, 2, 2, root, "cut", activation, attempt=2)
    assert min(second[0][1]) == 17  # from the checkpoint of step 16; 17 to 21 are replayed
    for (state, losses, numbers), (_, before, _), (resumed, after, numbers_after) in zip(
        whole, first, second, strict=True
    ):
        assert {**before, **after} == losses
        assert all(after[t] == before[t] for t in range(17, 22))
        assert numbers_after == numbers
        assert all(torch.equal(state[name], resumed[name]) for name in state)


MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4))


def _save_on(mesh: ProcessMesh, root: Path) -> None:
    plan = plan_of(mesh=Mesh(dp=mesh.dp, features=mesh.features), activation=BatchTopK(k=4), batch_size=BATCH)
    step = step_of(plan, mesh)
    lo, hi = mesh.token_range(BATCH)
    for t in range(3):
        step(t, data(BATCH, seed=t)[lo:hi])
    save_checkpoint(_folder(root, mesh.dp, mesh.features), step, number=3, attempt=1)


def _load_on(mesh: ProcessMesh, root: Path) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    plan = plan_of(mesh=Mesh(dp=mesh.dp, features=mesh.features), activation=BatchTopK(k=4), batch_size=BATCH)
    found = []
    for dp, features in MESHES:
        step = step_of(plan, mesh)
        folder = _folder(root, dp, features)
        load_checkpoint(folder, next(committed_checkpoints(folder)), step)
        found.append((state_tensors(step), step.state))
    return found


def _folder(root: Path, dp: int, features: int) -> Location:
    return Location.open(f"file://{root}").child(f"{dp}x{features}")


def test_any_mesh_reads_the_checkpoint_of_any_other_to_the_bit(ranks: RankPool, tmp_path: Path) -> None:
    for mesh in MESHES:
        ranks.run(_save_on, *mesh, tmp_path)
    whole = ranks.run(_load_on, 1, 1, tmp_path)[0]
    for dp, features in MESHES[1:]:
        read = ranks.run(_load_on, dp, features, tmp_path)
        for replica in range(dp):
            parts = read[replica * features : (replica + 1) * features]
            for number, (state, numbers) in enumerate(whole):
                assert all(part[number][1] == numbers for part in parts)
                for name, tensor in state.items():
                    pieces = [part[number][0][name] for part in parts]
                    found = pieces[0] if pieces[0].shape == tensor.shape else torch.cat(pieces)
                    assert torch.equal(found, tensor), f"{MESHES[number]} read on {dp} x {features}: {name}"


@pytest.mark.parametrize("mesh", MESHES[1:], ids=["1x2", "2x1", "2x2", "1x4"])
def test_resume_on_another_mesh_continues_the_same_run(
    ranks: RankPool, cut_at_32: tuple[Path, dict[int, float]], mesh: tuple[int, int]
) -> None:
    root, losses = cut_at_32
    folder = f"on-{mesh[0]}-{mesh[1]}"
    shutil.copytree(root / "cut", root / folder)
    after = ranks.run(_run_on, *mesh, root, folder, BatchTopK(k=4), attempt=2, n_steps=LONG)[0][1]
    assert sorted(after) == list(range(33, 133))
    assert max(abs(after[t] - losses[t]) / losses[t] for t in after) <= 1e-6


@pytest.fixture(scope="module")
def cut_at_32(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> tuple[Path, dict[int, float]]:
    """A run on one rank that left a checkpoint at step 32 and went on, and its losses."""
    root = tmp_path_factory.mktemp("meshes")
    make_store(root, d_in=D_IN)
    activation = BatchTopK(k=4)
    _, losses = run(ProcessMesh.single(), root, "whole", activation, n_steps=LONG)
    run(ProcessMesh.single(), root, "cut", activation, n_steps=LONG, stop_at=37)
    return root, losses


def flip(place: Path) -> None:
    shard = place / "shard-0001-of-0002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


def truncate(place: Path) -> None:
    shard = place / "shard-0000-of-0002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def drop(place: Path) -> None:
    (place / "shard-0001-of-0002.safetensors").unlink()


def swap(place: Path) -> None:
    first, second = (place / f"shard-{i:04d}-of-0002.safetensors" for i in range(2))
    first.rename(place / "x")
    second.rename(first)
    (place / "x").rename(second)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> tuple[Path, dict[int, float]]:
    """The folder of a finished run on two shards, and its losses."""
    root = tmp_path_factory.mktemp("shards")
    make_store(root, d_in=D_IN)
    losses = ranks.run(_run_on, 1, 2, root, "cut", TopK(k=4))[0][1]
    return root, losses


@pytest.mark.parametrize("damage", [flip, truncate, drop, swap])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    ranks: RankPool, two_shards: tuple[Path, dict[int, float]], damage: Callable[[Path], None]
) -> None:
    root, losses = two_shards
    folder = damage.__name__
    shutil.copytree(root / "cut", root / folder)
    assert sorted(path.name for path in (root / folder).iterdir()) == ["step-00000032.a0001", "step-00000040.a0001"]
    damage(root / folder / "step-00000040.a0001")
    found, damaged = latest_whole(Location.open(f"file://{root}").child(folder))
    assert found is not None and found.step == 32
    assert len(damaged) == 1 and "step-00000040.a0001/shard" in damaged[0]
    if damage is flip:
        after = ranks.run(_run_on, 1, 2, root, folder, TopK(k=4), attempt=2)[0][1]
        assert after == {t: losses[t] for t in range(33, N_STEPS + 1)}


def test_a_checkpoint_without_manifest_does_not_exist(root: Path) -> None:
    run(ProcessMesh.single(), root, "cut", TopK(k=4))
    for path in (root / "cut").iterdir():
        (path / "manifest.json").unlink()
    assert latest_whole(Location.open(f"file://{root}").child("cut")) == (None, [])


def test_checkpoints_record_the_alignment_and_keep_it(root: Path) -> None:
    run(ProcessMesh.single(), root, "cut", TopK(k=4))
    found, _ = latest_whole(Location.open(f"file://{root}").child("cut"))
    assert found is not None and found.max_alignment_deviation is not None
    assert 0 < found.max_alignment_deviation <= 1e-5


def _differing_replica_on(mesh: ProcessMesh, root: Path) -> str:
    plan = plan_of(mesh=Mesh(dp=2), d_in=D_IN, d_sae=64)
    step = make_step(plan, mesh, torch.zeros(4, D_IN).numpy(), torch.device("cpu"))
    step.parameters.b_enc[3] += mesh.replica * 1e-7
    try:
        save_checkpoint(Location.open(f"file://{root}").child("replicas"), step, number=1, attempt=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_replicas_that_differ_stop_the_job(ranks: RankPool, root: Path) -> None:
    answers = ranks.run(_differing_replica_on, 2, 1, root)
    assert "CorruptArtifact: replicas [1] of shard 0 differ" in answers[0]
    assert "1 other ranks could not save step 1" in answers[1]
    assert latest_whole(Location.open(f"file://{root}").child("replicas")) == (None, [])
