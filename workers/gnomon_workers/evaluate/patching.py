"""What a reconstruction does to the model: cross-entropy and KL with it patched in at the hook.

The hook's output is replaced at the tokens that a harvest stores. Tokens it drops (the first positions, special
tokens) keep their activation in every run: the dictionary never saw them. "Ablated" is zero in their place.

Memory does not grow with the vocabulary: a run ends at the last hidden states, and logits are made of a few tokens at
a time, by the model's own forward pass with its body replaced (see `tails`).

Layers up to the hooked one run once: for the patched runs they pass their input on, and the hooked layer returns what
is patched in. Not every model is a stack whose layers can be left out (keys may be shared between layers), so a
model's first batch is run both ways, and the layers are left out only where the logits are the same to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from gnomon_workers.evaluate.metrics import PatchSums, total
from gnomon_workers.evaluate.tails import Tail, first_of, hooked, replaced_forward

_LAYER: Final = re.compile(r"^(.*)\.(\d+)$")
_can_skip: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Of each model: hook -> whether the layers up to it may be left out of patched runs, once that was tried."""
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
    tail = Tail(model)
    if not tail.is_divided and len(contexts) > 1:
        whole: PatchSums | None = total(
            [
                patch_sums(model, hooks, contexts[n : n + 1], is_stored[n : n + 1], reconstruct)
                for n in range(len(contexts))
            ]
        )
        assert whole is not None, "there are contexts"
        return whole
    activations: dict[str, Tensor] = {}
    original = _recording(tail, {*hooks.read, *hooks.written}, contexts, activations)
    patched = _patched(activations, hooks, is_stored, reconstruct)
    ablated = {name: activations[name].masked_fill(is_stored[..., None], 0) for name in hooks.written}
    runs = [original]
    for values in (patched, ablated):
        runs.append(_replaced(tail, contexts, values, activations, original))
    targets = contexts[:, 1:]
    counts = targets >= 0
    hidden = [run[:, :-1][counts] for run in runs]
    return _sums(tail, hidden, targets[counts])


def _sums(tail: Tail, hidden: list[Tensor], ids: Tensor) -> PatchSums:
    """Sums of the original, the patched and the ablated run, given their last hidden states (n_predictions, d)."""
    ce = [0.0, 0.0, 0.0]
    kl = [0.0, 0.0, 0.0]
    for part, logits in tail.logits(hidden):
        log_p = [log_softmax(values.float(), dim=-1) for values in logits]
        for number, run in enumerate(log_p):
            ce[number] -= float(run.gather(1, ids[part, None]).sum(dtype=torch.float64))
            if number:
                kl[number] += float((log_p[0].exp() * (log_p[0] - run)).sum(1).sum(dtype=torch.float64))
    return PatchSums(
        n_predictions=len(ids),
        ce_original=ce[0],
        ce_patched=ce[1],
        ce_ablated=ce[2],
        kl_patched=kl[1],
        kl_ablated=kl[2],
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


def _recording(tail: Tail, names: set[str], contexts: Tensor, activations: dict[str, Tensor]) -> Tensor:
    """Last hidden states; the activations of the named modules are kept."""

    def capture(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        activations[name] = first_of(output).clone()  # what comes next may change it in place

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(hooked(tail.model.get_submodule(name), partial(capture, name)))
        return tail.hidden(contexts)


def _replaced(
    tail: Tail, contexts: Tensor, values: dict[str, Tensor], recorded: dict[str, Tensor], original: Tensor
) -> Tensor:
    """Last hidden states with the outputs of some modules replaced; below a whole layer that is, nothing matters."""
    layers = layers_up_to(tail.model, next(iter(values))) if len(values) == 1 else []
    if layers:
        (hook,) = values
        tried = _can_skip.setdefault(tail.model, {})
        if hook not in tried:
            tried[hook] = _is_identity(tail, contexts, {hook: recorded[hook]}, layers, original)
        if not tried[hook]:
            layers = []
    return _run(tail, contexts, values, layers)


def _is_identity(
    tail: Tail, contexts: Tensor, values: dict[str, Tensor], layers: list[nn.Module], original: Tensor
) -> bool:
    """Whether the model gives the same bits with the hooked layer's output put in and those below it left out."""
    try:
        return torch.equal(_run(tail, contexts, values, layers), original)
    except Exception:
        return False


def _run(tail: Tail, contexts: Tensor, values: dict[str, Tensor], skipped: list[nn.Module]) -> Tensor:
    def replace(name: str, _module: nn.Module, _args: Any, output: Any) -> Any:
        return with_first(output, values[name])

    with ExitStack() as stack:
        for layer in skipped:
            stack.enter_context(_passing_on(layer))
        for name in values:
            stack.enter_context(hooked(tail.model.get_submodule(name), partial(replace, name)))
        return tail.hidden(contexts)


def layers_up_to(model: nn.Module, hook_name: str) -> list[nn.Module]:
    """The hooked layer and those below it, where the hook is a whole layer of a stack; else none."""
    match = _LAYER.match(hook_name)
    stack = model.get_submodule(match[1]) if match else None
    if match is None or not isinstance(stack, nn.ModuleList):
        return []
    return list(stack)[: int(match[2]) + 1]


def with_first(output: Any, hidden: Tensor) -> Any:
    """A module's output in its own form, with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)((hidden, *output[1:]))


@contextmanager
def _passing_on(layer: nn.Module) -> Iterator[None]:
    """Let a layer return its input; a model whose layers return more than hidden states then fails, and runs whole."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return hidden_states

    with replaced_forward(layer, forward):
        yield
