"""Export: the SAELens folder of a trained dictionary, with its provenance.

    dictionaries/<id>/attempt-0002/
      cfg.json  sae_weights.safetensors  sparsity.safetensors  runner_cfg.json
      gnomon.json      manifest with digests and the record, written last: the folder is published iff it exists

Weights are written shard by shard into a mapped file, so no process ever holds a whole matrix. The scaling of the
inputs is folded into biases and threshold; the weights stay as they are, so <w, d> = 1 holds in the export too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from gnomon.specs import BatchTopK, TopK
from gnomon_storage.location import Location
from gnomon_workers.train.checkpoints import Checkpoint, Shard, open_shard
from gnomon_workers.train.plan import TrainPlan

MANIFEST: Final = "gnomon.json"
FORMAT: Final = "gnomon-dictionary-1"
WEIGHTS: Final = "sae_weights.safetensors"
_SAELENS_FORMAT: Final = "6.54.0"
"""SAELens version whose layout is written; below 6.0.0 its loader throws the metadata away."""
_ATTEMPT: Final = re.compile(r"^attempt-\d{4}$")
_LAYER: Final = re.compile(r"^(?:.*\.)?(?:layers|layer|h|blocks)\.(\d+)$")
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """What is known of a dictionary from its last checkpoint alone."""

    n_dead: int
    """Features that had not fired within the dead window when training ended."""


def write_weights(path: Path, plan: TrainPlan, checkpoint: Checkpoint, checkpoints: Location) -> WeightFacts:
    """Write sae_weights.safetensors at `path` from a checkpoint's shards, one after the other."""
    shapes = {
        "W_enc": (plan.d_in, plan.d_sae),
        "W_dec": (plan.d_sae, plan.d_in),
        "b_enc": (plan.d_sae,),
        "b_dec": (plan.d_in,),
    }
    if isinstance(plan.activation, BatchTopK):
        shapes["threshold"] = (plan.d_sae,)
    tensors = _create_safetensors(path, shapes)
    n_dead = 0
    for shard in checkpoint.shards:
        with open_shard(checkpoints.child(checkpoint.name), shard) as source:
            _copy_shard(tensors, source, shard, plan.scale)
            n_dead += int((source.get_tensor("n_tokens_since_fired") >= plan.dead_after_tokens).sum())
    if "threshold" in tensors:
        tensors["threshold"][:] = checkpoint.threshold / plan.scale
    for tensor in tensors.values():
        if isinstance(tensor, np.memmap):
            tensor.flush()
    return WeightFacts(n_dead=n_dead)


def _copy_shard(tensors: dict[str, Array], source: Any, shard: Shard, scale: float) -> None:
    names = set(source.keys())
    rows = slice(shard.start, shard.stop)
    W_dec = source.get_tensor("W_dec").numpy()
    W_enc_rows = source.get_tensor("W_enc_rows").numpy() if "W_enc_rows" in names else W_dec
    tensors["W_dec"][rows] = W_dec
    tensors["W_enc"][:, rows] = W_enc_rows.T
    tensors["b_enc"][rows] = source.get_tensor("b_enc").numpy() / np.float32(scale)
    tensors["b_dec"][:] = source.get_tensor("b_dec").numpy() / np.float32(scale)


def _create_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """A float32 safetensors file of the given shapes, and writable views into it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        n_bytes = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + n_bytes]}
        position += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)
    base = 8 + len(text)
    return {
        name: np.memmap(path, np.float32, "r+", base + header[name]["data_offsets"][0], shape)
        for name, shape in shapes.items()
    }


def saelens_config(plan: TrainPlan, hook_name: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json of the SAELens folder."""
    config: dict[str, Any] = {
        "architecture": "topk" if isinstance(plan.activation, TopK) else "jumprelu",
        "d_in": plan.d_in,
        "d_sae": plan.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    if isinstance(plan.activation, TopK):
        config |= {"k": plan.activation.k, "rescale_acts_by_decoder_norm": False}
    config["metadata"] = {
        "sae_lens_version": _SAELENS_FORMAT,
        "hook_name": transformer_lens_name(hook_name),
        "hf_hook_name": hook_name,
        "training_architecture": plan.activation.kind,
        **metadata,
    }
    return config


def transformer_lens_name(hook_name: str) -> str:
    """TransformerLens' name of a hook: "model.layers.6" is blocks.6.hook_resid_post; others keep their name."""
    layer = _LAYER.match(hook_name)
    return f"blocks.{layer[1]}.hook_resid_post" if layer else hook_name


def write_sparsity(path: Path, firing_frequency: torch.Tensor) -> None:
    """sparsity.safetensors: log10 of how often each feature fires, (d_sae,)."""
    save_file({"sparsity": torch.log10(firing_frequency.float() + 1e-10).contiguous()}, path)


def published(dictionary: Location) -> dict[str, Any] | None:
    """The record of a dictionary that some attempt published, or None."""
    for name in filter(_ATTEMPT.match, dictionary.list()):
        manifest = dictionary.child(name, MANIFEST)
        if manifest.exists():
            record: dict[str, Any] = manifest.read_json()["record"]
            return record
    return None


def publish(folder: Location, local: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Upload a local folder, then its manifest; returns the record with location and files added."""
    folder.upload(local)
    files = {file.name: file for file in sorted(local.iterdir())}
    whole = {
        **record,
        "location": folder.url,
        "files": {name: file.stat().st_size for name, file in files.items()},
    }
    digests = {name: _digest(file) for name, file in files.items()}
    folder.child(MANIFEST).write_json({"format": FORMAT, "record": whole, "blake2b": digests})
    return whole


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
