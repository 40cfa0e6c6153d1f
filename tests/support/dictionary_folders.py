"""Small random dictionaries on disk, in the layout that SAELens reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, K = 16, 48, 5


def make_tensors(architecture: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights with unit-norm decoder rows and alignment 1, as a trained dictionary has them."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=-1)
    W_enc = W_dec + 0.1 * torch.randn(D_SAE, D_IN, generator=generator)
    W_enc = W_enc + (1 - (W_enc * W_dec).sum(-1, keepdim=True)) * W_dec
    tensors = {
        "W_enc": W_enc.T.contiguous(),
        "W_dec": W_dec,
        "b_enc": 0.1 * torch.randn(D_SAE, generator=generator),
        "b_dec": torch.randn(D_IN, generator=generator),
    }
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((D_SAE,), 0.7)
    if architecture == "gated":
        tensors["b_mag"] = tensors.pop("b_enc")
        tensors["b_gate"] = 0.1 * torch.randn(D_SAE, generator=generator)
        tensors["r_mag"] = 0.1 * torch.randn(D_SAE, generator=generator)
    return tensors


def make_config(architecture: str, /, **changes: Any) -> dict[str, Any]:
    """cfg.json of such a dictionary."""
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.0",
            "model_name": "tiny",
            "hook_name": "blocks.2.hook_resid_post",
            "hf_hook_name": "model.layers.2",
            "context_size": 128,
        },
    }
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    return config | changes


def make_folder(folder: Path, architecture: str, /, **changes: Any) -> Path:
    """Write a dictionary into a new folder; changes replace keys of cfg.json."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(make_config(architecture, **changes)))
    save_file(make_tensors(architecture), folder / "sae_weights.safetensors")
    return folder
