"""Training does not depend on the units of its inputs: x -> c x + m makes the same picks at every step, and the same
dictionary after folding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.dictionary import Dictionary, load_folder
from gnomon.errors import InvalidRequest
from gnomon.specs import Alignment, TrainSpec
from gnomon_storage.location import Location
from gnomon_workers.sae.plan import HookRows, TrainPlan, make_hook
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.step import TrainStep
from tests.support.exported import exported
from tests.support.steps import STORE, data, joint_plan_of, step_of
from tests.support.variants import FIELDS, VARIANTS

N_BATCHES = 12
WIDTHS = (24, 16)
ALIGNMENTS: list[Alignment] = ["orth", "none", "scale", "stopgrad", "tied"]


class Units:
    """The same activations of some hooks, each in units of its own: c x + m."""

    def __init__(self, scales: Sequence[float], offset: float) -> None:
        generator = torch.Generator().manual_seed(7)
        self.scales = scales
        self.offsets = [offset * torch.randn(width, generator=generator, dtype=torch.float64) for width in WIDTHS]

    def batches(self, n_hooks: int) -> list[list[Tensor]]:
        """(64, width) rows by batch and hook."""
        return [
            [
                self.scales[i] * data(64, seed=100 * i + t, d_in=WIDTHS[i], dtype=torch.float64) + self.offsets[i]
                for i in range(n_hooks)
            ]
            for t in range(N_BATCHES)
        ]


PLAIN, OTHER = Units((1.0, 1.0), 0.0), Units((37.5, 0.5), 300.0)


def hooks_of(spec: TrainSpec, batches: list[list[Tensor]]) -> list[HookRows]:
    """The hooks of the batches as a store knows them: by the mean and mean squared norm of all their rows."""
    hooks = []
    for i in range(len(batches[0])):
        rows = torch.cat([parts[i] for parts in batches])
        squared = float(rows.square().sum(1).mean())
        hooks.append(make_hook(spec, f"layers.{i}", mean=rows.mean(0).tolist(), mean_squared_norm=squared))
    return hooks


def run(units: Units, n_hooks: int, *, is_transcoder: bool = False, **fields: Any) -> tuple[TrainStep, list[Any]]:
    """A float64 step after all batches, with what it picked and lost at each."""
    batches = units.batches(n_hooks)
    given = {**FIELDS, "token_budget": 64 * N_BATCHES, "d_sae": 96, **fields}
    hooks = hooks_of(TrainSpec(activations=STORE, **given), batches)
    inputs, target = (hooks[:1], hooks[1]) if is_transcoder else (hooks, None)
    step = step_of(joint_plan_of(*inputs, target=target, **given), dtype=torch.float64)
    seen: list[Any] = []
    for t, parts in enumerate(batches):
        x = torch.cat(parts, dim=1)
        picks = step.select(x)
        result = step(t, x)
        seen.append((picks.features.tolist(), picks.token_indices().tolist(), result.n_active, result.loss))
    return step, seen


def folded(folder: Path, step: TrainStep) -> Dictionary:
    """The dictionary of a step as a user loads it, without its training's units."""
    folder.mkdir()
    checkpoints = Location.open(f"file://{folder}").child("checkpoints")
    checkpoint = save_checkpoint(checkpoints, step, number=N_BATCHES, attempt=1)
    return load_folder(exported(folder / "out", step.plan, checkpoint, checkpoints)).double()


def check(tmp_path: Path, n_hooks: int, *, is_transcoder: bool = False, **fields: Any) -> None:
    """Training in two units picks alike at every step, and makes dictionaries that do the same in their units."""
    plain, picked = run(PLAIN, n_hooks, is_transcoder=is_transcoder, **fields)
    other, picked_there = run(OTHER, n_hooks, is_transcoder=is_transcoder, **fields)
    for here, there in zip(picked, picked_there, strict=True):
        assert here[:3] == there[:3] and here[0]
        assert there[3] == pytest.approx(here[3], rel=1e-7)
    inputs = [slice(0, plain.plan.d_in), slice(0, other.plan.d_in)]
    hats = []
    for units, step, columns in zip((PLAIN, OTHER), (plain, other), inputs, strict=True):
        dictionary = folded(tmp_path / f"{units.scales[0]}", step)
        x = torch.cat(units.batches(n_hooks)[0], dim=1)
        acts, hat = dictionary.encode(x[:, columns]), dictionary(x[:, columns])
        hats.append((acts * step.plan.output_scale, _normalised(step.plan, hat)))
    (acts, hat), (acts_there, hat_there) = hats
    assert int((acts > 0).sum()) > 0
    # float32 weights were exported: b_dec holds an offset of 300 in it
    assert (acts - acts_there).abs().max() <= 1e-3 * acts.max()
    assert (hat - hat_there).norm() <= 1e-4 * hat.norm()


def _normalised(plan: TrainPlan, hat: Tensor) -> Tensor:
    """A raw reconstruction, in units that do not depend on its hooks'."""
    outputs = plan.inputs if plan.target is None else (plan.target,)
    means = torch.tensor([value for hook in outputs for value in hook.mean or ()], dtype=torch.float64)
    scales = torch.tensor([hook.scale for hook in outputs for _ in range(hook.width)], dtype=torch.float64)
    return (hat - means) * scales


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_dictionary_does_not_depend_on_units(tmp_path: Path, name: str, alignment: Alignment) -> None:
    check(tmp_path, 1, activation=VARIANTS[name], alignment=alignment)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_crosscoder_does_not_depend_on_the_units_of_any_hook(tmp_path: Path, name: str, alignment: Alignment) -> None:
    check(tmp_path, 2, activation=VARIANTS[name], alignment=alignment)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_transcoder_does_not_depend_on_the_units_of_either_hook(tmp_path: Path, name: str) -> None:
    check(tmp_path, 2, is_transcoder=True, activation=VARIANTS[name], alignment="none")


@pytest.mark.parametrize("normalize", ["centred", "mean_squared_norm", "none"])
def test_activations_that_are_all_the_same_are_refused(normalize: str) -> None:
    spec = TrainSpec.read({"activations": STORE, "d_sae": 96, "token_budget": 10_000, "normalize": normalize})
    with pytest.raises(InvalidRequest, match="all the same") as caught:
        make_hook(spec, "layers.3", mean=(3.0, 4.0), mean_squared_norm=25.0)
    assert caught.value.code == "constant_activations"


def test_biases_move_in_units_of_what_they_are_added_to() -> None:
    """Where nothing is scaled, too: a bias that moved by the rate itself would be lost among inputs of norm 1,000."""
    rows = 1000 * data(4096, dtype=torch.float64)
    squared = float(rows.square().sum(1).mean())
    rates = {}
    for normalize in ("centred", "none"):
        spec = TrainSpec.read({"activations": STORE, "d_sae": 96, "token_budget": 10_000, "normalize": normalize})
        hook = make_hook(spec, "layers.0", mean=rows.mean(0).tolist(), mean_squared_norm=squared)
        rates[normalize] = joint_plan_of(hook).bias_rates["b_dec"] / hook.scale
    assert rates["none"] == pytest.approx(rates["centred"], rel=1e-12)
    rms = float((rows - rows.mean(0)).square().mean().sqrt())
    assert rates["none"] / TrainSpec(activations=STORE, d_sae=96, token_budget=10_000).optimizer.b_dec_rate == (
        pytest.approx(rms, rel=1e-6)
    )
