"""A model looked up before anything is queued: what it is, how many positions it has, and its hooks.

Imports neither torch nor Ray, so the API process can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_storage.digests import combine, file_digest
from gnomon_storage.location import Location, resolve_input
from gnomon_workers.models.gguf_header import GgufHeader
from gnomon_workers.models.gguf_names import gguf_tensor_name
from gnomon_workers.models.hub import HUB_ID, find_hub_model
from gnomon_workers.models.modules import find_modules, is_causal
from gnomon_workers.models.weight_files import (
    bad_model,
    read_config,
    read_gguf,
    tensor_shapes,
    weight_files,
)

ModelKind = Literal["hub", "folder", "gguf"]
TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
GGUF_ARCHITECTURES: Final = ("llama",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model as far as its headers tell."""

    source: str
    kind: ModelKind
    fingerprint: str
    """Digest of weights, config and tokenizer; the commit for hub models."""
    revision: str | None
    """Commit, for hub models."""
    path: str | None
    """Folder or file, for local models."""
    is_causal: bool
    """Loaded as a causal language model, and not as an encoder."""
    model_type: str
    n_layers: int
    n_parameters: int
    hidden_size: int
    vocab_size: int | None
    context_length: int | None
    """Longest context, where the model says so."""
    hooks: Mapping[str, int | None]
    """Module path -> width of its output; None where only running the model tells."""


def describe_model(source: ModelSource, input_roots: Sequence[str]) -> ModelDescription:
    """Look a model up: a .gguf file or folder under the input roots, or a name on the hub.

    Raises InvalidRequest, "unknown_model" or "location_not_allowed", and Unavailable, "hub_unreachable".
    """
    if HUB_ID.match(source.source) and not source.source.lower().endswith(".gguf"):
        found = find_hub_model(source.source, source.revision)
        return _describe(source.source, "hub", found.config, found.shapes, found.commit, revision=found.commit)
    if source.revision is not None:
        raise bad_model(f"revision={source.revision!r} belongs to hub models, and {source.source!r} is a path")
    location = resolve_input(source.source, input_roots, schemes=("file",))
    path = location.local_path()
    assert path is not None
    if location.is_file() and path.suffix.lower() == ".gguf":
        return _describe_gguf(source.source, location, path)
    if not path.is_dir():
        raise bad_model(
            f"there is no model at {source.source!r}; give a hub name (org/name), a folder with config.json and "
            "safetensors, or a .gguf file"
        )
    return _describe_folder(source.source, location, path)


def check_hook(name: str, description: ModelDescription) -> None:
    """Raise InvalidRequest, "unknown_hook", unless the model has the module; the message names near ones."""
    if name in description.hooks:
        return
    near = difflib.get_close_matches(name, description.hooks, n=5, cutoff=0.4)
    layers = [hook for hook in description.hooks if hook.rsplit(".", 1)[-1].isdigit()]
    others = f"; layers are {layers[0]!r} to {layers[-1]!r}" if layers else ""
    raise InvalidRequest(
        f"model {description.source!r} has no hook {name!r}; near it: {', '.join(map(repr, near)) or 'none'}{others}",
        code="unknown_hook",
        nearest=near,
    )


def check_context_length(length: int, description: ModelDescription) -> None:
    """Raise InvalidRequest, "context_too_long", where the model has fewer positions."""
    if description.context_length is not None and length > description.context_length:
        raise InvalidRequest(
            f"context_length={length} exceeds the {description.context_length} positions of model "
            f"{description.source!r}; lower it",
            code="context_too_long",
        )


def _describe_folder(source: str, location: Location, folder: Path) -> ModelDescription:
    config = read_config(folder)
    files = weight_files(folder)
    names = ["config.json", *(path.name for path in files), *TOKENIZER_FILES]
    digests = {name: file_digest(location.child(name)) for name in names if (folder / name).is_file()}
    if not any(name in digests for name in TOKENIZER_FILES):
        raise bad_model(f"{source!r} has no tokenizer; put tokenizer.json beside its config.json")
    shapes = {name: shape for path in files for name, shape in tensor_shapes(path).items()}
    return _describe(source, "folder", config, shapes, combine({"files": digests}), path=str(folder))


def _describe(
    source: str,
    kind: ModelKind,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    fingerprint: str,
    *,
    revision: str | None = None,
    path: str | None = None,
) -> ModelDescription:
    modules = find_modules(config, shapes)
    if modules is None:
        raise bad_model(f"the tensors of {source!r} show no list of layers; only transformers can be harvested")
    return ModelDescription(
        source=source,
        kind=kind,
        fingerprint=fingerprint,
        revision=revision,
        path=path,
        is_causal=is_causal(config),
        model_type=str(config.get("model_type", "")),
        n_layers=modules.n_layers,
        n_parameters=sum(prod(shape) for shape in shapes.values()),
        hidden_size=modules.hidden_size,
        vocab_size=_integer(config, "vocab_size"),
        context_length=_integer(config, "max_position_embeddings") or _integer(config, "n_positions"),
        hooks=modules.hooks,
    )


def _describe_gguf(source: str, location: Location, path: Path) -> ModelDescription:
    header = _gguf_header(str(path), location.size(), path.stat().st_mtime_ns)
    architecture = header.fields["general.architecture"]
    if architecture not in GGUF_ARCHITECTURES:
        raise InvalidRequest(
            f"{source!r} holds a model of architecture {architecture!r}; GGUF files of architecture "
            f"{' or '.join(GGUF_ARCHITECTURES)} can be read; for others give the Hugging Face folder",
            code="unsupported_model",
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": architecture,
        "hidden_size": header.fields.get(f"{architecture}.embedding_length"),
        "vocab_size": header.shapes.get("token_embd.weight", (None,))[0],
        "max_position_embeddings": header.fields.get(f"{architecture}.context_length"),
    }
    shapes = {gguf_tensor_name(name): shape for name, shape in header.shapes.items()}
    return _describe(source, "gguf", config, shapes, file_digest(location), path=str(path))


@lru_cache(maxsize=32)
def _gguf_header(path: str, size: int, mtime_ns: int) -> GgufHeader:  # noqa: ARG001 - part of the cache's key
    return read_gguf(Path(path))


def _integer(config: Mapping[str, Any], key: str) -> int | None:
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    return value if isinstance(value, int) else None
