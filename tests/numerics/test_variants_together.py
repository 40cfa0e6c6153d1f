"""Dictionaries that are trained together: each is what it would be alone, and all go on from the same step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.errors import GnomonError, StoreUnavailable
from gnomon.events import EventData, TrainingMeasured
from gnomon.specs import Mesh, TrainSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import latest_common
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.runtime import failpoints
from gnomon_workers.sae.plan import TrainPlan, make_plan
from gnomon_workers.train.loop import Observer, train
from gnomon_workers.train.rank import make_step
from gnomon_workers.train.run import Training
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.sources import JointReader
from gnomon_workers.train.state import load_checkpoint, state_tensors
from tests.support.ranks import RankPool
from tests.support.steps import data, plan_of, step_of
from tests.support.stores import HOOK, make_store

D_IN, BATCH, N_STEPS, EVERY = 16, 32, 20, 5
STORE_ID = "act_" + "1" * 32
VARIANTS: list[dict[str, Any]] = [
    {"name": "k4"},
    {"name": "batch", "activation": {"kind": "batchtopk", "k": 6}, "lr": 2e-3},
    {"name": "seed", "seed": 5, "k": 3, "alignment": "none"},
    {"name": "jump", "activation": {"kind": "jumprelu"}},
]
Run = tuple[dict[str, dict[str, Tensor]], dict[str, dict[int, float]]]
"""States and losses by step, by the names of variants."""


def plans(mesh: ProcessMesh) -> dict[str, TrainPlan]:
    """The plans of all variants."""
    spec = TrainSpec.model_validate(
        {
            "activations": {"kind": "store", "id": STORE_ID},
            "d_sae": 64,
            "activation": {"kind": "topk", "k": 4},
            "batch_size": BATCH,
            "token_budget": BATCH * N_STEPS,
            "optimizer": {"lr": 5e-3},
            "log_every": 1,
            "checkpoint_every": EVERY,
            "variants": VARIANTS,
        }
    )
    on = Mesh(dp=mesh.dp, features=mesh.features)
    return {
        name: make_plan(its_spec, d_in=D_IN, mesh=on, mean_squared_norm=1.0)
        for name, its_spec in zip(spec.variant_names, spec.variant_specs(), strict=True)
    }


def run_on(mesh: ProcessMesh, root: Path, folder: str, names: list[str], *, attempt: int = 1) -> Run:
    """Train some of the variants together, from the last step that all have, as a rank does."""
    place = Location.open(f"file://{root}").child(folder)
    store = ActivationStore.open(Location.open(f"file://{root}").child("activations", STORE_ID))
    chosen = {name: plan for name, plan in plans(mesh).items() if name in names}
    losses: dict[str, dict[int, float]] = {name: {} for name in chosen}

    def report(told: EventData) -> None:
        if isinstance(told, TrainingMeasured):
            losses[told.variant or ""][told.step] = told.loss or 0.0

    resume, _ = latest_common([place.child(name) for name in chosen])
    seeds = {plan.data_seed for plan in chosen.values()}
    with JointReader(store, [HOOK], seed=seeds.pop(), batch_size=BATCH) as reader:
        sample = reader.first_sample(512)
        trainings = [
            Training(plan=plan, checkpoints=place.child(name), dictionary=place, variant=name, resume=checkpoint)
            for (name, plan), checkpoint in zip(chosen.items(), resume or [None] * len(chosen), strict=True)
        ]
        steps = [make_step(training.plan, mesh, sample, torch.device("cpu")) for training in trainings]
        for training, step in zip(trainings, steps, strict=True):
            if training.resume is not None:
                load_checkpoint(training.checkpoints, training.resume, step)
        train(
            trainings,
            steps,
            reader,
            attempt=attempt,
            observer=Observer(report=report, beat=lambda: None),
        )
    assert not seeds
    return {name: state_tensors(step) for name, step in zip(chosen, steps, strict=True)}, losses


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states agree to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("together")
    make_store(root, d_in=D_IN)
    return root


NAMES = [variant["name"] for variant in VARIANTS]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)], ids=["1x1", "2x2"])
def test_together_each_is_to_the_bit_what_it_is_alone(ranks: RankPool, root: Path, mesh: tuple[int, int]) -> None:
    folder = f"{mesh[0]}x{mesh[1]}"
    together = ranks.run(run_on, *mesh, root, folder, NAMES)
    for name in NAMES if mesh == (1, 1) else ["batch", "seed"]:
        alone = ranks.run(run_on, *mesh, root, f"{folder}-alone", [name])
        for (states, losses), (state, loss) in zip(together, alone, strict=True):
            assert len(loss[name]) == N_STEPS and losses[name] == loss[name]
            assert same(states[name], state[name])
    assert len({tuple(losses.values()) for losses in together[0][1].values()}) == len(NAMES)


def drop_manifest(place: Path) -> None:
    (place / "step-00000020.a0001/manifest.json").unlink()


def damage(place: Path) -> None:
    shard = place / "step-00000020.a0001/shard-0000-of-0001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def never_begun(place: Path) -> None:
    shutil.rmtree(place / "step-00000020.a0001")


@pytest.mark.parametrize("what", [drop_manifest, damage, never_begun])
@pytest.mark.parametrize("whose", ["k4", "jump"])
def test_all_go_on_from_the_last_step_that_all_have(root: Path, whose: str, what: Callable[[Path], None]) -> None:
    folder = f"{what.__name__}-{whose}"
    states, losses = run_on(ProcessMesh.single(), root, folder, NAMES)
    what(root / folder / whose)
    resumed, after = run_on(ProcessMesh.single(), root, folder, NAMES, attempt=2)
    for name in NAMES:
        assert after[name] == {step: loss for step, loss in losses[name].items() if step > 15}
        assert same(resumed[name], states[name])
        # the replayed step took the place of the attempt's before
        left = sorted(path.name for path in (root / folder / name).iterdir())
        assert left == ["step-00000015.a0001", "step-00000020.a0002"]


@pytest.mark.parametrize(
    ("points", "step"),
    [
        ("checkpoint.before_manifest@hit=6:raise", 5),  # of step 10 two at most are committed
        ("checkpoint.after_upload@hit=12:raise", 10),
        ("checkpoint.during_delete@hit=2:raise", 10),
    ],
)
def test_after_an_error_between_the_commits_of_two_no_step_is_lost_that_all_had(
    root: Path, points: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = points.partition("@")[0]
    states, losses = run_on(ProcessMesh.single(), root, f"{folder}-whole", NAMES)
    monkeypatch.setenv(failpoints.VARIABLE, points)
    failpoints.arm(0)
    with pytest.raises(StoreUnavailable):
        run_on(ProcessMesh.single(), root, folder, NAMES)
    monkeypatch.delenv(failpoints.VARIABLE)
    failpoints.arm(0)
    resumed, after = run_on(ProcessMesh.single(), root, folder, NAMES, attempt=2)
    for name in NAMES:
        assert min(after[name]) - 1 >= step and after[name].items() <= losses[name].items()
        assert same(resumed[name], states[name])


def test_later_steps_of_an_attempt_before_do_not_outlive_those_that_are_made_now(tmp_path: Path) -> None:
    folder = Location.open(f"file://{tmp_path}").child("checkpoints")
    step = step_of(plan_of())
    step(0, data(32))
    for number in (40, 48):
        save_checkpoint(folder, step, number=number, attempt=1)
    save_checkpoint(folder, step, number=8, attempt=2)
    assert folder.list() == ["step-00000008.a0002"]
    save_checkpoint(folder, step, number=16, attempt=2)
    # an attempt that is over, and does not know it, deletes nothing of its successor
    save_checkpoint(folder, step, number=56, attempt=1)
    assert folder.list() == ["step-00000008.a0002", "step-00000016.a0002", "step-00000056.a0001"]
    save_checkpoint(folder, step, number=24, attempt=2)
    assert folder.list() == ["step-00000016.a0002", "step-00000024.a0002"]


def test_an_error_says_of_which_variant_it_is(root: Path) -> None:
    spoiled = plans(ProcessMesh.single())["k4"]
    step = make_step(spoiled, ProcessMesh.single(), torch.zeros(4, D_IN).numpy(), torch.device("cpu"))
    place = Location.open(f"file://{root}").child("spoiled")
    training = Training(plan=spoiled, checkpoints=place, dictionary=place, variant="k4")
    with pytest.raises(GnomonError) as raised, training.named():
        step(0, torch.full((BATCH, D_IN), torch.inf))
    assert raised.value.message.startswith("variant 'k4': step 0") and raised.value.code == "non_finite"
