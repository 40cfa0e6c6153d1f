"""What a reconstruction does to the model: cross-entropy and KL with it patched in at the hook.

The hook's output is replaced at the tokens that a harvest stores. Tokens it drops (the first positions, special
tokens) keep their activation in every run: the dictionary never saw them. "Ablated" is zero in their place.

Layers up to the hooked one run once: for the patched runs they pass their input on, and the hooked layer returns
what is patched in. A hook inside a layer, or several hooks at once, have the whole model run each time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from gnomon_workers.evaluate.metrics import PatchSums

_LAYER: Final = re.compile(r"^(.*)\.(\d+)$")
Reconstruct = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Modules whose outputs a dictionary reads, and those whose outputs it replaces."""

    read: tuple[str, ...]
    written: tuple[str, ...]

    @classmethod
    def one(cls, name: str) -> Self:
        """A dictionary that reconstructs what it reads."""
        return cls(read=(name,), written=(name,))


@torch.inference_mode()
def patch_sums(
    model: nn.Module,
    hooks: Hooks,
    contexts: Tensor,
    is_stored: Tensor,
    reconstruct: Reconstruct,
) -> PatchSums:
    """Sums over the next-token predictions of contexts (n, length); -1 is padding.

    is_stored (n, length) tells which activations the dictionary replaces; reconstruct maps those of the hooks that are
    read, joined, (m, d_in), to those of the hooks that are written, joined, (m, d_out).
    """
    logits, outputs = _logits_and_outputs(model, {*hooks.read, *hooks.written}, contexts)
    activations = {name: first_of(output) for name, output in outputs.items()}
    patched = _patched(activations, hooks, is_stored, reconstruct)
    ablated = {name: activations[name].masked_fill(is_stored[..., None], 0) for name in hooks.written}
    targets = contexts[:, 1:]
    counts = targets >= 0
    base = log_softmax(logits[:, :-1].float(), dim=-1)[counts]
    ids = targets[counts][:, None]
    ce, kl = {}, {}
    for name, values in (("patched", patched), ("ablated", ablated)):
        log_p = log_softmax(_logits_with(model, contexts, values, outputs)[:, :-1].float(), dim=-1)[counts]
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


def _patched(
    activations: dict[str, Tensor], hooks: Hooks, is_stored: Tensor, reconstruct: Reconstruct
) -> dict[str, Tensor]:
    """The activations of the hooks that are written, with reconstructions in their place."""
    joined = torch.cat([activations[name][is_stored].float() for name in hooks.read], dim=1)
    widths = [activations[name].shape[-1] for name in hooks.written]
    patched = {}
    for name, part in zip(hooks.written, torch.split(reconstruct(joined), widths, dim=1), strict=True):
        patched[name] = activations[name].clone()
        patched[name][is_stored] = part.to(patched[name].dtype)
    return patched


def _logits_and_outputs(model: nn.Module, names: set[str], contexts: Tensor) -> tuple[Tensor, dict[str, Any]]:
    seen: dict[str, Any] = {}

    def capture(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        seen[name] = output

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_hooked(model.get_submodule(name), partial(capture, name)))
        logits = _logits(model, contexts)
    return logits, seen


def _logits_with(model: nn.Module, contexts: Tensor, values: dict[str, Tensor], outputs: dict[str, Any]) -> Tensor:
    """Logits with the outputs of some modules replaced; `outputs` shows what form each has."""

    def replace(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        return values[name] if isinstance(outputs[name], Tensor) else (values[name], *output[1:])

    with ExitStack() as stack:
        if len(values) == 1:
            # below a whole layer that is replaced, nothing matters
            (only,) = values
            for layer in layers_up_to(model, only):
                stack.enter_context(_passing_on(layer, is_tuple=not isinstance(outputs[only], Tensor)))
        for name in values:
            stack.enter_context(_hooked(model.get_submodule(name), partial(replace, name)))
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

    own = vars(layer)
    before = own.get("forward")  # accelerate's hooks leave one, which must be there again afterwards
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


def first_of(output: Any) -> Tensor:
    """The hidden states of a module's output: a tensor in transformers 5, the head of a tuple elsewhere."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
