"""Models: read up to the last hook, and GGUF files turned into ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_workers.models.gguf_folder import gguf_folder
from gnomon_workers.models.loading import load_model, read_activations
from tests.support.gguf_files import write_gguf

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
    with pytest.raises(InvalidRequest, match="convert the weights to safetensors"):
        load_model(ModelSource(source=str(tmp_path)), [str(tmp_path)], device=CPU)


def test_activations_are_kept_as_they_were_given() -> None:
    """CTRL scales its embeddings in place after the module that gives them."""
    from transformers import CTRLConfig, CTRLLMHeadModel

    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 16, "vocab_size": 60, "n_positions": 32}
    model = CTRLLMHeadModel(CTRLConfig(**sizes)).eval()
    ids = torch.arange(3, 10)[None]
    seen = read_activations(model, ["transformer.w", "transformer.h.1"], ids, torch.ones_like(ids))
    assert torch.equal(seen["transformer.w"], model.transformer.w.weight[ids])
