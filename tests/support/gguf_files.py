"""Small GGUF files of Llamas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def write_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    *,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array] | None = None,
    leave_out: str = "nothing",
    split: str = "default",
) -> None:
    """A small GGUF file of a Llama, as llama.cpp's converter would write it: q and k rows in adjacent pairs.

    `split` names how text is cut before merging. `settings` and `tensors` are added to its own; tensors whose name
    contains `leave_out` are left out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _add_fields(writer, model.config, split)
    for key, value in (settings or {}).items():
        kinds: dict[type, Any] = {
            str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            list: writer.add_array,
        }  # fmt: skip
        kinds[type(value)](key, value)
    _add_weights(writer, model, leave_out)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_fields(writer: gguf.GGUFWriter, config: Any, split: str) -> None:
    """What the model is, and a tokenizer of 60 tokens."""
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
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 58])
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add_weights(writer: gguf.GGUFWriter, model: Any, leave_out: str) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if leave_out in name:
            continue
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads or 0
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(values))
