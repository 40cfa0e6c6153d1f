"""A model looked up before anything is queued: what it is, how many positions it has, and its hooks.

Imports neither torch nor Ray, so the API process can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

from gnomon.errors import InvalidRequest
from gnomon.specs import ModelSource
from gnomon_storage.digests import combine, path_digest
from gnomon_storage.location import Location, resolve_input
from gnomon_workers.models import gguf_llama
from gnomon_workers.models.gguf_header import GgufHeader
from gnomon_workers.models.hub import HUB_ID, find_hub_model
from gnomon_workers.models.modules import find_skeleton, is_causal
from gnomon_workers.models.tokenizers import TOKENIZER_FILES
from gnomon_workers.models.weight_files import (
    Tensors,
    bad_model,
    read_config,
    read_gguf,
    read_tensors,
    weight_files,
)

ModelKind = Literal["hub", "folder", "gguf"]
_MOST_COMPARED: Final = 1000
"""Of names with one that is misspelt: comparing takes a fraction of a millisecond each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model as far as its headers tell."""

    source: str
    kind: ModelKind
    files: tuple[Path, ...]
    """Weights, config and tokenizer of a local model."""
    revision: str | None
    """Commit, for hub models."""
    path: str | None
    """Folder or file, for local models."""
    is_causal: bool
    """Loaded as a causal language model, and not as an encoder."""
    has_head: bool
    """Whether it predicts tokens: a causal model with the head that makes logits."""
    model_type: str
    n_layers: int
    n_parameters: int
    hidden_size: int
    context_length: int | None
    """Longest context, where the model says so."""
    n_embeddings: int | None
    """Token ids are below it."""
    hooks: Mapping[str, int]
    """Module path -> width of its output."""
    not_hooks: Mapping[str, str]
    """Module path -> why it cannot be hooked."""

    def fingerprint(self) -> str:
        """Digest of weights, config and tokenizer, all of which are read; the commit of a hub model, at once."""
        if self.revision is not None:
            return self.revision
        if self.kind == "gguf":
            return path_digest(self.files[0])
        return combine({"files": {path.name: path_digest(path) for path in self.files}})


def describe_model(source: ModelSource, input_roots: Sequence[str]) -> ModelDescription:
    """Look a model up: a .gguf file or folder under the input roots, or a name on the hub.

    Raises InvalidRequest, "unknown_model" or "location_not_allowed", and Unavailable, "hub_unreachable".
    """
    if HUB_ID.match(source.source) and not source.source.lower().endswith(".gguf"):
        found = find_hub_model(source.source, source.revision)
        return _describe(source.source, "hub", found.config, found.tensors, revision=found.commit)
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
    return _describe_folder(source.source, path)


def check_hook(name: str, description: ModelDescription) -> None:
    """Raise InvalidRequest, "unknown_hook", unless the model has the module; the message names near ones."""
    if name in description.hooks:
        return
    why = description.not_hooks.get(name)
    near = _near(name, description.hooks)
    layers = [hook for hook in description.hooks if hook.rsplit(".", 1)[-1].isdigit()]
    others = f"; layers are {layers[0]!r} to {layers[-1]!r}" if layers else ""
    problem = f"module {name!r} of model {description.source!r} {why}" if why else (
        f"model {description.source!r} has no module {name!r}"
    )  # fmt: skip
    raise InvalidRequest(
        f"{problem}; hooks near it: {', '.join(map(repr, near)) or 'none'}{others}", code="unknown_hook", nearest=near
    )


def _near(name: str, hooks: Iterable[str]) -> list[str]:
    """The most similar of the hooks that share the last part of the name or end with a layer's number."""
    last = name.rsplit(".", 1)[-1]
    alike = [hook for hook in hooks if hook.rsplit(".", 1)[-1] == last] or list(hooks)
    return difflib.get_close_matches(name, alike[:_MOST_COMPARED], n=5, cutoff=0.4)


def check_context_length(length: int, description: ModelDescription) -> None:
    """Raise InvalidRequest, "context_too_long", where the model has fewer positions."""
    if description.context_length is not None and length > description.context_length:
        raise InvalidRequest(
            f"context_length={length} exceeds the {description.context_length} positions of model "
            f"{description.source!r}; lower it",
            code="context_too_long",
        )


def _describe_folder(source: str, folder: Path) -> ModelDescription:
    config = read_config(folder)
    files = weight_files(folder)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not tokenizer:
        raise bad_model(f"{source!r} has no tokenizer; put tokenizer.json beside its config.json")
    read = (folder / "config.json", *files, *tokenizer)
    return _describe(source, "folder", config, read_tensors(folder), files=read, path=str(folder))


def _describe(
    source: str,
    kind: ModelKind,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    files: tuple[Path, ...] = (),
    revision: str | None = None,
    path: str | None = None,
) -> ModelDescription:
    skeleton = find_skeleton(source, config, tensors)
    return ModelDescription(
        source=source,
        kind=kind,
        files=files,
        revision=revision,
        path=path,
        is_causal=is_causal(config),
        has_head=skeleton.has_head,
        model_type=str(config.get("model_type", "")),
        n_layers=skeleton.n_layers,
        n_parameters=sum(prod(shape) for shape in tensors.shapes.values()),
        hidden_size=skeleton.hidden_size,
        n_embeddings=skeleton.n_embeddings,
        context_length=skeleton.context_length,
        hooks=skeleton.hooks,
        not_hooks=skeleton.not_hooks,
    )


def _describe_gguf(source: str, location: Location, path: Path) -> ModelDescription:
    header = _gguf_header(str(path), location.size(), path.stat().st_mtime_ns)
    architecture = header.fields["general.architecture"]
    if architecture != gguf_llama.ARCHITECTURE:
        raise InvalidRequest(
            f"{source!r} holds a model of architecture {architecture!r}; GGUF files of architecture "
            f"{gguf_llama.ARCHITECTURE!r} can be read; for others give the Hugging Face folder",
            code="unsupported_model",
        )
    config = gguf_llama.read_config(header)
    tensors = Tensors(shapes=gguf_llama.read_shapes(header))
    return _describe(source, "gguf", config, tensors, files=(path,), path=str(path))


@lru_cache(maxsize=32)
def _gguf_header(path: str, size: int, mtime_ns: int) -> GgufHeader:  # noqa: ARG001 - part of the cache's key
    return read_gguf(Path(path))
