"""The weights of a trained dictionary, written into a mapped file some features at a time: no process holds a matrix.

The scaling of the inputs is folded into biases and threshold; the weights stay as they are, so <w, d> = 1 holds in the
export too. Hooks of different scales, in crosscoders and transcoders, have theirs folded into the weights as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gnomon.dictionary_config import Activation as Kind
from gnomon.safetensors_header import encode_header
from gnomon.specs import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from gnomon_storage.location import Location
from gnomon_workers.checkpoints.format import Checkpoint, Shard, open_shard
from gnomon_workers.sae.plan import HookRows, TrainPlan

WEIGHTS: Final = "sae_weights.safetensors"
_BLOCK_ELEMENTS: Final = 1 << 24
"""Weights of a feature's encoder and decoder that are held at once: 64 MB in float32, and as much again scaled."""
_VECTORS: Final[dict[Kind, tuple[str, ...]]] = {
    "topk": ("b_enc",),
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""Tensors (d_sae,) of each kind of dictionary."""


Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """What is known of a dictionary from its last checkpoint alone."""

    n_dead: int
    """Features that had not fired within the dead window when training ended."""


def write_weights(path: Path, plan: TrainPlan, checkpoint: Checkpoint, checkpoints: Location) -> WeightFacts:
    """Write sae_weights.safetensors at `path` from a checkpoint's shards, one after the other."""
    kind = exported_kind(plan.spec.activation)
    shapes = {"W_enc": (plan.d_in, plan.d_sae), "W_dec": (plan.d_sae, plan.d_out), "b_dec": (plan.d_out,)}
    shapes |= dict.fromkeys(_VECTORS[kind], (plan.d_sae,))
    tensors = _create_safetensors(path, shapes)
    n_dead = 0
    for shard in checkpoint.shards:
        with open_shard(checkpoints.child(checkpoint.name), shard) as source:
            _copy_shard(tensors, source, shard, plan, checkpoint.state)
            n_dead += int((source.get_tensor("n_tokens_since_fired") >= plan.spec.dead_window).sum())
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
    names = frozenset(source.keys())
    n_block = max(1, _BLOCK_ELEMENTS // (plan.d_in + plan.d_out))
    for start in range(shard.start, shard.stop, n_block):
        rows = slice(start, min(start + n_block, shard.stop))
        stored = _Stored(source, names, slice(rows.start - shard.start, rows.stop - shard.start))
        _copy_rows(tensors, rows, stored, plan, state)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Some features of a shard."""

    source: Any
    names: frozenset[str]
    rows: slice
    """Of the shard's own."""

    def __call__(self, name: str) -> Array:
        """Their part of a tensor that has a row for each feature."""
        part: Array = self.source.get_slice(name)[self.rows].numpy()
        return part


def _copy_rows(
    tensors: dict[str, Array], rows: slice, stored: _Stored, plan: TrainPlan, state: Mapping[str, float]
) -> None:
    """Copy some features, with the scaling of inputs and outputs folded in.

    Training has pre = w (s_in (x - m_in) - b_dec) + b_enc and x_hat = m_out + (f d + b_dec) / s_out. With features
    divided by c, the output scale, raw weights are s_in w / c and c d / s_out: of one hook they are w and d, whatever
    its scale. The means go into b_dec; of a transcoder, whose encoder does not see b_dec, m_in goes into its biases.
    """
    c = plan.output_scale
    W_dec = stored("W_dec")
    W_enc_rows = stored("W_enc_rows") if "W_enc_rows" in stored.names else W_dec
    written = plan.inputs if plan.target is None else (plan.target,)
    outputs = _scales(written)
    tensors["W_dec"][rows] = W_dec * (c / outputs)
    raw_W_enc = W_enc_rows * (_scales(plan.inputs) / c)
    tensors["W_enc"][:, rows] = raw_W_enc.T
    tensors["b_dec"][:] = _means(written) + stored.source.get_tensor("b_dec").numpy() / outputs
    shift = np.zeros(len(raw_W_enc)) if plan.target is None else raw_W_enc.astype(np.float64) @ _means(plan.inputs)
    b_enc = stored("b_enc") / np.float32(c) - shift
    match exported_kind(plan.spec.activation):
        case "gated":
            r_mag = stored("r_mag")
            # the stored encoder is the magnitude's, SAELens' is the gate's
            tensors["W_enc"][:, rows] *= np.exp(-r_mag)
            tensors["r_mag"][rows] = r_mag
            tensors["b_mag"][rows] = b_enc
            tensors["b_gate"][rows] = stored("b_gate") / np.float32(c) - np.exp(-r_mag) * shift
        case "jumprelu":
            tensors["b_enc"][rows] = b_enc
            learned = "log_threshold" in stored.names
            threshold = np.exp(stored("log_threshold")) if learned else state["threshold"]
            tensors["threshold"][rows] = threshold / c
        case _:
            tensors["b_enc"][rows] = b_enc


def _scales(hooks: Sequence[HookRows]) -> Array:
    """The scale of every column of joined hooks, (width,) float32."""
    return np.concatenate([np.full(hook.width, hook.scale, dtype=np.float32) for hook in hooks])


def _means(hooks: Sequence[HookRows]) -> Array:
    """What is taken from every column of joined hooks, (width,) float64."""
    return np.concatenate([np.asarray(hook.mean or (0.0,) * hook.width) for hook in hooks])


def _create_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """A float32 safetensors file of the given shapes, and writable views into it."""
    prefix, header = encode_header({name: ("F32", shape) for name, shape in shapes.items()}, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(prefix)
        stream.truncate(header.n_bytes + max(info.stop for info in header.tensors.values()))
    return {
        name: np.memmap(path, np.float32, "r+", header.n_bytes + info.start, info.shape)
        for name, info in header.tensors.items()
    }
