"""What is exported of every variant encodes and decodes raw activations as training did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gnomon.dictionary import Dictionary, load_folder
from gnomon.errors import InvalidRequest
from gnomon.specs import Activation, Alignment, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from gnomon_storage.location import Location
from gnomon_workers.sae.plan import HookRows, Normalisation, TrainPlan
from gnomon_workers.sae.sparse import decode
from gnomon_workers.train.saving import save_checkpoint
from gnomon_workers.train.state import load_checkpoint, state_tensors
from gnomon_workers.train.step import TrainStep
from tests.support.exported import exported, scaled_plan
from tests.support.selections import dense
from tests.support.steps import data, joint_plan_of, plan_of, step_of
from tests.support.variants import FIELDS, VARIANTS

ARCHITECTURES = {"topk": "topk", "batchtopk": "jumprelu", "matryoshka": "jumprelu", "jumprelu": "jumprelu"}
ARCHITECTURES |= {"gated": "gated", "relu": "standard", "p_anneal": "standard"}
FROM = HookRows(name="model.layers.1", width=24, mean=tuple(range(24)), scale=1 / 40)
TO = HookRows(name="model.layers.2", width=16, mean=tuple(range(-3, 13)), scale=0.5)
JOINT: dict[str, Activation] = {
    "topk": TopK(k=5),
    "jumprelu": JumpReLU(l0_coefficient=0.01, warmup_steps=0),
    "matryoshka": Matryoshka(k=5, threshold_beta=0.8),
    "standard": ReLU(l1_coefficient=0.1),
    "gated": Gated(l1_coefficient=0.1),
}


def rows_of(plan: TrainPlan, seed: int) -> Tensor:
    """Raw rows (batch, widths of all hooks), every hook as far out and as large as its mean and scale say."""
    parts = [data(64, seed=seed, d_in=hook.width) / hook.scale + torch.tensor(hook.mean or 0.0) for hook in plan.hooks]
    return torch.cat(parts, dim=1)


def train_and_export(plan: TrainPlan, root: Path) -> tuple[TrainStep, Dictionary]:
    """A step after 30 batches, and its dictionary as a user loads it."""
    step = step_of(plan)
    for t in range(30):
        step(t, rows_of(plan, t))
    checkpoints = Location.open(f"file://{root}").child("checkpoints")
    checkpoint = save_checkpoint(checkpoints, step, number=30, attempt=1)
    return step, load_folder(exported(root / "out", plan, checkpoint, checkpoints))


def inferred(step: TrainStep, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features (batch, d_sae) and reconstruction of raw rows, as training has them at inference, rescaled."""
    plan, params = step.plan, step.parameters
    if isinstance(plan.spec.activation, BatchTopK | Matryoshka):
        inputs = Normalisation.of(plan.hooks, x)(x)[:, : plan.d_in] - (params.b_dec if plan.target is None else 0)
        pre = inputs @ params.W_enc + params.b_enc
        acts = torch.where(pre > step.state["threshold"], pre, 0.0)
        hat = acts @ params.W_dec + params.b_dec
    else:
        picks = step.select(x)
        acts, hat = dense(picks, params.n_local), decode(picks, params.W_dec) + params.b_dec
    outputs = plan.inputs if plan.target is None else (plan.target,)
    scales = torch.cat([torch.full((hook.width,), hook.scale) for hook in outputs])
    means = torch.cat([torch.tensor(hook.mean or (0.0,) * hook.width) for hook in outputs])
    return acts / plan.output_scale, hat / scales + means


def check(step: TrainStep, dictionary: Dictionary, x: Tensor) -> None:
    """The dictionary does what training did."""
    acts, hat = inferred(step, x)
    read = x[:, : step.plan.d_in]
    assert 0 < int((acts > 0).sum()) < 0.9 * acts.numel()
    largest = float(acts.max())
    torch.testing.assert_close(dictionary.encode(read), acts, rtol=1e-4, atol=1e-5 * largest)
    torch.testing.assert_close(dictionary(read), hat, rtol=1e-4, atol=1e-5 * float(hat.abs().max()))


@pytest.mark.parametrize("alignment", ["orth", "none"])
@pytest.mark.parametrize("name", VARIANTS)
def test_export_is_the_trained_dictionary(tmp_path: Path, name: str, alignment: Alignment) -> None:
    plan = scaled_plan(VARIANTS[name], alignment)
    step, dictionary = train_and_export(plan, tmp_path)
    assert dictionary.cfg.architecture == ARCHITECTURES[plan.spec.activation.kind]
    assert dictionary.cfg.metadata["training_architecture"] == plan.spec.activation.kind
    check(step, dictionary, rows_of(plan, 99))
    assert torch.equal(dictionary.W_dec, step.parameters.W_dec)
    if alignment == "orth":
        assert (dictionary.alignment() - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", JOINT)
def test_a_crosscoder_reads_and_writes_its_hooks_joined(tmp_path: Path, kind: str) -> None:
    plan = joint_plan_of(FROM, TO, activation=JOINT[kind], batch_size=64, optimizer={"lr": 1e-2})
    step, dictionary = train_and_export(plan, tmp_path)
    cfg = dictionary.cfg
    assert (cfg.architecture, cfg.kind) == ("crosscoder", ARCHITECTURES.get(kind, kind))
    assert cfg.hooks == {"model.layers.1": 24, "model.layers.2": 16} and cfg.hooks_read == tuple(cfg.hooks)
    assert cfg.hooks_written == cfg.hooks_read
    check(step, dictionary, rows_of(plan, 99))
    assert (dictionary.alignment() - 1).abs().max() <= 1e-4
    joined = torch.linalg.vector_norm(step.parameters.W_dec, dim=1)
    torch.testing.assert_close(joined, torch.ones_like(joined))


@pytest.mark.parametrize("kind", JOINT)
def test_a_transcoder_writes_another_hook(tmp_path: Path, kind: str) -> None:
    plan = joint_plan_of(
        FROM, target=TO, activation=JOINT[kind], alignment="none", batch_size=64, optimizer={"lr": 1e-2}
    )
    step, dictionary = train_and_export(plan, tmp_path)
    cfg = dictionary.cfg
    base = ARCHITECTURES.get(kind, kind)
    assert cfg.architecture == ("transcoder" if base == "standard" else f"{base}_transcoder") and cfg.kind == base
    assert (cfg.d_in, cfg.d_out, cfg.hooks_read, cfg.hooks_written) == (24, 16, (FROM.name,), (TO.name,))
    assert dictionary.W_dec.shape == (96, 16) and dictionary.b_dec.shape == (16,)
    check(step, dictionary, rows_of(plan, 99))
    with pytest.raises(InvalidRequest, match="different spaces"):
        dictionary.alignment()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    """For p_anneal from amid the steps that the next lambda is averaged over, to beyond the update."""
    plan = plan_of(activation=VARIANTS[name], **FIELDS)
    whole = step_of(plan)
    folder = Location.open(f"file://{tmp_path}").child("checkpoints")
    for t in range(15):
        whole(t, data(64, seed=t))
    checkpoint = save_checkpoint(folder, whole, number=15, attempt=1)
    resumed = step_of(plan)
    load_checkpoint(folder, checkpoint, resumed)
    for t in range(15, 24):
        first, second = (step(t, data(64, seed=t)) for step in (whole, resumed))
        assert (first.loss, first.objective, first.parts) == (second.loss, second.objective, second.parts)
    assert whole.state == resumed.state
    mine, theirs = state_tensors(whole), state_tensors(resumed)
    assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
