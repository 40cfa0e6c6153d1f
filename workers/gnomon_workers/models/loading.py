"""The model whose activations are read: loaded from safetensors alone, and stopped after the last hook.

No code from a model's repository is ever run, and no pickled weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gnomon.errors import Unavailable
from gnomon.specs import ModelSource
from gnomon_storage.location import resolve_input
from gnomon_workers.models.building import faults_of, fill, lacks_head, settings_of
from gnomon_workers.models.gguf_folder import gguf_folder
from gnomon_workers.models.hub import HUB_ID, MODEL_FILES, unanswered
from gnomon_workers.models.modules import is_causal, refuse_faults
from gnomon_workers.models.skeleton import without_cache
from gnomon_workers.models.weight_files import read_config, read_tensors, weight_files

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to be read, in evaluation mode."""

    module: nn.Module
    is_causal: bool
    """Whether it predicts tokens; an encoder, or a checkpoint without the head that makes logits, does not."""
    device: torch.device


def load_model(source: ModelSource, input_roots: Sequence[str], *, device: torch.device) -> LoadedModel:
    """Load a model: AutoModelForCausalLM where its config names a causal class, else AutoModel.

    The weights are those of `read_tensors` in this folder, whatever else lies there. Raises InvalidRequest,
    "incomplete_model", where a tensor is missing, has another shape or dtype or no place in the model.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # there is no terminal on a worker
    folder = model_folder(source, input_roots)
    config, tensors = read_config(folder), read_tensors(folder)
    with _opened(weight_files(folder)) as weights:
        module, info = fill(config, settings_of(config), weights, dtype=_DTYPES[source.dtype])
    refuse_faults(source.source, tuple(faults_of(module, info, tensors.odd_dtypes)))
    return LoadedModel(
        module=cast("nn.Module", module).requires_grad_(False).to(device),
        is_causal=is_causal(config) and not lacks_head(module, info),
        device=device,
    )


@contextmanager
def _opened(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Tensor -> a slice of an open file, which is read when the model is filled."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping


def model_folder(source: ModelSource, input_roots: Sequence[str]) -> Path:
    """A local Hugging Face folder of a model: given, downloaded from the hub, or converted from GGUF."""
    is_gguf = source.source.lower().endswith(".gguf")
    if HUB_ID.match(source.source) and not is_gguf:
        return _hub_folder(source)
    path = resolve_input(source.source, input_roots, schemes=("file",)).local_path()
    assert path is not None
    return gguf_folder(path) if is_gguf else path


def _hub_folder(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source.source, revision=source.revision, allow_patterns=list(MODEL_FILES))
    except unanswered() as error:
        raise Unavailable(
            f"model {source.source!r} (revision {source.revision or 'main'}) could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}",
            code="hub_unreachable",
        ) from error
    return Path(folder)


class _Stop(Exception):
    """Every hook was seen; nothing above is needed."""


@torch.inference_mode()
def read_activations(
    model: nn.Module, hooks: Sequence[str], input_ids: Tensor, attention_mask: Tensor
) -> dict[str, Tensor]:
    """Outputs of the hooked modules, (contexts, length, d_in) each; the forward pass ends at the last of them.

    input_ids and attention_mask are (contexts, length). Raises KeyError for a hook that the pass never reaches.
    """
    seen: dict[str, Tensor] = {}
    with _recording(model, hooks, seen), suppress(_Stop):
        model(input_ids=input_ids, attention_mask=attention_mask, **without_cache(model))
    return {hook: seen[hook] for hook in hooks}


@contextmanager
def _recording(model: nn.Module, hooks: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    def recorder(name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            # decoder layers return a tensor in transformers 5, a tuple in older releases and some models
            # and what comes next may change it in place
            seen[name] = (output if isinstance(output, Tensor) else output[0]).clone()
            if len(seen) == len(hooks):
                raise _Stop

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
