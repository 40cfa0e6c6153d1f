"""Documents become contexts, contexts become segments: pure functions of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from gnomon.specs import DropPolicy
from gnomon_storage.manifest import Split

Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
PADDING: Final = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlan:
    """Contexts that become one segment."""

    split: Split
    index: int
    contexts: Tokens
    """(n_contexts, context_length); padding is -1."""

    @property
    def n_tokens(self) -> int:
        """Tokens that pass through the model."""
        return int((self.contexts != PADDING).sum())


def concat_contexts(
    documents: Iterable[Iterable[int]], *, length: int, separator: int | None, bos: int | None
) -> Iterator[Tokens]:
    """Documents joined end to end, each followed by the separator, cut into full contexts (length,).

    With bos, every context begins with it and holds one token less of the text. What is left at the end is dropped.
    """
    prefix = [] if bos is None else [bos]
    buffer = list(prefix)
    for document in documents:
        buffer.extend(document)
        if separator is not None:
            buffer.append(separator)
        start = 0
        while len(buffer) - start >= length:
            yield np.array([*prefix, *buffer[start + len(prefix) : start + length]], dtype=np.int32)
            start += length - len(prefix)
        del buffer[:start]


def document_contexts(documents: Iterable[list[int]], *, length: int) -> Iterator[Tokens]:
    """One document in each context (length,), cut and padded; documents without tokens are left out."""
    for document in documents:
        if document:
            context = np.full(length, PADDING, dtype=np.int32)
            kept = document[:length]
            context[: len(kept)] = kept
            yield context


def within_budget(contexts: Iterable[Tokens], n_tokens: int) -> Iterator[Tokens]:
    """Contexts for as long as all their tokens together do not exceed n_tokens."""
    for context in contexts:
        n_tokens -= int((context != PADDING).sum())
        if n_tokens < 0:
            return
        yield context


def plan_segments(
    contexts: Iterable[Tokens], *, held_out_every: int, contexts_per_segment: int
) -> Iterator[SegmentPlan]:
    """Segments of both splits, as they fill up, then what is left of each.

    Of every held_out_every contexts the second is held out: two contexts are enough to train and to evaluate.
    """
    gathered: dict[Split, list[Tokens]] = {"segments": [], "held_out": []}
    n_planned: dict[Split, int] = {"segments": 0, "held_out": 0}

    def take(split: Split) -> SegmentPlan:
        plan = SegmentPlan(split=split, index=n_planned[split], contexts=np.stack(gathered[split]))
        n_planned[split] += 1
        gathered[split] = []
        return plan

    for number, context in enumerate(contexts):
        split: Split = "held_out" if number % held_out_every == 1 else "segments"
        gathered[split].append(context)
        if len(gathered[split]) == contexts_per_segment:
            yield take(split)
    for split in ("segments", "held_out"):
        if gathered[split]:
            yield take(split)


def kept_tokens(contexts: Tokens, drop: DropPolicy, special_ids: Iterable[int]) -> Mask:
    """Which tokens of contexts (n, length) are stored, (n, length): told from the tokens alone."""
    kept: Mask = contexts != PADDING
    kept[:, : drop.first_positions] = False
    if drop.special_tokens:
        kept &= ~np.isin(contexts, np.fromiter(special_ids, dtype=np.int64))
    return kept
