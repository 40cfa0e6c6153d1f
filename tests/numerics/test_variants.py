"""What each variant promises beyond its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU
from gnomon_workers.sae.sparse import activation_gradients
from gnomon_workers.sae.variants import make_variant
from gnomon_workers.sae.variants.base import picks_where
from gnomon_workers.sae.variants.penalties import FLOOR
from gnomon_workers.train.step import TrainStep
from tests.support.steps import data, plan_of, step_of


def run(activation: Activation, n_steps: int, *, until: int | None = None, **fields: Any) -> tuple[TrainStep, float]:
    """A step after a run, or a part of it, and the mean L0 of its last twenty batches."""
    fields = {"optimizer": {"lr": 5e-3}, **fields}
    step = step_of(plan_of(activation=activation, batch_size=64, token_budget=64 * n_steps, **fields))
    l0 = [step(t, data(64, seed=t)).n_active / 64 for t in range(until or n_steps)]
    return step, sum(l0[-20:]) / 20


def test_jumprelu_reaches_the_l0_it_aims_at() -> None:
    activation = JumpReLU(target_l0=8, bandwidth=0.05, initial_threshold=0.05)
    step, l0 = run(activation, 400)
    assert l0 == pytest.approx(8, rel=0.25)
    thresholds = step.parameters.vectors["log_threshold"].exp()
    assert (thresholds > 0).all() and thresholds.std() > 0.01


@pytest.mark.parametrize("kind", [ReLU, Gated, PAnneal])
def test_a_larger_penalty_makes_fewer_features_active(kind: type[ReLU | Gated | PAnneal]) -> None:
    weak, strong = (run(kind(l1_coefficient=coefficient), 80)[1] for coefficient in (0.02, 0.2))
    assert 0 < strong < 0.8 * weak


def test_the_first_group_of_a_matryoshka_reconstructs_by_itself() -> None:
    """Better than the same features of a dictionary that was never asked to."""
    x = data(256, seed=999)
    # data that is not centred: b_dec has far to go
    optimizer = {"lr": 5e-3, "beta1": 0.9, "beta2": 0.999, "clip_norm": 1.0, "b_enc_rate": 5.0, "b_dec_rate": 5.0}
    errors = []
    for activation in (Matryoshka(k=5, group_fractions=(0.25, 0.75)), BatchTopK(k=5)):
        step, _ = run(activation, 200, optimizer=optimizer, schedule={"decay_fraction": 0.2})
        params = step.parameters
        pre = (x - params.b_dec) @ params.W_enc + params.b_enc
        acts = torch.where(pre > step.state["threshold"], pre, 0.0)
        first = acts[:, :24] @ params.W_dec[:24] + params.b_dec
        errors.append(float((first - x).square().sum(1).mean()))
    assert errors[0] < 0.8 * errors[1]


def test_p_falls_in_equal_steps_and_lambda_keeps_the_penalty() -> None:
    activation = PAnneal(l1_coefficient=0.05, start_step=15, n_updates=3, final_p=0.4, warmup_steps=0)
    step = step_of(plan_of(activation=activation, batch_size=64, token_budget=64 * 60), dtype=torch.float64)
    updates, exponents = [15, 30, 45], [1.0, 0.8, 0.6, 0.4]
    coefficient = 0.05
    values: list[torch.Tensor] = []
    for t in range(60):
        x = data(64, seed=t, dtype=torch.float64)
        if t in updates:
            p, following = exponents[updates.index(t)], exponents[updates.index(t) + 1]
            window = torch.cat(values[-10:])
            coefficient *= float((window**p).sum() / (window**following).sum())
        values.append(step.select(x).values.clamp_min(FLOOR))
        result = step(t, x)
        assert step.state["l1_coefficient"] == pytest.approx(coefficient, rel=1e-3)
        p = exponents[sum(update <= t for update in updates)]
        assert result.parts["penalty"] == pytest.approx(coefficient * float((values[-1] ** p).sum()) / 64, rel=1e-3)
    assert coefficient != pytest.approx(0.05, rel=0.05)


def test_tiny_activations_get_no_unbounded_pull() -> None:
    """f^p has an infinite slope at 0; one feature at 1e-30 would take the whole of a clipped gradient."""
    activation = PAnneal(l1_coefficient=0.1, start_step=1, n_updates=1, warmup_steps=0)
    step = step_of(plan_of(activation=activation, optimizer={"lr": 1e-6}))
    step.parameters.W_enc_rows.mul_(0)
    step.parameters.b_enc.fill_(1e-30)
    result = step(5, data(32))
    assert result.grad_norm < 0.1 * FLOOR ** (0.2 - 1) * 96


def test_warm_up_raises_the_penalty_from_near_zero() -> None:
    step = step_of(plan_of(activation=ReLU(l1_coefficient=0.1, warmup_steps=9), optimizer={"lr": 1e-9}))
    x = data(32)
    penalties = [step(t, x).parts["penalty"] for t in range(12)]
    for t, penalty in enumerate(penalties):
        assert penalty == pytest.approx(penalties[-1] * min(1.0, (t + 1) / 10), rel=1e-4)


def test_defaults_of_short_runs_leave_time_for_the_full_penalty() -> None:
    for activation in (JumpReLU(), ReLU(), Gated(), PAnneal()):
        step, _ = run(activation, 40, until=39)
        assert make_variant(activation, step.plan.setting).initial_state().keys() == step.state.keys()
        result = step(39, data(64, seed=39))
        assert result.parts["penalty"] > 0
    assert step.state["l1_coefficient"] != 0.04, "p never fell"


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_dense_product_gives_what_the_sampled_one_gives(share: float) -> None:
    """The first is taken above a share of active entries, the second below; both are <residual, decoder row>."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(32, 256, generator=generator)
    residuals, W_dec = torch.randn(32, 24, generator=generator), torch.randn(256, 24, generator=generator)
    picks = picks_where(values, values < share)
    found = activation_gradients(picks, residuals, W_dec)
    wanted = (residuals[picks.token_indices()] * W_dec[picks.features]).sum(1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
