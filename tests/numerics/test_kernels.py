"""The sparse kernels equal the dense ones over whole steps; Triton's are compared in triton_cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gnomon.errors import InvalidRequest
from gnomon.specs import Activation, Alignment, TopK
from gnomon_workers.kernels import blocks
from gnomon_workers.kernels.choice import choose_kernels
from gnomon_workers.kernels.sparse import SparseKernels
from tests.support.steps import data, plan_of, step_of
from tests.support.variants import FIELDS, VARIANTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("activation", VARIANTS.values(), ids=VARIANTS)
def test_steps_equal_those_of_the_dense_kernels(activation: Activation) -> None:
    check_steps(activation=activation)


def check_steps(**fields: Any) -> None:
    """Six steps, the last with dead features."""
    losses, weights = {}, {}
    for kernels in ("reference", "sparse"):
        step = step_of(plan_of(**{**FIELDS, **fields, "kernels": kernels}), dtype=torch.float64)
        losses[kernels] = [step(t, data(64, seed=t, dtype=torch.float64)).objective for t in range(6)]
        weights[kernels] = step.parameters.tensors()
    assert losses["sparse"] == pytest.approx(losses["reference"], rel=1e-12)
    for name, weight in weights["sparse"].items():
        # Adam divides by the root of the second moment, which is of the size of eps where a gradient is
        torch.testing.assert_close(weight, weights["reference"][name], rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("alignment", ["orth", "tied"])
def test_going_through_all_features_or_those_with_picks_moves_alike(
    share: float, alignment: Alignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "WHOLE_SHARE", share)
    check_steps(alignment=alignment, activation=TopK(k=2))


@pytest.mark.parametrize("alignment", ["none", "scale", "stopgrad", "tied"])
def test_every_alignment_moves_as_with_the_dense_kernels(alignment: Alignment) -> None:
    check_steps(alignment=alignment)


def test_kernels_that_cannot_run_are_refused() -> None:
    assert isinstance(choose_kernels("auto", CPU), SparseKernels)
    with pytest.raises(InvalidRequest, match="needs a CUDA device") as refused:
        choose_kernels("triton", CPU)
    assert refused.value.code == "kernels_unavailable"
