"""The sparse step equals the dense autograd oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.specs import Activation, Alignment, AuxK, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_workers.sae.alignment import alignment_scores
from gnomon_workers.sae.plan import HookRows, Normalisation
from gnomon_workers.sae.reference import Reference, reference_gradients
from gnomon_workers.sae.variants.dense import BLOCK_BYTES, DENSITY
from gnomon_workers.sae.variants.topk import threshold_decay
from gnomon_workers.train.step import NonFinite, TrainStep
from tests.support.steps import data, gradients_of, joint_plan_of, plan_of, step_of, unsettle

ALIGNMENTS: list[Alignment] = ["orth", "none", "scale", "stopgrad", "tied"]
ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(k=5),
    "batchtopk": BatchTopK(k=5),
    "topk+aux": TopK(k=5, aux=AuxK(k=8)),
    "batchtopk+aux": BatchTopK(k=5, aux=AuxK(k=8, coefficient=2.0)),
    "matryoshka": Matryoshka(k=5),
    "matryoshka+aux": Matryoshka(k=5, aux=AuxK(k=8, coefficient=2.0)),
    "jumprelu": JumpReLU(l0_coefficient=0.02, bandwidth=0.05, initial_threshold=0.1, warmup_steps=0),
    "jumprelu-target": JumpReLU(l0_coefficient=0.5, target_l0=8, bandwidth=0.05, initial_threshold=0.1, warmup_steps=0),
    "gated": Gated(l1_coefficient=0.1, warmup_steps=0),
    "relu": ReLU(l1_coefficient=0.1, warmup_steps=0),
    "relu-decoder-norm": ReLU(l1_coefficient=0.1, penalty="decoder_norm_l1", warmup_steps=0),
    "p_anneal": PAnneal(l1_coefficient=0.1, start_step=10, n_updates=2, final_p=0.3, warmup_steps=0),
}
PENALTIES = {"jumprelu": 0.02, "jumprelu-target": 0.5, "gated": 0.1, "relu": 0.1, "relu-decoder-norm": 0.1}
EXACT = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
LATE = 80
"""A step at which p has reached its last value."""


def expected_of(step: TrainStep, x: Tensor, name: str, is_dead: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients by autograd in float64, and under "loss" and "objective" what they are of."""
    params = {name: tensor.clone().double() for name, tensor in step.parameters.tensors().items()}
    params.setdefault("W_enc_rows", params["W_dec"])
    reference = Reference(
        activation=step.plan.spec.activation,
        alignment=step.plan.spec.alignment,
        coefficient=0.1 if name == "p_anneal" else PENALTIES.get(name, 0.0),
        p=0.3 if name == "p_anneal" else 1.0,
        is_dead=is_dead,
        k_aux=step.plan.k_aux,
    )
    d_in = step.plan.d_in
    scaled = Normalisation.of(step.plan.hooks, x.double())(x.double())
    target = scaled[:, d_in:] if step.plan.target is not None else None
    found = reference_gradients(scaled[:, :d_in], params, reference, target=target)
    return {**found.grads, "loss": found.loss, "objective": found.objective}


def check(
    step: TrainStep,
    x: Tensor,
    name: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
    is_dead: Tensor | None = None,
) -> None:
    """The step's gradients and losses are the oracle's."""
    expected = expected_of(step, x, name, is_dead)
    actual, result = gradients_of(step, x, monkeypatch, number=LATE)
    assert set(actual) == set(step.parameters.tensors())
    for tensor, grad in actual.items():
        wanted = expected[tensor]
        assert wanted.norm() > 0, tensor
        assert (grad.double() - wanted).norm() <= tolerance * wanted.norm(), tensor
    assert result.loss == pytest.approx(float(expected["loss"]), rel=tolerance)
    assert result.objective == pytest.approx(float(expected["objective"]), rel=tolerance)


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["picks", "matrices"])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", [*sorted(PENALTIES), "p_anneal"])
def test_steps_from_picks_and_from_matrices_equal_autograd(
    density: float, alignment: Alignment, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(plan_of(alignment=alignment, activation=ACTIVATIONS[name]), dtype=torch.float64)
    unsettle(step)
    assert DENSITY in step.state
    step.state[DENSITY] = density
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 4 * 32 * 40)  # 96 features in blocks of 40, the last of 16
    check(step, data(32, dtype=torch.float64), name, 1e-12, monkeypatch)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), EXACT, ids=["f64", "f32"])
