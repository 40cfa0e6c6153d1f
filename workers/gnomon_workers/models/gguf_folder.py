"""A GGUF file turned into an ordinary Hugging Face folder, once: config.json, model.safetensors, tokenizer files.

Reading the tensors directly gives the bits that transformers' own GGUF loading gives, in a quarter of its time, and
the folder loads in a second ever after. Weights are written in float32, so that nothing is rounded on the way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from safetensors.numpy import save_file

from gnomon.errors import InvalidRequest
from gnomon_storage.digests import path_digest
from gnomon_workers.models.gguf_names import gguf_tensor_name

Array = np.ndarray[Any, np.dtype[Any]]
_CONVERTER_VERSION: Final = 1


def cache_dir() -> Path:
    """Where converted and downloaded models are kept: $GNOMON_CACHE/models, by default ~/.cache/gnomon/models."""
    base = os.environ.get("GNOMON_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "gnomon") / "models"


def gguf_folder(path: Path) -> Path:
    """The folder of a GGUF file, converted on first use; several processes may ask at once.

    Raises InvalidRequest, code "unsupported_model", for an architecture other than Llama's.
    """
    target = cache_dir() / f"gguf-{path_digest(path)[:32]}-{_CONVERTER_VERSION}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(path, temp)
        try:
            temp.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return target


def _convert(path: Path, folder: Path) -> None:
    from transformers import LlamaConfig

    reader = gguf.GGUFReader(path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise InvalidRequest(
            f"{path.name} holds a model of architecture {architecture!r}; GGUF files of architecture 'llama' can be "
            "read. Convert it to a Hugging Face folder and give that",
            code="unsupported_model",
        )
    tensors = {gguf_tensor_name(tensor.name): _weights(tensor, meta) for tensor in reader.tensors}
    config = LlamaConfig(**_config(meta), tie_word_embeddings="lm_head.weight" not in tensors)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(path, meta, folder)


def _weights(tensor: Any, meta: Mapping[str, Any]) -> Array:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    values = values.reshape([int(n) for n in reversed(tensor.shape)])
    kind = tensor.name.split(".")[-2]
    if kind in ("attn_q", "attn_k"):
        n_heads = meta["llama.attention.head_count"]
        heads = n_heads if kind == "attn_q" else meta.get("llama.attention.head_count_kv", n_heads)
        values = split_to_rotate_halves(values, heads)
    return np.ascontiguousarray(values)


def split_to_rotate_halves(weights: Array, n_heads: int) -> Array:
    """Rows of a q or k projection for rotary embeddings that rotate halves, from rows for adjacent pairs.

    weights is (n_heads * head_dim, d).
    """
    rows, *rest = weights.shape
    pairs = weights.reshape(n_heads, rows // n_heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _config(meta: Mapping[str, Any]) -> dict[str, Any]:
    n_heads = meta["llama.attention.head_count"]
    return {
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", n_heads),
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def _save_tokenizer(path: Path, meta: Mapping[str, Any], folder: Path) -> None:
    """tokenizer.json and its config; every control token is marked special, so that a harvest can drop it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)
