"""Exact selection on meshes of any form: shapes, k, ties, shards and replicas as Hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.global_selection import BatchTopKSelector, global_topk
from tests.support.ranks import RankPool
from tests.support.selections import assembled, dense, stable_topk, values_with_ties


@dataclass(frozen=True, slots=True)
class Case:
    """One selection; shapes are of a shard and of a replica."""

    n_tokens: int
    n_local: int
    k: int
    levels: int
    bound: float
    seed: int


CASES = st.builds(
    Case,
    n_tokens=st.integers(1, 6),
    n_local=st.sampled_from([1, 2, 5, 17, 32, 96]),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    bound=st.sampled_from([0.0, 0.1, 5.0]),
    seed=st.integers(0, 10**6),
)


def whole(case: Case, dp: int, features: int) -> Tensor:
    """Values (tokens, d_sae) of all ranks."""
    return values_with_ties(case.n_tokens * dp, case.n_local * features, case.levels, case.seed)


def select_on(mesh: ProcessMesh, cases: list[Case]) -> list[tuple[Tensor, Tensor, float]]:
    """For each case this rank's part of TopK and BatchTopK, and the cut."""
    found = []
    for case in cases:
        values = whole(case, mesh.dp, mesh.features)
        start, stop = mesh.feature_range(values.shape[1])
        first, last = mesh.token_range(len(values))
        part = values[first:last, start:stop].contiguous()
        k = min(case.k, values.shape[1])
        picks, cut = BatchTopKSelector(bound=case.bound).select(part, k * len(values), mesh)
        found.append((dense(global_topk(part, k, mesh), stop - start), dense(picks, stop - start), cut))
    return found


@settings(max_examples=6, deadline=None)
@given(
    mesh=st.sampled_from([(1, 3), (3, 1), (2, 3), (3, 2), (1, 7), (2, 4), (4, 2), (8, 1)]),
    cases=st.lists(CASES, min_size=4, max_size=5),
)
def test_selection_on_any_mesh_equals_a_stable_sort(ranks: RankPool, mesh: tuple[int, int], cases: list[Case]) -> None:
    answers = ranks.run(select_on, *mesh, cases)
    for number, case in enumerate(cases):
        values = whole(case, *mesh)
        k = min(case.k, values.shape[1])
        topk = assembled([answer[number][0] for answer in answers], *mesh)
        assert torch.equal(topk, values * stable_topk(values, k))
        over_batch = stable_topk(values.reshape(1, -1), k * len(values)).reshape(values.shape)
        batch = assembled([answer[number][1] for answer in answers], *mesh)
        assert torch.equal(batch, values * over_batch)
        cut = float(values[over_batch].min()) if over_batch.any() else 0.0
        assert {answer[number][2] for answer in answers} == {cut}
