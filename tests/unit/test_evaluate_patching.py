"""Patching: the short way through the upper layers equals the long one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gnomon.errors import InvalidRequest
from gnomon_workers.evaluate import patching, tails
from gnomon_workers.evaluate.patching import Hooks, layers_up_to, patch_sums


def llama() -> nn.Module:
    """A small random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def gpt2() -> nn.Module:
    """A small random GPT-2: learned positions, which a shortcut through the embeddings would add twice."""
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=4, n_positions=64))
    return model.eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_head_that_gives_no_numbers_is_told_as_such(make: Callable[[], nn.Module]) -> None:
    model: Any = make()
    weight = model.get_output_embeddings().weight
    model.get_output_embeddings().weight = nn.Parameter(weight.detach().clone())
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(InvalidRequest, match=r"logits that are no numbers \(3 of 150") as caught:
        tails.Tail(model)
    assert caught.value.code == "non_finite"
    assert model not in tails._divisible


@pytest.fixture(params=["llama", "gpt2", "inside"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, str]]:
    if request.param == "llama":
        yield llama(), "model.layers.1"
    elif request.param == "gpt2":
        yield gpt2(), "transformer.h.2"
    else:
        yield llama(), "model.layers.1.mlp"


def contexts() -> tuple[Tensor, Tensor]:
    """Two contexts, one padded, and which of their tokens are stored."""
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    tokens[1, 9:] = -1
    is_stored = tokens >= 0
    is_stored[:, 0] = False
    return tokens, is_stored


def by_hand(model: nn.Module, hook: str, tokens: Tensor, change: Any) -> tuple[Tensor, Tensor]:
    """CE and log-probabilities of the whole model with its hook's output changed."""

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = model.get_submodule(hook).register_forward_hook(replace)
    with torch.no_grad():
        logits = model(input_ids=tokens.clamp_min(0), attention_mask=(tokens >= 0).long()).logits[:, :-1]
    handle.remove()
    valid = tokens[:, 1:] >= 0
    return cross_entropy(logits[valid], tokens[:, 1:][valid], reduction="sum"), log_softmax(logits[valid], -1)


def test_patched_runs_equal_whole_runs_with_the_output_replaced(case: tuple[nn.Module, str]) -> None:
    model, hook = case
    tokens, is_stored = contexts()
    sums = patch_sums(model, Hooks.one(hook), tokens, is_stored, lambda x: 0.7 * x)
    ce, base = by_hand(model, hook, tokens, lambda x: x)
    mask = is_stored[..., None]
    ce_patched, log_patched = by_hand(model, hook, tokens, lambda x: torch.where(mask, 0.7 * x, x))
    ce_ablated, _ = by_hand(model, hook, tokens, lambda x: x.masked_fill(mask, 0))
    assert sums.n_predictions == 11 + 8
    assert sums.ce_original == pytest.approx(float(ce), rel=1e-5)
    assert sums.ce_patched == pytest.approx(float(ce_patched), rel=1e-5)
    assert sums.ce_ablated == pytest.approx(float(ce_ablated), rel=1e-5)
    kl = kl_div(log_patched, base, log_target=True, reduction="sum")
    assert sums.kl_patched == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
    assert abs(float(ce_patched) - float(ce)) > 1e-3


