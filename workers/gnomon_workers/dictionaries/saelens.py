"""What SAELens wants to know of a dictionary: its configuration, its names of hooks, and how often features fire."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from gnomon.dictionary_config import Activation as Kind
from gnomon.specs import TopK
from gnomon_workers.dictionaries.weights import exported_kind
from gnomon_workers.sae.plan import TrainPlan

_SAELENS_FORMAT: Final = "6.54.0"
"""SAELens version whose layout is written; below 6.0.0 its loader throws the metadata away."""


_LAYER: Final = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d+)$")


def saelens_config(plan: TrainPlan, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json of the folder; SAELens loads it unless it is a crosscoder, or a TopK or gated transcoder."""
    kind = exported_kind(plan.spec.activation)
    config: dict[str, Any] = {
        "architecture": _architecture(plan, kind),
        "d_in": plan.d_in,
        "d_sae": plan.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": plan.target is None,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(plan.spec.activation, TopK):
        config |= {"k": plan.spec.activation.k, "rescale_acts_by_decoder_norm": False}
    if plan.target is not None:
        config["d_out"] = plan.d_out
    if len(plan.inputs) > 1:
        config |= {"activation": kind, "hooks": {hook.name: hook.width for hook in plan.inputs}}
    config["metadata"] = {
        "sae_lens_version": _SAELENS_FORMAT,
        **_hook_metadata(plan),
        "training_architecture": plan.spec.activation.kind,
        **metadata,
    }
    return config


def _architecture(plan: TrainPlan, kind: Kind) -> str:
    if len(plan.inputs) > 1:
        return "crosscoder"
    if plan.target is None:
        return kind
    return "transcoder" if kind == "standard" else f"{kind}_transcoder"


def _hook_metadata(plan: TrainPlan) -> dict[str, str]:
    names = {"hook_name": transformer_lens_name(plan.inputs[0].name), "hf_hook_name": plan.inputs[0].name}
    if plan.target is not None:
        names |= {"hook_name_out": transformer_lens_name(plan.target.name), "hf_hook_name_out": plan.target.name}
    return names


def transformer_lens_name(hook_name: str) -> str:
    """TransformerLens' name of a hook: "model.layers.6" is blocks.6.hook_resid_post; others keep their name.

    So do the layers of BERT and its kind ("encoder.layer.2"), which end with a norm: no residual stream leaves them.
    """
    layer = _LAYER.match(hook_name)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hook_name


def write_sparsity(path: Path, firing_frequency: torch.Tensor) -> None:
    """sparsity.safetensors: log10 of how often each feature fires, (d_sae,)."""
    save_file({"sparsity": torch.log10(firing_frequency.float() + 1e-10).contiguous()}, path)
