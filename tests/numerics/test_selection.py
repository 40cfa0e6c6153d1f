"""Exact selection: equal to a stable sort, on any mesh, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.global_selection import BatchTopKSelector, global_topk
from gnomon_workers.sae.selection import GroupedRows, local_topk
from tests.support.ranks import RankPool
from tests.support.selections import assembled, dense, stable_topk, values_with_ties

MESHES = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]


@settings(max_examples=150, deadline=None)
@given(
    n=st.sampled_from([7, 31, 64, 96, 256, 512, 1024, 1536, 4096]),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_topk_equals_a_stable_sort(n: int, k: int, levels: int, dtype: torch.dtype, seed: int) -> None:
    """Through groups of each width and none, which n and k decide."""
    values = values_with_ties(6, n, levels, seed).to(dtype)
    picks = local_topk(GroupedRows(values, k), k).picks(6)
    assert torch.equal(dense(picks, n), values * stable_topk(values, k))
    k = min(k, n)
    found = local_topk(GroupedRows(values, k, above=-torch.inf), k)
    top, indices = found.values.view(-1, k), found.features.view(-1, k)
    assert (indices.diff(dim=1) > 0).all()
    kept = torch.zeros_like(values, dtype=torch.bool).scatter_(1, indices, True)
    assert torch.equal(kept & (values > 0), stable_topk(values, k))
    assert torch.equal(top, values.gather(1, indices))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 40),
    n_keep=st.integers(1, 60),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    bound=st.sampled_from([0.0, 0.1, 5.0, 1e9]),
    seed=st.integers(0, 10**6),
)
def test_batchtopk_equals_a_stable_sort_whatever_the_bound(
    n: int, n_keep: int, levels: int, bound: float, seed: int
) -> None:
    values = values_with_ties(5, n, levels, seed)
    picks, cut = BatchTopKSelector(bound=bound).select(values, n_keep, ProcessMesh.single())
    expected = stable_topk(values.reshape(1, -1), n_keep).reshape(values.shape)
    assert torch.equal(dense(picks, n), values * expected)
    assert cut == (float(values[expected].min()) if expected.any() else 0.0)


def _topk_on(mesh: ProcessMesh, values: Tensor, k: int) -> Tensor:
    start, stop = mesh.feature_range(values.shape[1])
    first, last = mesh.token_range(len(values))
    return dense(global_topk(values[first:last, start:stop].contiguous(), k, mesh), stop - start)


def _batchtopk_on(mesh: ProcessMesh, values: Tensor, n_keep: int) -> Tensor:
    start, stop = mesh.feature_range(values.shape[1])
    first, last = mesh.token_range(len(values))
    selector = BatchTopKSelector(bound=0.2)
    return dense(selector.select(values[first:last, start:stop].contiguous(), n_keep, mesh)[0], stop - start)


@pytest.mark.parametrize(("dp", "features"), MESHES)
@pytest.mark.parametrize("levels", [2, 10**6])
def test_sharded_selection_equals_unsharded(ranks: RankPool, dp: int, features: int, levels: int) -> None:
    values = values_with_ties(8, 256, levels, seed=levels)
    topk = assembled(ranks.run(_topk_on, dp, features, values, 6), dp, features)
    assert torch.equal(topk, values * stable_topk(values, 6))
    batch = assembled(ranks.run(_batchtopk_on, dp, features, values, 6 * 8), dp, features)
    assert torch.equal(batch, values * stable_topk(values.reshape(1, -1), 48).reshape(values.shape))


def test_a_shard_with_all_the_large_activations_loses_none(ranks: RankPool) -> None:
    """A capacity factor would: the whole top-k lies in one shard."""
    values = values_with_ties(8, 256, 10**6, seed=3).abs() / 10**6
    values[:, :64] += 10
    kept = assembled(ranks.run(_topk_on, 1, 4, values, 32), 1, 4)
    assert torch.equal(kept, values * stable_topk(values, 32))
    assert not kept[:, 64:].any()
