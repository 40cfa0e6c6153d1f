"""What a reconstruction does to the model: cross-entropy and KL with it patched in at the hook.

The hook's output is replaced at the tokens that a harvest stores. Tokens it drops (the first positions, special
tokens) keep their activation in every run: the dictionary never saw them. "Ablated" is zero in their place.

Layers up to the hooked one run once: for the patched runs they pass their input on, and the hooked layer returns
what is patched in. A hook inside a layer has the whole model run each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from gnomon_workers.evaluate.metrics import PatchSums

_LAYER: Final = re.compile(r"^(.*)\.(\d+)$")
Reconstruct = Callable[[Tensor], Tensor]


@torch.inference_mode()
def patch_sums(
    model: nn.Module, hook_name: str, contexts: Tensor, is_stored: Tensor, reconstruct: Reconstruct
) -> PatchSums:
    """Sums over the next-token predictions of contexts (n, length); -1 is padding.

    is_stored (n, length) tells which activations the dictionary replaces; reconstruct maps (m, d_in) to (m, d_in).
    """
    original, output = _logits_and_output(model, hook_name, contexts)
    activation = first_of(output)
    patched = activation.clone()
    patched[is_stored] = reconstruct(activation[is_stored].float()).to(activation.dtype)
    ablated = activation.masked_fill(is_stored[..., None], 0)
    targets = contexts[:, 1:]
    counts = targets >= 0
    base = log_softmax(original[:, :-1].float(), dim=-1)[counts]
    ids = targets[counts][:, None]
    ce, kl = {}, {}
    for name, value in (("patched", patched), ("ablated", ablated)):
        logits = _logits_with(model, hook_name, contexts, value, is_tuple=not isinstance(output, Tensor))
        log_p = log_softmax(logits[:, :-1].float(), dim=-1)[counts]
        ce[name] = -float(log_p.gather(1, ids).sum(dtype=torch.float64))
        kl[name] = float((base.exp() * (base - log_p)).sum(1).sum(dtype=torch.float64))
    return PatchSums(
        n_predictions=int(counts.sum()),
        ce_original=-float(base.gather(1, ids).sum(dtype=torch.float64)),
        ce_patched=ce["patched"],
        ce_ablated=ce["ablated"],
        kl_patched=kl["patched"],
        kl_ablated=kl["ablated"],
    )


def _logits_and_output(model: nn.Module, hook_name: str, contexts: Tensor) -> tuple[Tensor, Any]:
    seen: list[Any] = []

    def capture(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output)

    with _hooked(model.get_submodule(hook_name), capture):
        logits = _logits(model, contexts)
    return logits, seen[0]


def _logits_with(model: nn.Module, hook_name: str, contexts: Tensor, value: Tensor, *, is_tuple: bool) -> Tensor:
    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (value, *output[1:]) if is_tuple else value

    with ExitStack() as stack:
        for layer in layers_up_to(model, hook_name):
            stack.enter_context(_passing_on(layer, is_tuple=is_tuple))
        stack.enter_context(_hooked(model.get_submodule(hook_name), replace))
        return _logits(model, contexts)


def layers_up_to(model: nn.Module, hook_name: str) -> list[nn.Module]:
    """The hooked layer and those below it, where the hook is a whole layer of a stack; else none."""
    match = _LAYER.match(hook_name)
    stack = model.get_submodule(match[1]) if match else None
    if match is None or not isinstance(stack, nn.ModuleList):
        return []
    return list(stack)[: int(match[2]) + 1]


def _logits(model: nn.Module, contexts: Tensor) -> Tensor:
    mask = (contexts >= 0).long()
    logits: Tensor = model(input_ids=contexts.clamp_min(0), attention_mask=mask, use_cache=False).logits
    return logits


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _passing_on(layer: nn.Module, *, is_tuple: bool) -> Iterator[None]:
    """Let a layer return its input, in the form in which layers of this model return their output."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states,) if is_tuple else hidden_states

    with patch.object(layer, "forward", forward):
        yield


def first_of(output: Any) -> Tensor:
    """The hidden states of a module's output: a tensor in transformers 5, the head of a tuple elsewhere."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
