"""Loss curves that were recorded once: a change that should not touch the arithmetic must leave them as they are.

`python -m tests.numerics.test_variants_golden` records them anew, for a change that should.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.steps import data, plan_of, step_of
from tests.support.variants import FIELDS, N_STEPS, VARIANTS

GOLDEN = Path(__file__).parent / "golden/losses.json"
EVERY = 7
"""Steps between two losses that are kept."""


def curve(name: str) -> dict[str, list[float]]:
    """Losses, objectives and L0 of a run in float64, where rounding has no part in them."""
    step = step_of(plan_of(activation=VARIANTS[name], **FIELDS), dtype=torch.float64)
    results = [step(t, data(64, seed=t, dtype=torch.float64)) for t in range(N_STEPS)][::EVERY]
    return {
        "loss": [result.loss for result in results],
        "objective": [result.objective for result in results],
        "l0": [result.n_active / 64 for result in results],
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_curve_is_the_recorded_one(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    found = curve(name)
    for kind, values in golden.items():
        assert found[kind] == pytest.approx(values, rel=1e-4), kind


def test_every_variant_learns_in_its_recorded_run() -> None:
    for name, golden in json.loads(GOLDEN.read_text()).items():
        assert golden["loss"][-1] < 0.8 * golden["loss"][0], name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: curve(name) for name in VARIANTS}, indent=1) + "\n")
