"""A tiny random model of every family of text models that Transformers can build."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

MOST_PARAMETERS: Final = 60_000_000
"""Of a tiny model; some families have parts that no setting here makes small, and are left out."""
_WIDTHS: Final = (
    "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim model_dim "
    "attention_hidden_size lru_width"
)
_INNER: Final = (
    "intermediate_size hidden_dim ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_hidden_size "
    "shared_intermediate_size block_ff_dim intermediate_size_mlp"
)
_DEPTHS: Final = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers"
_HEADS: Final = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
_SIZES: Final[Mapping[str, int]] = {
    **dict.fromkeys(_WIDTHS.split(), 32),
    **dict.fromkeys(_INNER.split(), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(_DEPTHS.split(), 3),
    **dict.fromkeys(_HEADS.split(), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "n_mamba_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "d_head", "attention_head_size", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("num_hidden_groups", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "time_step_rank", "rotary_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "qk_head_dim", "sliding_window"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "num_kv_shared_layers": 0,
    "max_2d_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def families() -> dict[str, str]:
    """Model type -> class of its language model, else of its masked, encoder-decoder or picture-and-text model."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for name, classes in mapping.items():
            found.setdefault(name, classes if isinstance(classes, str) else classes[0])
    return dict(sorted(found.items()))


def tiny_config(model_type: str, architecture: str) -> Any:
    """A config of the family with small sizes; raises whatever the family raises at sizes that do not suit it."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual = kind().to_dict()
        changes = _small(usual)
        for name, part in usual.items():
            if name.endswith("_config") and isinstance(part, dict):
                changes[name] = {**_small(part), **({"model_type": part["model_type"]} if "model_type" in part else {})}
        config = kind(**changes)
    config.architectures = [architecture]
    return config


def make_model(folder: Path, config: Any, *, causal: bool) -> None:
    """Save a random model of a config; raises ValueError where it is not tiny."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if causal else AutoModel
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if n > MOST_PARAMETERS:
        raise ValueError(f"a tiny model of it has {n:,} parameters")
    torch.manual_seed(0)
    auto.from_config(config).eval().save_pretrained(folder)


def _small(settings: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, size in _SIZES.items():
        usual = settings.get(name, "absent")
        if isinstance(usual, int) and not isinstance(usual, bool):
            small[name] = size if name.endswith("token_id") else min(size, usual) if usual > 0 else usual
    return small
