"""The class that a model's config names, built without weights: what it computes, and which tensors it needs.

Run as a program it reads {"config": ..., "shapes": ...} from its standard input and writes a description to its
standard output, so that a process that must stay small and answer at once, as the API's, need not build models.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gnomon_workers.models.building import faults_of, fill, lacks_head, output_embeddings, settings_of
from gnomon_workers.models.modules import Skeleton, is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model

_PROBE: Final = (3, 7)
"""Contexts and tokens of the trial run: two numbers that are no width of a model."""
MOST_CPU_S: Final = 120
MOST_BYTES: Final = 4 << 30


class NotHarvestable(ValueError):
    """No model that can be harvested is made of this config; the message says why."""


def describe(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], odd_dtypes: Mapping[str, str] | None = None
) -> Skeleton:
    """What a checkpoint's class is made of; raises NotHarvestable."""
    model, info = _build(config, shapes, odd_dtypes or {})
    outputs = _trial_run(model)
    faults = faults_of(model, info, odd_dtypes or {})
    text = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    return Skeleton(
        class_name=type(model).__name__,
        n_layers=int(getattr(text, "num_hidden_layers", 0)),
        hidden_size=int(getattr(text, "hidden_size", 0)),
        n_embeddings=int(embedding.num_embeddings) if isinstance(embedding, nn.Embedding) else None,
        context_length=_context_length(model),
        has_head=is_causal(config) and not lacks_head(model, info),
        hooks={name: output for name, output in outputs.items() if isinstance(output, int)},
        not_hooks={name: output for name, output in outputs.items() if isinstance(output, str)},
        faults=tuple(faults),
    )


def _build(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], odd_dtypes: Mapping[str, str]
) -> tuple[Model, Mapping[str, Any]]:
    """The model on the meta device, and what Transformers says of a checkpoint with such tensors."""
    with _refused("config.json is not one that Transformers reads"):
        settings = settings_of(config)
    with _refused("no model can be built of its config"):
        # of odd dtypes only the name is asked: their tensors are refused, or have another place than a weight's
        kinds = dict.fromkeys(odd_dtypes, torch.long)
        tensors = {name: torch.empty(shape, device="meta", dtype=kinds.get(name)) for name, shape in shapes.items()}
        return fill(config, settings, tensors, dtype=torch.bfloat16, device_map="meta")


# ---------------------------------------------------------------------------------------------- what can be hooked


def _trial_run(model: Model) -> dict[str, int | str]:
    """Module path -> width of its output, or why it cannot be hooked.

    In bfloat16 first, which the grouped products of experts ask for; some models make float32 tensors by themselves.
    """
    outputs, failure = _one_run(model)
    if failure:
        outputs, failure = max((outputs, failure), _one_run(model.float()), key=lambda run: _n_hooks(run[0]))
    if not _n_hooks(outputs):
        raise NotHarvestable(
            f"{type(model).__name__} does not run on tokens alone ({failure or 'no module is called'})"
        )
    return outputs


def _one_run(model: Model) -> tuple[dict[str, int | str], str]:
    """What each module that is read gave, and what ended the run before its end."""
    read, others = _parts(model)
    seen: dict[str, list[int | str]] = {name: [] for name in read}

    def recorder(name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[name].append(_output(output))

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in read]
    failure = ""
    try:
        with torch.no_grad(), _Values():  # type: ignore[no-untyped-call]
            ids = torch.zeros(_PROBE, dtype=torch.long, device="meta")
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **without_cache(model))
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        failure = _reason(error)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _verdict(outputs, failure) for name, outputs in seen.items()} | others, failure


def _n_hooks(outputs: Mapping[str, int | str]) -> int:
    return sum(isinstance(output, int) for output in outputs.values())


def _parts(model: Model) -> tuple[list[str], dict[str, int | str]]:
    """Paths of the modules that may be hooked, and why others may not: of an encoder-decoder, all but its encoder."""
    body = model.base_model
    root = next(f"{name}." if name else "" for name, module in model.named_modules() if module is body)
    whole = {id(body), id(getattr(body, "model", None)), id(output_embeddings(model))}
    names = [
        name
        for name, module in model.named_modules()
        if name.startswith(root) and id(module) not in whole and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]
    if not getattr(model.config, "is_encoder_decoder", False):
        return names, {}
    encoder = model.get_encoder()
    path = next(name for name, module in model.named_modules() if module is encoder)
    below = [name for name in names if name.startswith(f"{path}.")]
    why = f"is not in {path!r}: of an encoder-decoder the encoder is read, for a decoder needs inputs of its own"
    return below, dict.fromkeys(sorted(set(names) - {*below, path}), why)


def _output(output: Any) -> int | str:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        return f"gives a {type(first).__name__}, and no tensor"
    if tuple(first.shape[:-1]) != _PROBE:
        return f"gives {first.dim()}-dimensional tensors that are not (contexts, tokens, d_in)"
    if first.shape[-1] == _PROBE[1]:
        return "gives as many numbers as the context has tokens"
    return int(first.shape[-1])


def _verdict(outputs: list[int | str], failure: str) -> int | str:
    if not outputs:
        return f"was not reached by a trial run ({failure})" if failure else "is never called when tokens are read"
    return outputs[0] if len(outputs) == 1 else f"is called {len(outputs)} times in one pass"


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Keyword arguments that keep a decoder from filling a key-value cache nobody reads."""
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", None) is not None else {}


class _Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Values where a model asks for them, which tensors without data do not have: any will do, for shapes are asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.is_nonzero.default:
            return True
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((1, args[0].dim()), dtype=torch.long)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------- limits


def _context_length(model: Model) -> int | None:
    """Most tokens of a context; the positions that RoBERTa and its kind reserve for padding are taken off."""
    text = model.config.get_text_config()
    limits = [getattr(text, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            known.append(module.num_embeddings - module.padding_idx - 1)
    return min(known, default=None)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _is_of_the_machine(error):
            raise
        raise NotHarvestable(f"{what} ({_reason(error)})") from error


def _is_of_the_machine(error: Exception) -> bool:
    """Whether the same question might be answered elsewhere or later: no memory, no room, no process."""
    is_allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_allocation or (isinstance(error, OSError) and error.errno is not None)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _limit() -> None:
    """Two minutes of a core and four gigabytes: a config may ask for a million layers."""
    if sys.platform == "linux":
        # at the hard limit the signal is SIGKILL, which would look like another's doing
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S + 10))
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


def main() -> int:
    """Answer the question on standard input."""
    _limit()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    asked = json.load(sys.stdin)
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not be taken for the answer
    with os.fdopen(answer, "w") as output:
        json.dump(_answer(asked), output)
    return 0


def _answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """{"skeleton": ...}, or why there is none: "refused" for good, or "failed" this time."""
    shapes = {name: tuple(shape) for name, shape in asked["shapes"].items()}
    try:
        return {"skeleton": describe(asked["config"], shapes, asked["odd_dtypes"]).to_json()}
    except NotHarvestable as error:
        return {"refused": str(error)}
    except OSError:
        raise  # of the machine: whoever asked sees that nothing was answered
    except Exception as error:
        return {"failed": _reason(error)}


if __name__ == "__main__":
    sys.exit(main())