def two_by_hand(model: nn.Module, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """CE of the whole model with the outputs of some modules replaced."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, value=value: value) for name, value in values.items()
    ]
    with torch.no_grad():
        logits = model(input_ids=tokens.clamp_min(0), attention_mask=(tokens >= 0).long()).logits[:, :-1]
    for handle in handles:
        handle.remove()
    valid = tokens[:, 1:] >= 0
    return cross_entropy(logits[valid], tokens[:, 1:][valid], reduction="sum")


def outputs_of(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """What some modules put out."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens.clamp_min(0), attention_mask=(tokens >= 0).long())
    for handle in handles:
        handle.remove()
    return seen


def test_a_crosscoder_replaces_all_its_hooks_from_all_of_them() -> None:
    model, (tokens, is_stored) = llama(), contexts()
    first, second = "model.layers.0.mlp", "model.layers.2"
    seen = outputs_of(model, [first, second], tokens)
    hooks = Hooks(read=(first, second), written=(first, second))
    # each is reconstructed from the other, which shows that both are read
    sums = patch_sums(model, hooks, tokens, is_stored, lambda x: 0.5 * torch.cat([x[:, 32:], x[:, :32]], dim=1))
    mask = is_stored[..., None]
    crossed = {first: seen[second], second: seen[first]}
    patched = {name: torch.where(mask, 0.5 * crossed[name], seen[name]) for name in seen}
    ablated = {name: seen[name].masked_fill(mask, 0) for name in seen}
    assert sums.ce_patched == pytest.approx(float(two_by_hand(model, patched, tokens)), rel=1e-5)
    assert sums.ce_ablated == pytest.approx(float(two_by_hand(model, ablated, tokens)), rel=1e-5)
    assert abs(sums.ce_patched - sums.ce_original) > 1e-3


def test_a_transcoder_replaces_its_target_alone() -> None:
    model, (tokens, is_stored) = llama(), contexts()
    source, target = "model.layers.1", "model.layers.2.mlp"
    seen = outputs_of(model, [source, target], tokens)
    hooks = Hooks(read=(source,), written=(target,))
    sums = patch_sums(model, hooks, tokens, is_stored, lambda x: 2 * x)
    patched = torch.where(is_stored[..., None], 2 * seen[source], seen[target])
    ablated = seen[target].masked_fill(is_stored[..., None], 0)
    assert sums.ce_patched == pytest.approx(float(two_by_hand(model, {target: patched}, tokens)), rel=1e-5)
    assert sums.ce_ablated == pytest.approx(float(two_by_hand(model, {target: ablated}, tokens)), rel=1e-5)
    assert abs(sums.ce_patched - sums.ce_original) > 1e-3


def test_a_perfect_reconstruction_scores_one(case: tuple[nn.Module, str]) -> None:
    model, hook = case
    tokens, is_stored = contexts()
    result = patch_sums(model, Hooks.one(hook), tokens, is_stored, lambda x: x).result()
    assert result.ce_loss_score == pytest.approx(1, abs=1e-4)
    assert result.kl_score == pytest.approx(1, abs=1e-4)


def test_the_model_is_as_before_afterwards(case: tuple[nn.Module, str]) -> None:
    model, hook = case
    tokens, is_stored = contexts()
    before, _ = by_hand(model, hook, tokens, lambda x: x)
    patch_sums(model, Hooks.one(hook), tokens, is_stored, torch.zeros_like)
    after, _ = by_hand(model, hook, tokens, lambda x: x)
    assert torch.equal(before, after)


def test_layers_up_to_a_hook() -> None:
    model = llama()
    assert len(layers_up_to(model, "model.layers.2")) == 3
    assert layers_up_to(model, "model.layers.2.mlp") == []


def test_layers_are_left_out_where_that_gives_the_same_bits(case: tuple[nn.Module, str]) -> None:
    model, hook = case
    tokens, is_stored = contexts()
    patch_sums(model, Hooks.one(hook), tokens, is_stored, torch.zeros_like)
    assert patching._can_skip.get(model, {}) == ({hook: True} if layers_up_to(model, hook) else {})


def test_sums_do_not_depend_on_how_many_logits_are_held(
    case: tuple[nn.Module, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hook = case
    tokens, is_stored = contexts()
    whole = patch_sums(model, Hooks.one(hook), tokens, is_stored, torch.zeros_like)
    monkeypatch.setattr(tails, "MAX_LOGITS", 1)
    assert tails.Tail(model).is_divided
    parts = patch_sums(model, Hooks.one(hook), tokens, is_stored, torch.zeros_like)
    assert parts.result().model_dump() == pytest.approx(whole.result().model_dump(), rel=1e-5, abs=1e-6)
