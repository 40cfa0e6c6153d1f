"""Steps that are made with matrices while most features are active: when, with what memory, and in which precision.

That their losses and gradients are autograd's is in test_step_oracle.py, and that they are the mesh's in
test_variants_mesh.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gnomon.specs import Activation, Gated, JumpReLU, PAnneal, ReLU
from gnomon_workers.sae.gradient import SparseGradient
from gnomon_workers.sae.variants.dense import DENSE_SHARE, DENSITY, DenseGradient
from gnomon_workers.train.step import TrainStep
from tests.support.steps import data, gradients_of, plan_of, step_of, unsettle

ACTIVATIONS: dict[str, Activation] = {
    "relu": ReLU(l1_coefficient=0.1, warmup_steps=0),
    "jumprelu": JumpReLU(l0_coefficient=0.02, bandwidth=0.05, initial_threshold=0.01, warmup_steps=0),
    "gated": Gated(l1_coefficient=0.1, warmup_steps=0),
    "p_anneal": PAnneal(l1_coefficient=0.1, start_step=10, n_updates=2, final_p=0.3, warmup_steps=0),
}


def kind_of_gradient(step: TrainStep) -> type:
    """What the next step would be made of."""
    batch = step._batch(0, *step._inputs_and_targets(data(32)))
    return type(step.variant.terms(batch).gradient)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_density_of_a_step_decides_how_the_next_is_made(name: str) -> None:
    step = step_of(plan_of(activation=ACTIVATIONS[name]))
    assert kind_of_gradient(step) is DenseGradient, "half of all features are active at first"
    result = step(0, data(32))
    assert step.state[DENSITY] == pytest.approx(result.n_active / (32 * step.plan.d_sae), abs=0.02)
    assert step.state[DENSITY] > DENSE_SHARE[torch.float32]
    for vector in ("b_enc", "b_gate"):
        if vector in step.parameters.tensors():
            step.parameters.tensors()[vector].fill_(-0.45)
    if name == "jumprelu":
        step.parameters.vectors["log_threshold"].fill_(-1.0)
    step(1, data(32))
    assert 0 < step.state[DENSITY] < DENSE_SHARE[torch.float32]
    assert kind_of_gradient(step) is SparseGradient


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_products_in_bfloat16_are_near_those_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        step = step_of(plan_of(activation=ACTIVATIONS[name]))
        unsettle(step)
        step._dense_dtype = dtype
        found.append(gradients_of(step, data(32), monkeypatch))
    (exact, wanted), (rounded, result) = found
    assert result.n_active == wanted.n_active
    assert result.parts["penalty"] == pytest.approx(wanted.parts["penalty"], rel=1e-6)
    assert result.loss == pytest.approx(wanted.loss, rel=1e-2)
    for parameter, gradient in exact.items():
        error = (rounded[parameter] - gradient).norm() / gradient.norm()
        assert 0 < error < 2e-2, parameter


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most entries that any result of an operation had, but for the encoder's product and views of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if "addmm" not in str(func) and not str(func).startswith(("aten.slice", "aten.t.", "aten.view")):
            sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
            self.n_entries = max(self.n_entries, *sizes, 0)
        return results


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nothing_as_large_as_the_pre_activations_is_held_beside_them(name: str) -> None:
    n_tokens, d_sae = 4096, 1024
    step = step_of(plan_of(activation=ACTIVATIONS[name], batch_size=n_tokens, d_sae=d_sae, token_budget=n_tokens * 9))
    step(0, data(n_tokens))  # which makes the buffer of the pre-activations
    with Largest() as largest:
        step(1, data(n_tokens))
    assert 0 < largest.n_entries <= n_tokens * d_sae // 4
