"""Which modules a model has and how wide their outputs are, told from its tensors' names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Shapes = Mapping[str, tuple[int, ...]]
_LAYER: Final = re.compile(r"^(?P<list>(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)\.(?P<index>\d+)\.(?P<rest>.+)$")
_LAYER_LISTS: Final = ("layers", "layer", "h", "blocks", "block")
_HIDDEN_WIDE: Final = frozenset(
    {"mlp", "self_attn", "attn", "attention", "self_attention", "self", "output", "feed_forward", "ffn"}
)
_TRANSPOSED: Final = frozenset({"gpt2", "gpt_bigcode", "imagegpt"})
"""Model types whose linear layers store (in, out)."""
_WIDTH_KEYS: Final = ("hidden_size", "n_embd", "d_model", "dim")


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """The layers of a model and every module in them that can be hooked."""

    n_layers: int
    hidden_size: int
    hooks: dict[str, int | None]
    """Module path -> width of its output; None where only running the model tells."""


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether the harvester loads this model as a causal language model, and not as a bare encoder."""
    return bool(re.search(r"(ForCausalLM|LMHeadModel)$", _architecture(config)))


def find_modules(config: Mapping[str, Any], shapes: Shapes) -> Modules | None:
    """The modules of the class that the harvester loads; None where the tensors show no list of layers."""
    names = {_module_name(config, name): shape for name, shape in shapes.items()}
    found = [match for name in names if (match := _LAYER.match(name))]
    lists = {match["list"] for match in found if match["list"].rsplit(".", 1)[-1] in _LAYER_LISTS}
    if not lists:
        return None
    # A decoder beside an encoder, or experts inside layers, make several lists: the outermost, first named, counts.
    layers = min(lists, key=lambda path: (path.count("."), list(names).index(_first_in(path, names))))
    hidden_size = _hidden_size(config)
    if hidden_size is None:
        return None
    indices = {int(match["index"]) for match in found if match["list"] == layers}
    own = {name: shape for name, shape in names.items() if name.startswith(layers + ".")}
    return Modules(n_layers=len(indices), hidden_size=hidden_size, hooks=_hooks(layers, own, hidden_size, config))


def _hooks(layers: str, tensors: Shapes, hidden_size: int, config: Mapping[str, Any]) -> dict[str, int | None]:
    """Every module at or below a layer, in order of layer and then of name."""
    depth = layers.count(".") + 2
    paths: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")
        paths.update({".".join(parts[:n]): None for n in range(depth, len(parts))})
    # A list of modules (its children are numbers) is never called, so it has no output.
    lists = {path.rsplit(".", 1)[0] for path in paths if path.rsplit(".", 1)[1].isdigit()}
    transposed = config.get("model_type") in _TRANSPOSED
    widths = {
        path: hidden_size if path.count(".") == depth - 1 else _width(path, tensors, hidden_size, transposed)
        for path in paths
        if path not in lists
    }
    return dict(sorted(widths.items(), key=lambda item: _natural(item[0])))


def _width(path: str, tensors: Shapes, hidden_size: int, transposed: bool) -> int | None:
    shape = tensors.get(f"{path}.weight")
    if shape is not None and len(shape) == 2:
        return shape[1 if transposed else 0]
    if shape is not None:
        # A norm over single heads (q_norm) has an output of another shape.
        return hidden_size if shape == (hidden_size,) else None
    return hidden_size if path.rsplit(".", 1)[-1] in _HIDDEN_WIDE else None


def _module_name(config: Mapping[str, Any], tensor: str) -> str:
    """A tensor's name as the loaded class has it: with or without the base model's prefix."""
    first, _, rest = tensor.partition(".")
    if is_causal(config):
        # GPT-2 and BLOOM are published as bare base models.
        return f"transformer.{tensor}" if first == "h" else tensor
    prefixes = {config.get("model_type"), "model", "bert", "roberta"}
    if (first in prefixes and _LAYER.match(rest)) or tensor.startswith("transformer.h."):
        return rest
    return tensor


def _first_in(path: str, names: Shapes) -> str:
    return next(name for name in names if name.startswith(path + "."))


def _hidden_size(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        for key in _WIDTH_KEYS:
            if isinstance(settings.get(key), int):
                return int(settings[key])
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts layers.2 before layers.10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.split("."))
