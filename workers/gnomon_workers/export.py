"""Export: the SAELens folder of a trained dictionary, with its provenance.

    dictionaries/<id>/attempt-0002/
      cfg.json  sae_weights.safetensors  sparsity.safetensors  runner_cfg.json
      gnomon.json      manifest with digests and the record, written last: the folder is published iff it exists

Weights are written shard by shard into a mapped file, so no process ever holds a whole matrix. The scaling of the
inputs is folded into biases and threshold; the weights stay as they are, so <w, d> = 1 holds in the export too.
Hooks of different scales, in crosscoders and transcoders, have theirs folded into the weights as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from gnomon.dictionary_config import Activation as Kind
from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_storage.location import Location
from gnomon_workers.train.checkpoints import Checkpoint, Shard, open_shard
from gnomon_workers.train.plan import HookRows, TrainPlan

MANIFEST: Final = "gnomon.json"
FORMAT: Final = "gnomon-dictionary-1"
WEIGHTS: Final = "sae_weights.safetensors"
_SAELENS_FORMAT: Final = "6.54.0"
"""SAELens version whose layout is written; below 6.0.0 its loader throws the metadata away."""
_VECTORS: Final[dict[Kind, tuple[str, ...]]] = {
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Tensors (d_sae,) of each kind of dictionary."""
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
    kind = exported_kind(plan.activation)
    shapes = {"W_enc": (plan.d_in, plan.d_sae), "W_dec": (plan.d_sae, plan.d_out), "b_dec": (plan.d_out,)}
    shapes |= dict.fromkeys(_VECTORS[kind], (plan.d_sae,))
    tensors = _create_safetensors(path, shapes)
    n_dead = 0
    for shard in checkpoint.shards:
        with open_shard(checkpoints.child(checkpoint.name), shard) as source:
            _copy_shard(tensors, source, shard, plan, checkpoint.state)
            n_dead += int((source.get_tensor("n_tokens_since_fired") >= plan.dead_after_tokens).sum())
    for tensor in tensors.values():
        if isinstance(tensor, np.memmap):
            tensor.flush()
    return WeightFacts(n_dead=n_dead)


def exported_kind(activation: Activation) -> Kind:
    """The activation, in SAELens' terms, that a trained one acts as at inference."""
    match activation:
        case TopK():
            return "topk"
        case BatchTopK() | Matryoshka() | JumpReLU():
            return "jumprelu"
        case ReLU() | PAnneal():
            return "standard"
        case Gated():
            return "gated"


def _copy_shard(
    tensors: dict[str, Array], source: Any, shard: Shard, plan: TrainPlan, state: Mapping[str, float]
) -> None:
    """Copy a shard's features, with the scaling of inputs and outputs folded in.

    Training has pre = w (s_in x - b_dec) + b_enc and x_hat = (f d + b_dec) / s_out. With features divided by c, the
    output scale, raw weights are s_in w / c and c d / s_out: of one hook they are w and d, whatever its scale.
    """
    c = plan.output_scale
    names = set(source.keys())
    rows = slice(shard.start, shard.stop)
    W_dec = source.get_tensor("W_dec").numpy()
    W_enc_rows = source.get_tensor("W_enc_rows").numpy() if "W_enc_rows" in names else W_dec
    outputs = _by_column(plan.inputs if plan.target is None else (plan.target,))
    tensors["W_dec"][rows] = W_dec * (c / outputs)
    tensors["W_enc"][:, rows] = (W_enc_rows * (_by_column(plan.inputs) / c)).T
    tensors["b_dec"][:] = source.get_tensor("b_dec").numpy() / outputs
    b_enc = source.get_tensor("b_enc").numpy() / np.float32(c)
    match exported_kind(plan.activation):
        case "gated":
            r_mag = source.get_tensor("r_mag").numpy()
            # the stored encoder is the magnitude's, SAELens' is the gate's
            tensors["W_enc"][:, rows] *= np.exp(-r_mag)
            tensors["r_mag"][rows] = r_mag
            tensors["b_mag"][rows] = b_enc
            tensors["b_gate"][rows] = source.get_tensor("b_gate").numpy() / np.float32(c)
        case "jumprelu":
            tensors["b_enc"][rows] = b_enc
            learned = "log_threshold" in names
            threshold = np.exp(source.get_tensor("log_threshold").numpy()) if learned else state["threshold"]
            tensors["threshold"][rows] = threshold / c
        case _:
            tensors["b_enc"][rows] = b_enc


def _by_column(hooks: Sequence[HookRows]) -> Array:
    """The scale of every column of joined hooks, (width,) float32."""
    return np.concatenate([np.full(hook.width, hook.scale, dtype=np.float32) for hook in hooks])


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


def saelens_config(plan: TrainPlan, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """cfg.json of the folder; SAELens loads it unless it is a crosscoder, or a TopK or gated transcoder."""
    kind = exported_kind(plan.activation)
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
    if isinstance(plan.activation, TopK):
        config |= {"k": plan.activation.k, "rescale_acts_by_decoder_norm": False}
    if plan.target is not None:
        config["d_out"] = plan.d_out
    if len(plan.inputs) > 1:
        config |= {"activation": kind, "hooks": {hook.name: hook.width for hook in plan.inputs}}
    config["metadata"] = {
        "sae_lens_version": _SAELENS_FORMAT,
        **_hook_metadata(plan),
        "training_architecture": plan.activation.kind,
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
