"""One harvest worker: an actor that holds the model and turns planned segments into committed ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gnomon.errors import InvalidRequest
from gnomon.specs import HarvestSpec, StoredDtype
from gnomon_storage.arrays import Array
from gnomon_storage.location import Location
from gnomon_storage.manifest import SegmentCommit
from gnomon_storage.rows import INT8_MOST
from gnomon_storage.writing import SegmentWriter
from gnomon_workers.harvest.packing import PADDING, Mask, SegmentPlan, Tokens, kept_tokens
from gnomon_workers.models.loading import LoadedModel, load_model, read_activations
from gnomon_workers.runtime.answers import answers
from gnomon_workers.runtime.devices import own_device


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestTask:
    """What every worker is told."""

    spec: HarvestSpec
    store: str
    """URL of the activation store."""
    attempt: int
    life: int = 0
    """Workers that the attempt had lost and replaced before this one."""
    special_ids: tuple[int, ...]
    input_roots: tuple[str, ...]


class HarvestWorker:
    """Harvests one segment at a time; `beat` is answered meanwhile."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._n_tokens = 0
        self._task: HarvestTask
        self._model: LoadedModel
        self._hooks: dict[str, int]

    def beat(self) -> int:
        """Tokens that passed through the model so far."""
        return self._n_tokens

    @answers
    def prepare(self, task: HarvestTask) -> dict[str, int]:
        """Load the model; returns the width of every hook."""
        with self._lock:
            self._task = task
            self._model = load_model(task.spec.model, task.input_roots, device=own_device())
            self._hooks = hook_widths(self._model, task.spec)
            return self._hooks

    @answers
    def harvest(self, plan: SegmentPlan) -> SegmentCommit:
        """Run a segment's contexts through the model and commit their rows."""
        with self._lock:
            return self._harvest(plan)

    def _harvest(self, plan: SegmentPlan) -> SegmentCommit:
        task = self._task
        kept = kept_tokens(plan.contexts, task.spec.drop, task.special_ids)
        context_ids, positions = np.nonzero(kept)
        writer = SegmentWriter(
            Location.open(task.store),
            split=plan.split,
            index=plan.index,
            attempt=task.attempt,
            life=task.life,
            hooks=self._hooks,
            dtype=task.spec.dtype,
            contexts=plan.contexts,
            tokens=plan.contexts[kept],
            positions=positions,
            context_ids=context_ids,
            n_tokens=plan.n_tokens,
        )
        for rows, n_tokens in read_rows(self._model, task.spec, plan.contexts, kept):
            writer.append(
                {hook: stored.raw for hook, stored in rows.items()},
                {hook: stored.squared_error for hook, stored in rows.items()},
            )
            self._n_tokens += n_tokens
        return writer.commit()


def read_rows(
    model: LoadedModel, spec: HarvestSpec, contexts: Tokens, kept: Mask
) -> Iterator[tuple[dict[str, StoredRows], int]]:
    """Rows of the kept tokens of every batch of contexts, as they are stored, and the tokens of the batch.

    Raises InvalidRequest, "non_finite_activations".
    """
    for start in range(0, len(contexts), spec.batch_contexts):
        batch = slice(start, start + spec.batch_contexts)
        n_tokens = int((contexts[batch] != PADDING).sum())
        # Padding is at the end, so what no context of the batch needs is cut off.
        length = int((contexts[batch] != PADDING).any(0).sum())
        tokens = torch.from_numpy(contexts[batch, :length].astype(np.int64)).to(model.device)
        mask = tokens != PADDING
        seen = read_activations(model.module, spec.hooks, tokens.clamp_min(0), mask.long())
        stored = torch.from_numpy(kept[batch, :length]).to(model.device)
        yield {hook: as_stored(hook, acts[stored], spec.dtype) for hook, acts in seen.items()}, n_tokens


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of a hook as they are stored."""

    raw: Array
    """(n, width); see `gnomon_storage.rows`."""
    squared_error: float
    """The sum of their squared distances from what the model gave."""


def as_stored(hook: str, rows: torch.Tensor, dtype: StoredDtype) -> StoredRows:
    """Rows (n, d_in) as they are stored; raises InvalidRequest, "non_finite_activations"."""
    if not bool(torch.isfinite(rows).all()):
        raise InvalidRequest(
            f"hook {hook!r} gave values that are not finite; set model.dtype='float32', or choose another hook",
            code="non_finite_activations",
        )
    if dtype == "int8":
        return _as_int8(rows.float())
    if dtype == "float32":
        return StoredRows(rows.float().cpu().numpy(), 0.0)
    rounded = rows.bfloat16()
    # what is bfloat16 already loses nothing
    squared_error = 0.0 if rows.dtype == rounded.dtype else _squared_distance(rows, rounded)
    return StoredRows(rounded.cpu().view(torch.uint16).numpy(), squared_error)


def _as_int8(rows: torch.Tensor) -> StoredRows:
    """Each row as a scale and its values in units of it, to the nearest; a row of zeros has the scale 0."""
    scales = rows.abs().amax(1, keepdim=True) / INT8_MOST
    units = (rows / scales).nan_to_num_().round_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8)
    raw = torch.cat([scales.contiguous().view(torch.uint8), units.view(torch.uint8)], 1)
    return StoredRows(raw.cpu().numpy(), _squared_distance(rows, units * scales))


def _squared_distance(rows: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((rows.float() - rounded.float()).square().sum(dtype=torch.float64))


def hook_widths(model: LoadedModel, spec: HarvestSpec) -> dict[str, int]:
    """Width of every hook's output, seen by running two tokens; raises InvalidRequest, "unknown_hook"."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    for hook in spec.hooks:
        try:
            model.module.get_submodule(hook)
        except AttributeError as error:
            raise _unknown_hook(hook, f"is not a module of {type(model.module).__name__}") from error
    try:
        seen = read_activations(model.module, spec.hooks, ids, torch.ones_like(ids))
    except KeyError as error:
        raise _unknown_hook(str(error.args[0]), "is never called in a forward pass") from error
    for hook, acts in seen.items():
        if acts.dim() != 3 or tuple(acts.shape[:2]) != (1, 2):
            raise _unknown_hook(hook, f"gives {tuple(acts.shape)} for 1 context of 2 tokens, wanted (1, 2, d_in)")
    return {hook: int(acts.shape[-1]) for hook, acts in seen.items()}


def _unknown_hook(hook: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"hook {hook!r} {why}; choose a layer, such as 'model.layers.3'", code="unknown_hook")
