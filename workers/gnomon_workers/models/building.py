"""A model made of its config and of tensors that are given, and what of these does not fit.

Describing a model (with tensors that have no data) and loading it go the same way, and neither lets Transformers look
for files: a folder may hold other weights and other configs than those that were described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from gnomon_workers.models.modules import is_causal
from gnomon_workers.runtime.scratch import scratch_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model

_RESIDUE: Final = ("inv_freq", "position_ids", "masked_bias", "attn.bias", "num_batches_tracked")
"""Constants that old checkpoints hold and that models compute by themselves."""
_UNREAD: Final = ("pooler",)
"""Parts of encoders behind all layers, which a harvest does not read."""
_ADAPTERS: Final = re.compile(r"^base_model\.model\.|\.(lora|ia3|oft|boft|vera|hada|lokr|adalora)_|\.base_layer\.")
"""Names that PEFT gives: of what it adds, and of what it wraps."""


def settings_of(config: Mapping[str, Any]) -> Any:
    """Transformers' settings of a config.json, and of no file beside it."""
    from transformers import AutoConfig

    with scratch_folder() as folder:
        (folder / "config.json").write_text(json.dumps(config))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def fill(
    config: Mapping[str, Any], settings: Any, tensors: Mapping[str, Any], **options: Any
) -> tuple[Model, Mapping[str, Any]]:
    """The model with these tensors, in evaluation mode, and what Transformers says of them."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if is_causal(config) else AutoModel
    with torch.device("meta"):
        bare = auto.from_config(settings, dtype=torch.bfloat16, trust_remote_code=False)
    model, info = type(bare).from_pretrained(
        None, config=settings, state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    return model.eval(), info


def faults_of(model: Model, info: Mapping[str, Any], odd_dtypes: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with a checkpoint, tensor by tensor, given what Transformers said when it was loaded."""
    head = _head(model)
    for name in sorted(info["missing_keys"]):
        if not name.startswith((*(f"{part}." for part in _UNREAD), f"{head}.")):
            yield f"tensor {name} is missing"
    for name, found, wanted in sorted(info["mismatched_keys"]):
        yield f"tensor {name} has shape {tuple(found)}, and its config wants {tuple(wanted)}"
    for name in sorted(info["unexpected_keys"]):
        if _ADAPTERS.search(name):
            yield f"tensor {name} is of an adapter; merge the adapter first (PEFT: merge_and_unload)"
        elif _belongs(model, name) and not name.endswith(_RESIDUE):
            yield f"tensor {name} has no place in {type(model).__name__}"
    yield from _wrong_dtypes(model, info, odd_dtypes)
    yield from sorted(str(message) for message in info["error_msgs"])


def _wrong_dtypes(model: Model, info: Mapping[str, Any], odd_dtypes: Mapping[str, str]) -> Iterator[str]:
    """Tensors that are read as floating-point numbers, and hold something else."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # by the last part of their names, for the class may rename what is before it when it reads a checkpoint
    whole = {place.rsplit(".", 1)[-1] for place, value in model.state_dict().items() if not value.is_floating_point()}
    for name, dtype in sorted(odd_dtypes.items()):
        names = (name, prefix + name, name.removeprefix(prefix))
        is_whole = name.rsplit(".", 1)[-1] in whole
        is_left_out = any(place in info["unexpected_keys"] for place in names) or name.endswith(_RESIDUE)
        if not is_whole and not is_left_out:
            yield f"tensor {name} holds {dtype}, and floating-point numbers are read (F64, F32, F16, BF16)"


def _belongs(model: Model, name: str) -> bool:
    """Whether a tensor is named as if it were a part of what is computed, and not a head on top of it."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    parts = {child for child, _ in model.named_children()}
    parts |= {child for child, _ in getattr(model, "base_model", model).named_children()}
    return bool({name.partition(".")[0], name.removeprefix(prefix).partition(".")[0]} & (parts - {_head(model)}))


def _head(model: Model) -> str:
    """Path of the module that makes logits; a name that no module has where there is none."""
    head = output_embeddings(model)
    return next((name for name, module in model.named_modules() if module is head), "(none)")


def output_embeddings(model: Model) -> nn.Module | None:
    """The module that makes logits, where there is one."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if isinstance(found, nn.Module) else None


def lacks_head(model: Model, info: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has no weights for what makes logits, which would be random."""
    return any(name.startswith(f"{_head(model)}.") for name in info["missing_keys"])
