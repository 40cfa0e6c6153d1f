"""Checkpoints whose tensors do not fit their config are refused, when a job is submitted and when a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_workers.models.catalog import check_context_length, check_hook, describe_model
from gnomon_workers.models.loading import load_model

CPU = torch.device("cpu")
Tensors = Mapping[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


def saved(model: Any, folder: Path, change: Callable[[Tensors], Tensors] = dict, **config: Any) -> ModelSource:
    """A model's folder, with its tensors and config changed."""
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    return ModelSource(source=str(folder), dtype="float32")


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, **sizes))


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without(DOWN), f"tensor {DOWN} is missing"),
    "another shape": (lambda tensors: {**tensors, DOWN: torch.zeros(32, 40)}, f"tensor {DOWN} has shape (32, 40)"),
    "a bias that the config denies": (
        lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        "tensor model.layers.0.self_attn.q_proj.bias has no place in LlamaForCausalLM",
    ),
    "a layer too many": (
        lambda tensors: {**tensors, "model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)},
        "tensor model.layers.2.mlp.up_proj.weight has no place in LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_do_not_fit_are_named(damage: str, tmp_path: Path) -> None:
    change, says = DAMAGES[damage]
    source = saved(llama(), tmp_path, change)
    with pytest.raises(InvalidRequest) as submitted:
        describe_model(source, [str(tmp_path)])
    with pytest.raises(InvalidRequest) as loaded:
        load_model(source, [str(tmp_path)], device=CPU)
    for error in (submitted.value, loaded.value):
        assert error.code == "incomplete_model"
        assert says in error.message


def test_checkpoint_without_its_head_is_read_and_predicts_nothing(tmp_path: Path) -> None:
    """As embedding models are published: the base model's names, and no lm_head."""

    def bare(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): t for name, t in tensors.items() if not name.startswith("lm_head")}

    source = saved(llama(), tmp_path, bare)
    found = describe_model(source, [str(tmp_path)])
    assert found.is_causal
    assert not found.has_head
    assert "model.layers.1" in found.hooks
    assert not load_model(source, [str(tmp_path)], device=CPU).is_causal


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InvalidRequest, match="quantised") as caught:
        describe_model(source, [str(tmp_path)])
    assert caught.value.code == "unsupported_model"


def test_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    source = saved(llama(), tmp_path, model_type="tinything", architectures=["TinyThingForCausalLM"])
    with pytest.raises(InvalidRequest, match="tinything") as caught:
        describe_model(source, [str(tmp_path)])
    assert caught.value.code == "unsupported_model"


@pytest.mark.parametrize("wrong", [{"model_type": ["llama"]}, {"num_hidden_layers": "two"}, {"hidden_size": -1}])
def test_nonsense_in_a_config_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    source = saved(llama(), tmp_path, **wrong)
    with pytest.raises(InvalidRequest) as caught:
        describe_model(source, [str(tmp_path)])
    assert caught.value.code in ("unsupported_model", "incomplete_model")


def test_encoder_of_an_encoder_decoder_is_read_and_its_decoder_is_not(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    source = saved(T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes)), tmp_path)
    found = describe_model(source, [str(tmp_path)])
    check_hook("encoder.block.1", found)
    with pytest.raises(InvalidRequest, match="a decoder needs inputs of its own"):
        check_hook("decoder.block.1", found)


def test_positions_reserved_for_padding_are_taken_off(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    found = describe_model(saved(RobertaForMaskedLM(config), tmp_path), [str(tmp_path)])
    check_context_length(64, found)
    with pytest.raises(InvalidRequest, match="64 positions"):
        check_context_length(65, found)