def test_gradients_equal_autograd(
    alignment: Alignment, name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    activation = ACTIVATIONS[name]
    step = step_of(plan_of(alignment=alignment, activation=activation, dead_after_tokens=1000), dtype=dtype)
    unsettle(step)
    is_dead = torch.arange(step.plan.d_sae) % 3 == 0
    step.n_tokens_since_fired[is_dead] = 10_000
    check(step, data(32, dtype=dtype), name, tolerance, monkeypatch, is_dead)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_equal_autograd_where_pre_activations_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all features have one and the same pre-activation, on every token, at and around the cut."""
    plan = plan_of(alignment="none", activation=ACTIVATIONS[name], dead_after_tokens=1000)
    step = step_of(plan, dtype=torch.float64)
    unsettle(step)
    step.parameters.W_enc_rows[::2] = 0
    step.parameters.b_enc[::2] = 0.25
    is_dead = torch.arange(plan.d_sae) % 3 == 0
    step.n_tokens_since_fired[is_dead] = 10_000
    check(step, data(32, dtype=torch.float64), name, 1e-12, monkeypatch, is_dead)


@pytest.mark.parametrize("is_transcoder", [False, True], ids=["crosscoder", "transcoder"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_joined_hooks_equal_autograd(
    name: str, is_transcoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = HookRows(name="a", width=24, scale=0.5), HookRows(name="b", width=16, scale=2.0)
    fields: dict[str, Any] = {"activation": ACTIVATIONS[name], "dead_after_tokens": 1000}
    if is_transcoder:
        plan = joint_plan_of(first, target=second, alignment="none", **fields)
    else:
        plan = joint_plan_of(first, second, alignment="orth", **fields)
    step = step_of(plan, dtype=torch.float64)
    unsettle(step)
    is_dead = torch.arange(plan.d_sae) % 3 == 0
    step.n_tokens_since_fired[is_dead] = 10_000
    parts = [data(32, seed=i, d_in=hook.width, dtype=torch.float64) / hook.scale for i, hook in enumerate(plan.hooks)]
    check(step, torch.cat(parts, dim=1), name, 1e-12, monkeypatch, is_dead)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_constraint_holds_after_every_step(alignment: Alignment) -> None:
    step = step_of(plan_of(alignment=alignment, optimizer={"lr": 3e-3}, token_budget=32 * 60))
    for t in range(60):
        step(t, data(32, seed=t))
    scores = alignment_scores(step.parameters.W_enc_rows, step.parameters.W_dec)
    norms = step.parameters.W_dec.double().norm(dim=1)
    assert (norms - 1).abs().max() <= 1e-6
    if alignment != "none":
        assert (scores - 1).abs().max() <= 1e-5
    else:
        assert (scores - 1).abs().max() > 1e-3


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_whole_step_equals_a_dense_adam_step(name: str) -> None:
    plan = plan_of(alignment="orth", activation=ACTIVATIONS[name], optimizer={"lr": 1e-2, "clip_norm": 0.1})
    step = step_of(plan, dtype=torch.float64)
    unsettle(step)
    x = data(32, dtype=torch.float64)
    oracle = expected_of(step, x, name)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in step.parameters.tensors().items()}
    for parameter, leaf in leaves.items():
        leaf.grad = oracle[parameter]
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.1)
    result = step(LATE, x)
    rates = plan.bias_rates
    groups = [{"params": [leaf], "lr": result.lr * rates.get(name, 1.0)} for name, leaf in leaves.items()]
    torch.optim.Adam(groups, betas=(plan.spec.beta1, plan.spec.beta2)).step()
    d = leaves["W_dec"] / leaves["W_dec"].norm(dim=1, keepdim=True)
    w = leaves["W_enc_rows"]
    wanted = {**leaves, "W_dec": d, "W_enc_rows": w + (1 - (w * d).sum(1, keepdim=True)) * d}
    for parameter, tensor in step.parameters.tensors().items():
        torch.testing.assert_close(tensor, wanted[parameter].detach(), rtol=1e-5, atol=1e-7)
    assert result.loss == pytest.approx(float(oracle["loss"]), rel=1e-12)


def test_non_finite_input_stops_before_anything_changed() -> None:
    step = step_of(plan_of())
    x = data(32)
    x[3, 5] = float("inf")
    before = {name: tensor.clone() for name, tensor in step.parameters.tensors().items()}
    with pytest.raises(NonFinite, match="step 0"):
        step(0, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.parameters.tensors().items())
    assert not step.optimizer.first["W_dec"].any()


def test_training_lowers_the_loss_and_batchtopk_learns_its_threshold() -> None:
    step = step_of(
        plan_of(activation=BatchTopK(k=5, threshold_beta=0.9), optimizer={"lr": 1e-2}, token_budget=32 * 200)
    )
    losses = [step(t, data(32, seed=t % 20)).loss for t in range(200)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    x = data(32, seed=3)
    hidden = (x - step.parameters.b_dec) @ step.parameters.W_enc + step.parameters.b_enc
    l0 = (hidden > step.state["threshold"]).sum(1).float().mean()
    assert 3.5 <= l0 <= 6.5


def test_the_threshold_forgets_the_beginning_of_a_short_run() -> None:
    """With the default decay, too: a run of a thousand steps must not export the cuts of its first ones."""
    threshold = 0.0
    for step in range(1000):
        beta = threshold_decay(step, 0.999)
        threshold = beta * threshold + (1 - beta) * (10.0 if step < 200 else 1.0)
    assert threshold == pytest.approx(1.0, abs=0.01)
    assert threshold_decay(0, 0.999) == 0 and threshold_decay(10**6, 0.999) == 0.999
