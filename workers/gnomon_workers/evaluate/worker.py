"""One worker of an evaluation: an actor that adds up its share of the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gnomon.dictionary import Dictionary
from gnomon.specs import Evaluation, HarvestSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentInfo
from gnomon_workers.evaluate.dictionaries import load_dictionary
from gnomon_workers.evaluate.metrics import CoreSums, PatchSums, total
from gnomon_workers.evaluate.patching import Hooks, patch_sums
from gnomon_workers.models.loading import load_model
from gnomon_workers.runtime.answers import answers
from gnomon_workers.runtime.devices import own_device

_MAX_ELEMENTS = 1 << 24
"""Dense activations held at once: 64 MB in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateTask:
    """What every worker is told; worker i of n takes the i-th share."""

    store: str
    """URL of the activation store."""
    dictionary: str
    """URL of the dictionary's folder."""
    hooks: Hooks
    evaluation: Evaluation
    has_logits: bool
    """Whether the model predicts tokens; encoders do not, and have no cross-entropy."""
    input_roots: tuple[str, ...]
    n_workers: int


class EvaluateWorker:
    """Adds up core sums over held-out activations, then patching sums over held-out text."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._done = 0

    def beat(self) -> int:
        """Tokens done so far."""
        return self._done

    @answers
    def run(self, task: EvaluateTask) -> tuple[CoreSums | None, PatchSums | None]:
        """Sums of this worker's share; None where the share is empty."""
        device = own_device()
        store = ActivationStore.open(Location.open(task.store))
        dictionary = load_dictionary(Location.open(task.dictionary)).to(device)
        core = core_sums(dictionary, store, task, self._index, self._advance)
        if not (task.evaluation.ce and task.has_logits):
            return core, None
        return core, self._patch(dictionary, store, task, device)

    def _patch(
        self, dictionary: Dictionary, store: ActivationStore, task: EvaluateTask, device: torch.device
    ) -> PatchSums | None:
        spec = HarvestSpec.read(store.manifest.spec)
        model = load_model(spec.model, task.input_roots, device=device).module
        sums = []
        for contexts, is_stored in context_share(store, task, self._index, spec.batch_contexts):
            reconstruct: Callable[[Tensor], Tensor] = dictionary.forward
            sums.append(patch_sums(model, task.hooks, contexts.to(device), is_stored.to(device), reconstruct))
            self._advance(contexts.numel())
        result: PatchSums | None = total(sums)
        return result

    def _advance(self, n_tokens: int) -> None:
        self._done += n_tokens


@torch.inference_mode()
def core_sums(
    dictionary: Dictionary, store: ActivationStore, task: EvaluateTask, index: int, advance: Callable[[int], None]
) -> CoreSums | None:
    """Core sums over every n-th block of the held-out activations."""
    block = max(1, min(4096, _MAX_ELEMENTS // dictionary.W_enc.shape[1]))
    sums = None
    means = [store.manifest.hooks[name].mean for name in task.hooks.written]
    mean = torch.tensor([value for part in means for value in part], dtype=torch.float64, device=dictionary.device)
    for number, rows in enumerate(_blocks(store, block, task.evaluation.n_tokens)):
        if number % task.n_workers == index:
            x = rows(task.hooks.read).to(dictionary.device)
            target = x if task.hooks.written == task.hooks.read else rows(task.hooks.written).to(dictionary.device)
            acts = dictionary.encode(x)
            part = CoreSums.of(target, acts, dictionary.decode(acts), mean=mean)
            sums = part if sums is None else sums + part
            advance(len(x))
    return sums


def _blocks(store: ActivationStore, block: int, n_tokens: int) -> Iterator[Callable[[tuple[str, ...]], Tensor]]:
    """Readers of blocks of held-out rows of the hooks they are given, joined; n_tokens rows in all."""
    for segment in store.manifest.split("held_out"):
        n_rows = min(segment.n_rows, n_tokens)
        n_tokens -= n_rows
        for start in range(0, n_rows, block):
            stop = min(start + block, n_rows)
            yield partial(_read_joined, store, segment, start, stop)


def _read_joined(
    store: ActivationStore, segment: SegmentInfo, start: int, stop: int, hook_names: tuple[str, ...]
) -> Tensor:
    parts = [torch.from_numpy(store.read_rows(name, segment, start, stop)) for name in hook_names]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def context_share(
    store: ActivationStore, task: EvaluateTask, index: int, batch_contexts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every n-th batch of held-out contexts (n, length), and which of their tokens are stored (n, length)."""
    n_left = -(-task.evaluation.n_ce_tokens // store.manifest.context_length)
    number = 0
    for segment in store.manifest.split("held_out"):
        contexts = torch.from_numpy(store.contexts(segment)[:n_left].astype(np.int64))
        n_left -= len(contexts)
        is_stored = torch.zeros((segment.n_contexts, contexts.shape[1]), dtype=torch.bool)
        is_stored[store.column(segment, "context_ids"), store.column(segment, "positions")] = True
        for start in range(0, len(contexts), batch_contexts):
            if number % task.n_workers == index:
                batch = slice(start, start + batch_contexts)
                yield contexts[batch], is_stored[: len(contexts)][batch]
            number += 1
