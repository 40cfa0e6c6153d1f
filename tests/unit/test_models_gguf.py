"""GGUF files: every setting and tensor is translated, or the file is refused by name."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_workers.models.catalog import describe_model
from gnomon_workers.models.gguf_folder import gguf_folder
from gnomon_workers.models.gguf_header import parse_gguf
from gnomon_workers.models.gguf_llama import DIGIT_SPLITS, SPLITS
from gnomon_workers.models.loading import load_model, read_activations
from gnomon_workers.models.tokenizers import begins_with_bos
from tests.support.gguf_files import Array, write_gguf

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))


def llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers whose attention depends on what it is told of rotary embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **changes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_()
        elif "_proj" in name:
            parameter.data.mul_(6)
    model.eval()
    return model


def llama3_factors(model: LlamaForCausalLM) -> Array:
    """What the converter writes for Llama 3.1's scaling: plain frequencies over scaled ones."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, CPU)
    plain = 10_000.0 ** -(np.arange(0, 8, 2) / 8)
    return np.asarray(plain / scaled.numpy(), dtype=np.float32)


def rows(model: Any) -> torch.Tensor:
    """Activations of the last layer."""
    ids = torch.arange(2, 58)[None].repeat(1, 4)
    return read_activations(model, ["model.layers.1"], ids, torch.ones_like(ids))["model.layers.1"]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "linear rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ),
    "linear by its factor alone": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0},
    ),
    "linear by the older setting": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
        {"llama.rope.scale_linear": 4.0},
    ),
    "not scaled, whatever the factor": ({}, {"llama.rope.scaling.type": "none", "llama.rope.scale_linear": 4.0}),
    "not scaled, whatever the newer factor": (
        {},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
    ),
    "linear without a factor": ({}, {"llama.rope.scaling.type": "linear"}),
    "attention biases": ({"attention_bias": True}, {}),
    "other biases": ({"mlp_bias": True}, {}),
    "wide heads": ({"head_dim": 16}, {"llama.attention.key_length": 16, "llama.attention.value_length": 16}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "llama 3": ({"rope_parameters": LLAMA3}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_model_that_was_converted(case: str, tmp_path: Path) -> None:
    changes, settings = CASES[case]
    model = llama(**changes)
    factors = {"rope_freqs.weight": llama3_factors(model)} if case == "llama 3" else {}
    leave_out = "lm_head" if case == "tied" else "nothing"
    write_gguf(tmp_path / "x.gguf", model, settings=settings, tensors=factors, leave_out=leave_out)
    source = ModelSource(source=str(tmp_path / "x.gguf"), dtype="float32")
    assert "model.layers.1" in describe_model(source, [str(tmp_path)]).hooks
    loaded = load_model(source, [str(tmp_path)], device=CPU)
    assert loaded.is_causal
    torch.testing.assert_close(rows(loaded.module), rows(model), rtol=1e-5, atol=1e-5)


STRANGE: dict[str, tuple[dict[str, Any], dict[str, Array], str]] = {
    "yarn": ({"llama.rope.scaling.type": "yarn"}, {}, "'yarn'"),
    "unknown setting": ({"llama.attention.sliding_window": 8}, {}, "llama.attention.sliding_window"),
    "unknown list": ({"llama.rope.dimension_sections": [1, 2]}, {}, "llama.rope.dimension_sections"),
    "heads of each layer": ({"llama.vocab_size": [1, 2]}, {}, "llama.vocab_size"),
    "experts": ({}, {"blk.0.ffn_gate_inp.weight": np.zeros((4, 32), np.float32)}, "blk.0.ffn_gate_inp.weight"),
    "partly rotated": ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, {}, "dimension_count is 4"),
    "half of a bias": ({}, {"blk.0.attn_q.bias": np.zeros(32, np.float32)}, "k_proj.bias is missing"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_not_understood_is_refused_before_anything_is_queued(case: str, tmp_path: Path) -> None:
    settings, tensors, says = STRANGE[case]
    write_gguf(tmp_path / "x.gguf", llama(), settings=settings, tensors=tensors)
    with pytest.raises(InvalidRequest) as caught:
        describe_model(ModelSource(source=str(tmp_path / "x.gguf")), [str(tmp_path)])
    assert says in caught.value.message
    assert caught.value.code in ("unsupported_model", "incomplete_model")


@pytest.mark.parametrize("split", ["nonsense-pre", "chatglm-bpe", "deepseek-llm"])
def test_an_unknown_way_to_cut_text_is_refused_by_name(split: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama(), split=split)
    with pytest.raises(InvalidRequest, match=rf"tokenizer\.ggml\.pre is '{split}'") as caught:
        describe_model(ModelSource(source=str(tmp_path / "x.gguf")), [str(tmp_path)])
    assert caught.value.code == "unsupported_model"


GPT2_CUTS = ["AB", "Ġ12", "Ġ345", "!"]
DIGIT_CUTS = ["AB", "Ġ", "1", "2", "Ġ", "3", "4", "5", "!"]
CUTS = {
    "default": GPT2_CUTS, "gpt-2": GPT2_CUTS, "smollm": DIGIT_CUTS, "qwen2": DIGIT_CUTS,
    "llama-bpe": ["AB", "Ġ", "12", "Ġ", "345", "!"],
}  # fmt: skip


@pytest.mark.parametrize("split", CUTS)
def test_text_is_cut_as_the_file_says(split: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama(), split=split)
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(tmp_path / "x.gguf"))
    cuts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("AB 12 345!")
    assert [piece for piece, _ in cuts] == CUTS[split]


def test_ways_to_cut_text_are_those_that_are_produced() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    gpt2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais"}
    assert SPLITS - DIGIT_SPLITS - gpt2 <= GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert not (DIGIT_SPLITS | gpt2) & GGUF_PRE_TOKENIZER_SPLITS.keys()


def test_settings_and_tensors_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama())
    data = (tmp_path / "x.gguf").read_bytes()
    names = [(b"blk.1.ffn_up.", b"blk.0.ffn_up."), (b"ggml.bos_token_id", b"ggml.eos_token_id")]
    for second, first in names:
        (tmp_path / "y.gguf").write_bytes(data.replace(second, first))
        with pytest.raises(ValueError, match=r"twice|of one name"):
            parse_gguf(tmp_path / "y.gguf")


def test_a_tensor_left_out_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama(), leave_out="layers.1.mlp.down_proj")
    with pytest.raises(InvalidRequest, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        describe_model(ModelSource(source=str(tmp_path / "x.gguf")), [str(tmp_path)])


def test_unknown_divisors_of_frequencies_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama(), tensors={"rope_freqs.weight": np.full(4, 3.0, np.float32)})
    with pytest.raises(InvalidRequest, match="divisors of rotary frequencies"):
        gguf_folder(tmp_path / "x.gguf")


@pytest.mark.parametrize("is_wanted", [True, False])
def test_tokenizer_begins_texts_as_the_file_says(is_wanted: bool, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama(), settings={"tokenizer.ggml.add_bos_token": is_wanted})
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(tmp_path / "x.gguf"))
    assert begins_with_bos(tokenizer) == is_wanted
    assert tokenizer("ABC", add_special_tokens=False).input_ids == [59, 4]


def test_a_header_that_says_it_is_huge_is_refused_at_once(tmp_path: Path) -> None:
    """A file of a few bytes can claim billions of items; sparse, it can even hold them."""
    path = tmp_path / "x.gguf"
    key = b"tokenizer.ggml.tokens"
    array = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 1 << 40)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    os.truncate(path, 1 << 30)
    began = time.process_time()
    with pytest.raises(ValueError, match="more than"):
        parse_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1))
    with pytest.raises(ValueError, match="too many"):
        parse_gguf(path)
    assert time.process_time() - began < 5
