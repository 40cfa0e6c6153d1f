"""Packing: every token where the policy puts it, and nowhere else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gnomon.specs import DropPolicy
from gnomon_workers.harvest.packing import (
    concat_contexts,
    document_contexts,
    kept_tokens,
    plan_segments,
    within_budget,
)

DOCUMENTS = st.lists(st.lists(st.integers(10, 99), max_size=30), max_size=12)


@given(DOCUMENTS, st.integers(2, 9), st.sampled_from([None, 1]), st.sampled_from([None, 2]))
def test_concatenation_keeps_every_token_in_order(
    documents: list[list[int]], length: int, separator: int | None, bos: int | None
) -> None:
    contexts = [c.tolist() for c in concat_contexts(documents, length=length, separator=separator, bos=bos)]
    text = [token for document in documents for token in [*document, *([separator] if separator else [])]]
    head = 0 if bos is None else 1
    assert all(len(context) == length for context in contexts)
    assert all(context[:head] == [bos][:head] for context in contexts)
    assert [token for context in contexts for token in context[head:]] == text[: len(contexts) * (length - head)]
    assert len(contexts) == len(text) // (length - head)


def test_documents_are_cut_and_padded() -> None:
    found = [c.tolist() for c in document_contexts([[1, 2], [], [3, 4, 5, 6, 7]], length=4)]
    assert found == [[1, 2, -1, -1], [3, 4, 5, 6]]


def test_budget_counts_tokens_and_not_padding() -> None:
    contexts = list(document_contexts([[1, 2], [3], [4, 5, 6], [7]], length=4))
    assert [len(list(within_budget(contexts, n))) for n in (0, 1, 2, 3, 5, 6, 7, 100)] == [0, 0, 1, 2, 2, 3, 4, 4]


@given(st.integers(0, 60), st.integers(2, 20), st.integers(1, 7))
def test_segments_hold_every_context_once(n_contexts: int, held_out_every: int, per_segment: int) -> None:
    contexts = [np.full(3, number, np.int32) for number in range(n_contexts)]
    plans = list(plan_segments(contexts, held_out_every=held_out_every, contexts_per_segment=per_segment))
    for split in ("segments", "held_out"):
        own = [plan for plan in plans if plan.split == split]
        assert [plan.index for plan in own] == list(range(len(own)))
        assert all(len(plan.contexts) == per_segment for plan in own[:-1])
        numbers = [int(context[0]) for plan in own for context in plan.contexts]
        assert numbers == [n for n in range(n_contexts) if (n % held_out_every == 1) == (split == "held_out")]
    assert sum(plan.n_tokens for plan in plans) == 3 * n_contexts


def test_dropped_are_first_positions_special_tokens_and_padding() -> None:
    contexts = np.array([[5, 6, 0, 7], [0, 8, -1, -1]], np.int32)
    kept = kept_tokens(contexts, DropPolicy(), special_ids=(0, 3))
    assert kept.tolist() == [[False, True, False, True], [False, True, False, False]]
    everything = kept_tokens(contexts, DropPolicy(first_positions=0, special_tokens=False), special_ids=(0, 3))
    assert everything.tolist() == [[True] * 4, [True, True, False, False]]
    assert kept_tokens(contexts, DropPolicy(first_positions=3, special_tokens=False), ()).sum() == 1
