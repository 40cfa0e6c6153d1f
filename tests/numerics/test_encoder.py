"""The encoder product in bfloat16: features chosen by it, everything else in float32."""

from __future__ import annotations

import pytest
import torch

from gnomon.specs import Activation, AuxK, BatchTopK, Matryoshka, TopK
from gnomon_workers.kernels import blocks
from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.encoder import choose_encoder_dtype
from tests.support.selections import dense, stable_topk
from tests.support.steps import data, plan_of, step_of, unsettle

D_SAE, K = 1024, 8


def test_bfloat16_chooses_and_float32_values() -> None:
    step = step_of(plan_of(d_sae=D_SAE, activation=TopK(k=K), encoder_dtype="bfloat16"))
    unsettle(step)
    x = data(32)
    params = step.parameters
    inputs = x - params.b_dec
    in_bfloat16 = torch.addmm(params.b_enc.bfloat16(), inputs.bfloat16(), params.W_enc.bfloat16())
    chosen = dense(step.select(x), D_SAE) != 0
    assert torch.equal(chosen, stable_topk(in_bfloat16.float(), K))
    in_float32 = torch.addmm(params.b_enc, inputs, params.W_enc)
    assert 0.8 < (chosen & stable_topk(in_float32, K)).sum() / chosen.sum() <= 1
    reconstruction = (in_float32.relu() * chosen) @ params.W_dec
    assert step(0, x).loss == pytest.approx(float((reconstruction - inputs).square().sum(1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "activation",
    [TopK(k=K), BatchTopK(k=K), TopK(k=K, aux=AuxK(k=16)), Matryoshka(k=K)],
    ids=["topk", "batchtopk", "aux", "matryoshka"],
)
def test_training_in_bfloat16_follows_float32(activation: Activation) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        plan = plan_of(
            d_sae=D_SAE, activation=activation, encoder_dtype=dtype, dead_after_tokens=300, optimizer={"lr": 3e-3}
        )
        step = step_of(plan)
        losses[dtype] = [step(t, data(32, seed=t % 10)).loss for t in range(60)]
    assert losses["bfloat16"][-1] < 0.7 * losses["bfloat16"][0]
    assert sum(losses["bfloat16"][-10:]) == pytest.approx(sum(losses["float32"][-10:]), rel=0.03)
    assert losses["bfloat16"] != losses["float32"]


def test_auto_stays_in_float32_where_there_is_little_to_gain() -> None:
    mesh, cpu = ProcessMesh.single(), torch.device("cpu")
    assert choose_encoder_dtype("auto", n_products=1000, device=cpu, mesh=mesh) == torch.float32
    assert choose_encoder_dtype("bfloat16", n_products=1000, device=cpu, mesh=mesh) == torch.bfloat16
    assert choose_encoder_dtype("float32", n_products=2**40, device=cpu, mesh=mesh) == torch.float32


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in blocks of 16 features is the step in one block."""
    weights = []
    for block_bytes in (1, 1 << 30):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        step = step_of(plan_of(d_sae=100, activation=TopK(k=2)), dtype=torch.float64)
        for t in range(5):
            step(t, data(32, seed=t, dtype=torch.float64))
        weights.append(step.parameters)
    torch.testing.assert_close(weights[0].W_enc_rows, weights[1].W_enc_rows, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights[0].W_dec, weights[1].W_dec, rtol=1e-12, atol=1e-14)
