"""A GGUF file turned into an ordinary Hugging Face folder, once: config.json, model.safetensors, tokenizer files.

Reading the tensors directly gives the bits that transformers' own GGUF loading gives, in a quarter of its time, and
the folder loads in a second ever after. Weights are written in float32, so that nothing is rounded on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from safetensors.numpy import save_file

from gnomon.errors import InvalidRequest
from gnomon_storage.digests import path_digest
from gnomon_workers.models import gguf_llama
from gnomon_workers.models.cache import cache_dir
from gnomon_workers.models.gguf_header import parse_gguf
from gnomon_workers.models.tokenizers import begins_with_bos
from gnomon_workers.runtime.scratch import scratch_folder

Array = np.ndarray[Any, np.dtype[Any]]
_CONVERTER_VERSION: Final = 3


def gguf_folder(path: Path) -> Path:
    """The folder of a GGUF file, converted on first use; several processes may ask at once.

    Raises InvalidRequest, "unsupported_model", for an architecture other than Llama's, and where anything in the file
    is not understood.
    """
    target = cache_dir() / f"gguf-{path_digest(path)[:32]}-{_CONVERTER_VERSION}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(target.parent, prefix=".converting-") as temp:
        _convert(path, temp)
        try:
            temp.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, with the same bytes
                raise
    return target


def _convert(path: Path, folder: Path) -> None:
    header = parse_gguf(path)
    architecture = header.fields.get("general.architecture")
    if architecture != gguf_llama.ARCHITECTURE:
        raise InvalidRequest(
            f"{path.name} holds a model of architecture {architecture!r}; GGUF files of architecture 'llama' can be "
            "read. Convert it to a Hugging Face folder and give that",
            code="unsupported_model",
        )
    config = gguf_llama.read_config(header)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: _weights(tensor, config) for tensor in reader.tensors}
    factors = tensors.pop(gguf_llama.ROPE_FACTORS, None)
    if factors is not None:
        config["rope_parameters"] |= _rope_of_factors(factors, config)
    named = {str(gguf_llama.tensor_name(name)): tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    meta = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    _save_tokenizer(path, meta, folder)


def _weights(tensor: Any, config: Mapping[str, Any]) -> Array:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    values = values.reshape([int(n) for n in reversed(tensor.shape)])
    kind = tensor.name.split(".")[-2]
    if kind in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        values = split_to_rotate_halves(values, heads)
    return np.ascontiguousarray(values)


def _rope_of_factors(factors: Array, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of the rotary frequencies that gives these divisors; raises InvalidRequest where none is known."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config["rope_parameters"]["rope_theta"]
    plain = theta ** -(np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"])
    for scaling in gguf_llama.LLAMA3_ROPES:
        scaled = LlamaConfig(**{**config, "rope_parameters": {**scaling, "rope_theta": theta}})
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        if factors.shape == plain.shape and np.allclose(plain / frequencies.numpy(), factors, rtol=1e-4):
            return scaling
    raise InvalidRequest(
        f"{gguf_llama.ROPE_FACTORS} holds divisors of rotary frequencies that are not those of Llama 3.1 to 3.3, which "
        "alone are understood; give the model's Hugging Face folder instead",
        code="unsupported_model",
    )


def split_to_rotate_halves(weights: Array, n_heads: int) -> Array:
    """Rows of a q or k projection for rotary embeddings that rotate halves, from rows for adjacent pairs.

    weights is (n_heads * head_dim, d).
    """
    rows, *rest = weights.shape
    pairs = weights.reshape(n_heads, rows // n_heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _save_tokenizer(path: Path, meta: Mapping[str, Any], folder: Path) -> None:
    """tokenizer.json and its config; every control token is marked special, so that a harvest can drop it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    _cut_digits(tokenizer, meta.get("tokenizer.ggml.pre"))
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    _begin_with_bos(tokenizer, meta.get("tokenizer.ggml.add_bos_token"))
    tokenizer.save_pretrained(folder)


def _cut_digits(tokenizer: Any, split: str | None) -> None:
    """Have every digit stand alone, where the file says so in a name that Transformers does not know."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if split in gguf_llama.DIGIT_SPLITS:
        cuts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(cuts)


def _begin_with_bos(tokenizer: Any, is_wanted: bool | None) -> None:
    """Have a tokenizer begin texts with its BOS, or not, as the file says; None leaves it as it is."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    if is_wanted is None or bos is None or begins_with_bos(tokenizer) == is_wanted:
        return
    template = f"{bos} $A" if is_wanted else "$A"
    special = [(bos, tokenizer.bos_token_id)] if is_wanted else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
