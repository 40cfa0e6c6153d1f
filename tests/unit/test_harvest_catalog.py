"""The catalogue: models told from their headers, without loading a weight."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gnomon.errors import InvalidRequest, Unavailable
from gnomon.specs import HarvestSpec, ModelSource, TextSource
from gnomon_workers.harvest.identity import store_id
from gnomon_workers.models import hub
from gnomon_workers.models.catalog import check_context_length, check_hook, describe_model
from gnomon_workers.models.gguf_header import parse_gguf
from gnomon_workers.models.modules import is_causal
from tests.support.models import make_glassllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glassllm in Hugging Face layout."""
    return make_glassllm(tmp_path_factory.mktemp("models") / "glassllm")


def describe(path: Path) -> object:
    """The description of a folder under its own parent as root."""
    return describe_model(ModelSource(source=str(path)), [str(path.parent)])


def test_a_folder_is_described_by_its_headers(folder: Path) -> None:
    found = describe_model(ModelSource(source=str(folder)), [str(folder.parent)])
    assert (found.kind, found.is_causal, found.n_layers, found.hidden_size) == ("folder", True, 4, 128)
    assert (found.n_embeddings, found.context_length, found.path) == (1024, 128, str(folder))
    assert found.n_parameters == 852_608
    assert found.hooks["model.layers.2"] == 128
    assert found.hooks["model.layers.2.mlp"] == 128
    assert found.hooks["model.layers.2.mlp.up_proj"] == 341
    assert found.hooks["model.layers.2.self_attn.k_proj"] == 64
    assert "model.layers" not in found.hooks
    assert "lm_head" not in found.hooks
    assert list(found.hooks)[:2] == ["model.embed_tokens", "model.layers.0"]


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2},
    "gpt2": {"architectures": ["GPT2LMHeadModel"]},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2},
    "bert": {"architectures": ["BertModel"]},
    "roberta": {"architectures": ["RobertaForMaskedLM"]},
    "distilbert": {"architectures": ["DistilBertForMaskedLM"], "dim": 32, "hidden_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("with_head", [True, False])
def test_hooks_are_modules_of_the_class_that_is_loaded(tmp_path: Path, model_type: str, with_head: bool) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(model_type, vocab_size=50, **sizes, **MODELS[model_type])
    causal = is_causal(config.to_dict())
    auto: Any = AutoModelForCausalLM if causal else AutoModel
    model = auto.from_config(config)
    prefix = "" if causal or not with_head else f"{model_type}."
    if causal and not with_head and model_type != "gpt2":
        pytest.skip("only GPT-2 is published without its prefix")
    if causal and not with_head:
        prefix = "-"
    tensors = {
        name.removeprefix("transformer.") if prefix == "-" else prefix + name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head") and "embed_out" not in name
    }
    save_file(tensors, tmp_path / "model.safetensors")
    settings = config.to_dict() | {"architectures": MODELS[model_type]["architectures"]}
    (tmp_path / "config.json").write_text(json.dumps(settings, default=str))
    (tmp_path / "tokenizer.json").write_text("{}")
    found = describe_model(ModelSource(source=str(tmp_path)), [str(tmp_path)])
    modules = dict(model.named_modules())
    assert found.n_layers == 3
    assert set(found.hooks) <= set(modules)
    layers = [name for name in modules if name.rsplit(".", 1)[-1].isdigit() and name.count(".") <= 2]
    assert set(layers) <= set(found.hooks)
    linear = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    for name, module in linear.items():
        if name in found.hooks:
            assert found.hooks[name] == module.out_features


def test_an_unknown_hook_is_answered_with_near_ones(folder: Path) -> None:
    found = describe_model(ModelSource(source=str(folder)), [str(folder.parent)])
    check_hook("model.layers.3", found)
    with pytest.raises(InvalidRequest) as caught:
        check_hook("model.layer.3", found)
    assert caught.value.code == "unknown_hook"
    assert caught.value.message.index("'model.layers.3'") < caught.value.message.index("layers are")
    assert "'model.layers.0' to 'model.layers.3'" in caught.value.message


def test_a_context_longer_than_the_model_is_refused(folder: Path) -> None:
    found = describe_model(ModelSource(source=str(folder)), [str(folder.parent)])
    check_context_length(128, found)
    with pytest.raises(InvalidRequest, match="128 positions"):
        check_context_length(129, found)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no config", "no config.json"),
        ("no weights", "pytorch_model.bin, which may run code"),
        ("bad header", "not a safetensors file"),
        ("bad json", "the header"),
        ("no tokenizer", "no tokenizer"),
        ("config list", "is not a JSON object"),
        ("index outside", "has no ../x.safetensors"),
    ],
)
def test_unusable_folders_are_refused(folder: Path, tmp_path: Path, damage: str, says: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    match damage:
        case "no config":
            (copy / "config.json").unlink()
        case "no weights":
            weights.rename(copy / "pytorch_model.bin")
        case "bad header":
            weights.write_bytes(b"\xff" * 100)
        case "bad json":
            weights.write_bytes((10).to_bytes(8, "little") + b'{"a": [1]}')
        case "no tokenizer":
            (copy / "tokenizer.json").unlink()
            (copy / "tokenizer_config.json").unlink()
        case "config list":
            (copy / "config.json").write_text("[]")
        case "index outside":
            index = {"weight_map": {"a": "../x.safetensors"}}
            (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest) as caught:
        describe(copy)
    assert caught.value.code == "unknown_model"
    assert says in caught.value.message.replace(f"{copy}/", "")


def test_what_is_no_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    cases = {
        str(tmp_path / "absent"): "unknown_model",
        str(tmp_path / "x.gguf"): "unknown_model",
        str(folder): "location_not_allowed",
        "s3://bucket/model": "location_not_allowed",
        "../x": "location_not_allowed",
    }
    for source, code in cases.items():
        with pytest.raises(InvalidRequest) as caught:
            describe_model(ModelSource(source=source), [str(tmp_path)])
        assert caught.value.code == code, source
    with pytest.raises(InvalidRequest, match="belongs to hub models"):
        describe_model(ModelSource(source=str(tmp_path), revision="main"), [str(tmp_path)])


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytearray:
    """A GGUF file with every type of setting and two tensors, written by the format's own library."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("some.flag", True)
    writer.add_token_list(["a", "b", "cdé"])
    writer.add_token_types([1, 1, 3])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    for part in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros(8, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros((8, 8), np.float32))
    for part in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros((16, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((8, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bytearray((tmp_path / "x.gguf").read_bytes())


def test_a_gguf_file_is_described_by_its_header(gguf_bytes: bytearray, tmp_path: Path) -> None:
    found = describe_model(ModelSource(source=str(tmp_path / "x.gguf")), [str(tmp_path)])
    assert (found.kind, found.is_causal, found.n_layers, found.hidden_size) == ("gguf", True, 1, 8)
    assert (found.n_embeddings, found.context_length) == (3, 64)
    assert found.hooks["model.layers.0.mlp.down_proj"] == 8
    assert found.hooks["model.layers.0.mlp.up_proj"] == 16
    header = parse_gguf(tmp_path / "x.gguf")
    assert header.fields["some.flag"] is True
    assert header.fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_a_damaged_gguf_header_never_does_worse_than_being_refused(gguf_bytes: bytearray, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    n_header = gguf_bytes.index(b"ffn_down.weight") + 47
    n_refused = 0
    for position in range(n_header):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(gguf_bytes[:n_header])
            damaged[position] ^= change
            path.write_bytes(damaged)
            try:
                parse_gguf(path)
            except ValueError:
                n_refused += 1
        path.write_bytes(gguf_bytes[:position])
        with pytest.raises(ValueError, match=r"cut short|empty file"):
            parse_gguf(path)
    assert n_refused > n_header // 4


def test_other_architectures_of_gguf_are_unsupported(gguf_bytes: bytearray, tmp_path: Path) -> None:
    (tmp_path / "y.gguf").write_bytes(gguf_bytes.replace(b"llama", b"mamba"))
    with pytest.raises(InvalidRequest, match="'mamba'") as caught:
        describe_model(ModelSource(source=str(tmp_path / "y.gguf")), [str(tmp_path)])
    assert caught.value.code == "unsupported_model"


def test_the_fingerprint_follows_the_bytes(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)

    def fingerprint() -> str:
        return describe_model(ModelSource(source=str(copy)), [str(tmp_path)]).fingerprint()

    first = describe_model(ModelSource(source=str(folder)), [str(folder.parent)]).fingerprint()
    assert fingerprint() == first
    (copy / "README.md").write_text("nothing of importance")
    assert fingerprint() == first
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    changed = fingerprint()
    assert changed != first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert fingerprint() not in (first, changed)


COMMIT = "a" * 40


@pytest.fixture
def hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with one model, and no way to a hub."""
    model = tmp_path / "models--org--name"
    shutil.copytree(folder, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_cached_hub_model_is_found_without_the_hub(hub_cache: Path, revision: str | None) -> None:
    found = describe_model(ModelSource(source="org/name", revision=revision), [])
    assert (found.kind, found.revision, found.fingerprint()) == ("hub", COMMIT, COMMIT)
    assert found.hooks["model.layers.0"] == 128


def test_a_hub_that_does_not_answer_is_unavailable(hub_cache: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        describe_model(ModelSource(source="org/other"), [])
    assert caught.value.code == "hub_unreachable"
    assert "absolute path" in caught.value.message


def test_a_cached_model_without_safetensors_does_not_count(hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    assert hub.cached_snapshot("org/name", None) is None


def make_spec(**changes: object) -> HarvestSpec:
    """A harvest spec."""
    fields = {
        "model": {"source": "/m"}, "text": [{"url": "/t.txt"}], "hooks": ["model.layers.1"], "token_budget": 10_000,
    }  # fmt: skip
    return HarvestSpec.model_validate({**fields, **changes})


def test_store_ids_follow_what_determines_rows() -> None:
    first = store_id(make_spec(), "m", "t")
    same = make_spec(text=[TextSource(url="/other.txt")], n_workers=2, model=ModelSource(source="/elsewhere"))
    assert store_id(same, "m", "t") == first
    assert len(first) == 36
    others = [
        store_id(make_spec(), "m2", "t"),
        store_id(make_spec(), "m", "t2"),
        *[
            store_id(make_spec(**change), "m", "t")
            for change in (
                {"hooks": ["model.layers.2"]}, {"context_length": 64}, {"token_budget": 20_000}, {"dtype": "float32"},
                {"packing": {"kind": "document"}}, {"drop": {"first_positions": 0}}, {"held_out_every": 8},
                {"model": {"source": "/m", "dtype": "float32"}}, {"segment_tokens": 2048},
            )
        ],
    ]  # fmt: skip
    assert len({first, *others}) == 1 + len(others)
    two = [make_spec(hooks=hooks) for hooks in (["model.layers.1", "a.1"], ["a.1", "model.layers.1"])]
    assert store_id(two[0], "m", "t") == store_id(two[1], "m", "t")


def test_the_catalogue_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, gnomon_workers.models.catalog\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
