"""What a GGUF file of architecture llama says, in Transformers' words; what is not understood is refused by name.

A setting or a tensor that is left out makes another model, whose activations look like any other's. So every setting
of the architecture and every tensor is either translated here, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from gnomon.errors import InvalidRequest
from gnomon_workers.models.gguf_header import GgufHeader

ARCHITECTURE: Final = "llama"
ROPE_FACTORS: Final = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which Llama 3.1 and later have instead of a setting."""
LLAMA3_ROPES: Final = tuple(
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
)  # fmt: skip
"""The scalings that Meta's Llama 3.1 to 3.3 were published with."""
DIGIT_SPLITS: Final = frozenset(("smollm", "starcoder", "refact", "command-r", "codeshell"))
"""GPT-2's way to cut text, once every digit stands alone."""
SPLITS: Final = DIGIT_SPLITS | {
    # GPT-2's own way, which files that name none are read with as well
    "default", "gpt-2", "phi-2", "mpt", "olmo", "jais",
    # those that Transformers knows by these names
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
    "tekken", "qwen2", "deepseek-r1-qwen", "megrez", "gpt-4o", "llama4",
}  # fmt: skip
"""Ways to cut text before merging, as `tokenizer.ggml.pre` names them."""
_TRANSLATED: Final = frozenset(
    f"{ARCHITECTURE}.{name}"
    for name in (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
        "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
        "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    )
)  # fmt: skip
_TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_name(name: str) -> str | None:
    """The name in LlamaForCausalLM of a tensor of a GGUF file; None where it has none."""
    match name.split("."):
        case ["blk", number, part, ("weight" | "bias") as kind] if part in _IN_LAYER and number.isdecimal():
            return f"model.layers.{number}.{_IN_LAYER[part]}.{kind}"
        case [part, "weight"] if part in _TOP:
            return f"{_TOP[part]}.weight"
    return None


def read_shapes(header: GgufHeader) -> dict[str, tuple[int, ...]]:
    """Transformers' name -> shape of every tensor; raises InvalidRequest, "unsupported_model", for others."""
    strange = sorted(name for name in header.shapes if name != ROPE_FACTORS and tensor_name(name) is None)
    _refuse("tensors", strange)
    return {str(tensor_name(name)): shape for name, shape in header.shapes.items() if name != ROPE_FACTORS}


def read_config(header: GgufHeader) -> dict[str, Any]:
    """config.json of the model; raises InvalidRequest, "unsupported_model", for settings that are not understood."""
    own = {name for name in (*header.fields, *header.arrays) if name.startswith(f"{ARCHITECTURE}.")}
    _refuse("settings", sorted(own - _TRANSLATED) + sorted(header.arrays & own & _TRANSLATED))
    _check_tokenizer(header.fields)
    field = _Fields(header.fields)
    n_heads = field.whole("attention.head_count")
    shapes = read_shapes(header)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes.get("model.embed_tokens.weight", (0,))[0],
        "hidden_size": field.whole("embedding_length"),
        "intermediate_size": field.whole("feed_forward_length"),
        "num_hidden_layers": field.whole("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": field.whole("attention.head_count_kv", n_heads),
        "head_dim": _head_dim(field, n_heads),
        "max_position_embeddings": field.whole("context_length"),
        "rms_norm_eps": field.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": field.number("rope.freq_base", 10_000.0), **_rope(field)},
        "attention_bias": any(name.endswith("_proj.bias") and ".self_attn." in name for name in shapes),
        "mlp_bias": any(name.endswith("_proj.bias") and ".mlp." in name for name in shapes),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "bos_token_id": header.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.fields.get("tokenizer.ggml.eos_token_id"),
    }


class _Fields:
    """Settings of the architecture, each checked as it is read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"{ARCHITECTURE}.{name}", default)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _unsupported(f"{ARCHITECTURE}.{name} is {value!r}, wanted a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise _unsupported(f"{ARCHITECTURE}.{name} is {value!r}, wanted a positive number")
        return float(value)


def _head_dim(field: _Fields, n_heads: int) -> int:
    """Width of a head; all of it is rotated in Llama, and keys and values are as wide as each other."""
    width = field.whole("embedding_length") // n_heads
    head_dim = field.whole("attention.key_length", field.get("rope.dimension_count") or width)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (given := field.get(name, head_dim)) != head_dim:
            raise _unsupported(f"{ARCHITECTURE}.{name} is {given!r} where heads are {head_dim} wide")
    return head_dim


def _rope(field: _Fields) -> dict[str, Any]:
    """Scaling of rotary positions as llama.cpp reads it: linear unless the type is "none", newer factor first."""
    kind = field.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise _unsupported(f"{ARCHITECTURE}.rope.scaling.type is {kind!r}, and 'none' or 'linear' are understood")
    name = "rope.scaling.factor" if field.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = field.number(name, 1.0)
    return {"rope_type": "default"} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _check_tokenizer(fields: Mapping[str, Any]) -> None:
    """Refuse a tokenizer whose way to cut text before merging is not known; llama.cpp reads it for byte-level BPE."""
    model, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model not in (None, "llama", "gpt2"):
        raise _unsupported(f"tokenizer.ggml.model is {model!r}, and 'llama' or 'gpt2' are understood")
    if model == "gpt2" and split is not None and split not in SPLITS:
        raise _unsupported(
            f"tokenizer.ggml.pre is {split!r}, a way to cut text before merging that is not known: the tokens would be "
            "others than those that the model was trained on"
        )


def _refuse(what: str, names: Iterable[str]) -> None:
    if found := list(names):
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise _unsupported(f"it has {what} that are not understood: {', '.join(found[:5])}{more}")


def _unsupported(problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"the GGUF file cannot be read as a Llama: {problem}. Give the model's Hugging Face folder instead",
        code="unsupported_model",
    )
