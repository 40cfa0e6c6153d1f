"""The sparse step equals the dense autograd oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gnomon.specs import Activation, Alignment, AuxK, BatchTopK, TopK
from gnomon_workers.sae.alignment import alignment_scores
from gnomon_workers.sae.reference import reference_gradients
from gnomon_workers.train.step import NonFinite, TrainStep, threshold_decay
from tests.numerics.steps import data, plan_of, step_of, unsettle

ALIGNMENTS: list[Alignment] = ["orth", "none", "scale", "stopgrad", "tied"]
ACTIVATIONS: list[Activation] = [
    TopK(k=5),
    BatchTopK(k=5),
    TopK(k=5, aux=AuxK(k=8)),
    BatchTopK(k=5, aux=AuxK(k=8, coefficient=2.0)),
]


def gradients_of(step: TrainStep, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Gradients as the optimizer would see them, before clipping."""
    seen: dict[str, Tensor] = {}
    grads = step.optimizer.grads
    monkeypatch.setattr(
        type(step.optimizer),
        "step",
        lambda self, lr, scale: seen.update({n: g.clone() for n, g in grads.items()}),
    )
    step(0, x)
    return seen


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.kind}{'+aux' if a.aux else ''}")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_gradients_equal_autograd(
    alignment: Alignment,
    activation: Activation,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = step_of(plan_of(alignment=alignment, activation=activation, dead_after_tokens=1000), dtype=dtype)
    unsettle(step)
    is_dead = torch.arange(step.plan.d_sae) % 3 == 0
    step.n_tokens_since_fired[is_dead] = 10_000
    x = data(32, dtype=dtype)
    params = {"W_enc_rows": step.parameters.W_enc_rows, "W_dec": step.parameters.W_dec}
    params |= {"b_enc": step.parameters.b_enc, "b_dec": step.parameters.b_dec}
    params = {name: tensor.clone().double() for name, tensor in params.items()}
    expected = reference_gradients(
        x.double(), params, activation=activation, alignment=alignment, is_dead=is_dead, k_aux=step.plan.k_aux
    )
    assert (expected.aux_loss > 0) == (activation.aux is not None)
    actual = gradients_of(step, x, monkeypatch)
    for name, grad in actual.items():
        wanted = getattr(expected, name)
        assert (grad.double() - wanted).norm() <= tolerance * wanted.norm(), name


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


def test_one_whole_step_equals_a_dense_adam_step() -> None:
    plan = plan_of(alignment="orth", activation=TopK(k=5), optimizer={"lr": 1e-2, "clip_norm": 0.1})
    step = step_of(plan, dtype=torch.float64)
    unsettle(step)
    x = data(32, dtype=torch.float64)
    params = {name: tensor.clone() for name, tensor in step.parameters.tensors().items()}
    oracle = reference_gradients(x, params, activation=plan.activation, alignment="orth")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    for name, leaf in leaves.items():
        leaf.grad = getattr(oracle, name)
    torch.nn.utils.clip_grad_norm_(leaves.values(), 0.1)
    result = step(0, x)
    torch.optim.Adam(leaves.values(), lr=result.lr).step()
    d = leaves["W_dec"] / leaves["W_dec"].norm(dim=1, keepdim=True)
    w = leaves["W_enc_rows"]
    w = w + (1 - (w * d).sum(1, keepdim=True)) * d
    torch.testing.assert_close(step.parameters.W_dec, d.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.parameters.W_enc_rows, w.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.parameters.b_dec, leaves["b_dec"].detach(), rtol=1e-5, atol=1e-7)
    assert result.loss == pytest.approx(float(oracle.loss), rel=1e-12)


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
    l0 = (hidden > step.threshold).sum(1).float().mean()
    assert 3.5 <= l0 <= 6.5


def test_the_threshold_forgets_the_beginning_of_a_short_run() -> None:
    """With the default decay, too: a run of a thousand steps must not export the cuts of its first ones."""
    threshold = 0.0
    for step in range(1000):
        beta = threshold_decay(step, 0.999)
        threshold = beta * threshold + (1 - beta) * (10.0 if step < 200 else 1.0)
    assert threshold == pytest.approx(1.0, abs=0.01)
    assert threshold_decay(0, 0.999) == 0 and threshold_decay(10**6, 0.999) == 0.999
