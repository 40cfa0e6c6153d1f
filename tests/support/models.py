"""A real small model for tests, as a Hugging Face folder: glassllm, a Llama trained on Lewis Carroll.

glassllm has its own forward pass in NumPy and its own tokenizer in Python: second implementations to test against.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import glassllm
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Split

N_LAYERS = 4
D_MODEL = 128
N_HEADS = 4
N_KV_HEADS = 2
VOCAB_SIZE = 1024
MAX_LENGTH = 128
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
Array = np.ndarray[Any, np.dtype[Any]]
_SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
_TENSORS = {
    "norm1.gamma": "input_layernorm", "attn.W_Q": "self_attn.q_proj", "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj", "attn.W_O": "self_attn.o_proj", "norm2.gamma": "post_attention_layernorm",
    "ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj",
}  # fmt: skip

ALICE = """Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.
Once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it.
There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit
say to itself that it should be late. The rabbit-hole went straight on like a tunnel for some way, and then dipped
suddenly down, so suddenly that Alice had not a moment to think about stopping herself."""


def make_glassllm(folder: Path) -> Path:
    """Write glassllm as a folder that LlamaForCausalLM and AutoTokenizer load; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(_weights_path()) as weights:
        tensors = {name: tensor for key in weights.files for name, tensor in _convert(key, weights[key])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config()))
    _make_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, **_SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def glassllm_ids(text: str) -> list[int]:
    """Tokens of a text, by glassllm's own tokenizer."""
    ids: list[int] = _glassllm()[1].encode(text)
    return ids


def glassllm_residuals(ids: Sequence[int]) -> list[Array]:
    """The residual stream (n_tokens, 128) after each block, by glassllm's own forward pass."""
    tracer = glassllm.Tracer()
    _glassllm()[0].forward(list(ids), trace=tracer)
    return [np.asarray(tracer.get("resid.ffn", layer=layer).value).reshape(-1, D_MODEL) for layer in range(N_LAYERS)]


def write_corpus(path: Path, n_documents: int = 40) -> Path:
    """A .jsonl file of different documents about Alice; returns its path."""
    sentences = [part.strip() + "." for part in ALICE.replace("\n", " ").split(".") if part.strip()]
    order = np.random.default_rng(0)
    documents = [" ".join(order.permutation(sentences)) for _ in range(n_documents)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@cache
def _glassllm() -> tuple[Any, Any]:
    model, tokenizer = glassllm.load_pretrained("en")
    return model, tokenizer


def _weights_path() -> Path:
    return Path(glassllm.__file__).parent / "weights" / "en.npz"


def _convert(key: str, tensor: Array) -> list[tuple[str, Array]]:
    """One of glassllm's tensors by its name in LlamaForCausalLM."""
    if key == "__config__":
        return []
    values = np.ascontiguousarray(tensor.astype(np.float32).T)  # glassllm multiplies from the right
    if key == "E":
        return [("model.embed_tokens.weight", np.ascontiguousarray(values.T))]
    if key == "norm_f.gamma":
        return [("model.norm.weight", values)]
    _, layer, rest = key.split(".", 2)
    if rest in ("attn.W_Q", "attn.W_K"):
        # glassllm rotates adjacent pairs of a head, transformers its two halves
        heads = values.reshape(N_HEADS if rest == "attn.W_Q" else N_KV_HEADS, -1, D_MODEL)
        values = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(-1, D_MODEL)
    return [(f"model.layers.{layer}.{_TENSORS[rest]}.weight", np.ascontiguousarray(values))]


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE,
        "hidden_size": D_MODEL, "intermediate_size": 341, "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS, "num_key_value_heads": N_KV_HEADS, "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID,
    }  # fmt: skip


def _make_tokenizer() -> Tokenizer:
    """glassllm's byte-pair encoding, for the tokenizers library."""
    ours = _glassllm()[1]
    tokenizer = Tokenizer(BPE(vocab=ours.token_to_id, merges=ours.merges, unk_token="<unk>"))
    tokenizer.normalizer = Normalizers([NFC(), Replace(" ", "▁")])
    tokenizer.pre_tokenizer = Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    return tokenizer


def make_lists_of_layers(folder: Path, number: int = 0) -> None:
    """A checkpoint that lists 8,000 modules with layers, and takes seconds to look at; number: unlike any other."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (folder / "tokenizer.json").write_text(json.dumps({"number": number}))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"m{i}.layers.{j}.w": empty for i in range(8_000) for j in (0, 1)}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
