"""Models: read up to the last hook, and GGUF files turned into ordinary folders."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_workers.models.gguf_folder import gguf_folder
from gnomon_workers.models.loading import load_model, read_activations

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def test_activations_are_the_modules_outputs(llama: LlamaForCausalLM) -> None:
    ids = torch.randint(0, 60, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    hooks = ["model.layers.2", "model.layers.0", "model.layers.1.mlp"]
    seen = read_activations(llama, hooks, ids, mask)
    with torch.no_grad():
        states = llama(input_ids=ids, output_hidden_states=True).hidden_states
    assert list(seen) == hooks
    assert torch.equal(seen["model.layers.0"], states[1])
    assert torch.equal(seen["model.layers.2"], states[3])
    assert seen["model.layers.1.mlp"].shape == (2, 10, 32)


def test_nothing_above_the_last_hook_is_run(llama: LlamaForCausalLM) -> None:
    reached: list[int] = []
    n_hooks = len(llama.model.layers[1]._forward_hooks)
    handles = [
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i)) for i, layer in enumerate(llama.model.layers)
    ]
    read_activations(llama, ["model.layers.1"], torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4).long())
    for handle in handles:
        handle.remove()
    assert reached == [0, 1]
    assert len(llama.model.layers[1]._forward_hooks) == n_hooks


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama") -> None:
    """A small GGUF file as llama.cpp's converter would write it: q and k rows in adjacent pairs."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    letters = [chr(c) for c in range(ord("A"), ord("A") + 57)]
    tokens = ["<|start|>", "<|end|>", *letters, "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 58])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads or 0
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", llama)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_gives_the_bits_that_transformers_gives(gguf_file: Path, llama: LlamaForCausalLM) -> None:
    source = ModelSource(source=str(gguf_file), dtype="float32")
    ours = load_model(source, [str(gguf_file.parent)], device=CPU)
    theirs = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    assert ours.is_causal
    state = ours.module.state_dict()
    assert set(state) == set(theirs.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    assert all(torch.equal(state[name], tensor) for name, tensor in llama.state_dict().items())


def test_control_tokens_of_a_gguf_file_are_special(gguf_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(gguf_file))
    assert set(tokenizer.all_special_ids) >= {0, 1}
    assert tokenizer("ABC", add_special_tokens=False).input_ids == [59, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_gguf_file_is_converted_once(gguf_file: Path) -> None:
    folder = gguf_folder(gguf_file)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_folder(gguf_file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_another_architecture_is_refused_and_leaves_nothing(
    tmp_path: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "odd.gguf", llama, architecture="mamba")
    with pytest.raises(InvalidRequest, match="'mamba'") as error:
        gguf_folder(tmp_path / "odd.gguf")
    assert error.value.code == "unsupported_model"
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_pickled_weights_are_not_read(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    llama.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle would be here")
    with pytest.raises(OSError, match="safetensors"):
        load_model(ModelSource(source=str(tmp_path)), [str(tmp_path)], device=CPU)
