"""Exact TopK and BatchTopK over a mesh: the same picks as on one process, ties included."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.arrays import kth_largest
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.products import Kernels
from gnomon_workers.sae.selection import Candidates, GroupedRows, Maxima, group_maxima, keep_largest, local_topk
from gnomon_workers.sae.sparse import Picks


def global_topk(hidden_pre: Tensor, k: int, mesh: ProcessMesh, *, above: float = 0.0) -> Picks:
    """The k largest of every token over all feature shards that are > `above` (0 or -inf), as far as they lie here.

    hidden_pre is (tokens, n_local). One round: local top-k, all-gather of k values a token, the same cut everywhere.
    Ties go to the lowest global index.
    """
    k_local = min(k, hidden_pre.shape[1])
    with mesh.clock.section("selection"):
        local = local_topk(GroupedRows(hidden_pre, k_local, above=above), k_local)
        return _cut(local, len(hidden_pre), k, k_local, mesh)


def topk_of(pre: PreActivations, k: int, kernels: Kernels, mesh: ProcessMesh) -> Picks:
    """The same for pre-activations that the kernels may choose from without writing them."""
    k_local = min(k, pre.parameters.n_local)
    with mesh.clock.section("selection"):
        return _cut(kernels.local_topk(pre, k_local), len(pre.inputs), k, k_local, mesh)


def _cut(local: Candidates, n_tokens: int, k: int, k_local: int, mesh: ProcessMesh) -> Picks:
    """Of the k_local largest of each token in every shard those that are among the k largest of all."""
    if mesh.features == 1:
        return local.picks(n_tokens)
    mine, place = local.padded(n_tokens, k_local, -torch.inf)
    # Shards lie in index order and entries by index within, so that "the first of equal ones" is the lowest index.
    rows = torch.cat(mesh.all_gather(mine, "features"), dim=1)
    if rows.shape[1] <= k:
        return local.picks(n_tokens)
    kept = keep_largest(rows, k)[:, mesh.shard * k_local : (mesh.shard + 1) * k_local]
    return local.where(kept.reshape(-1)[place]).picks(n_tokens)


@dataclass(slots=True)
class BatchTopKSelector:
    """The n_keep largest positive activations of the whole batch: over tokens, shards and replicas.

    A radix select on the ordered bits of the candidates: an all-reduce of a 256-bin histogram for every byte of the
    activation's type, whatever the size of the batch. Ties go to the lowest (token, feature). Candidates are
    prefiltered by a bound a little below the last cut, which is checked: if too few pass, the selection is made again
    with a bound that group maxima prove to be low enough.
    """

    bound: float = 0.0
    """Lower bound of the next cut; a guess that saves work and never changes the result."""

    def select(
        self, hidden_pre: Tensor, n_keep: int, mesh: ProcessMesh, *, maxima: Maxima = group_maxima
    ) -> tuple[Picks, float]:
        """Picks of this shard and replica, and the smallest activation kept anywhere (0 if none is positive)."""
        with mesh.clock.section("selection"):
            k = max(1, n_keep // (len(hidden_pre) * mesh.dp))
            return self._select(GroupedRows(hidden_pre, k, positive_maxima=maxima), n_keep, mesh)

    def _select(self, grouped: GroupedRows, n_keep: int, mesh: ProcessMesh) -> tuple[Picks, float]:
        if self.bound == 0:
            self.bound = _safe_bound(grouped, n_keep, mesh)
        candidates, n_candidates = _reaching(grouped, self.bound, mesh)
        # counted over the mesh: every rank takes the same branch, or one would wait in a collective for ever
        if n_candidates < n_keep:
            candidates, n_candidates = _reaching(grouped, _safe_bound(grouped, n_keep, mesh), mesh)
        if n_candidates <= n_keep:
            kept, cut = candidates, _global_min(candidates.values, mesh)
        else:
            kept, cut = _radix_cut(candidates, n_keep, grouped.values.shape, mesh)
        # cuts of batches differ by less than a tenth, as a rule; where they do not, one more round is made
        self.bound = 0.9 * cut
        return kept.picks(len(grouped.values)), cut


def _reaching(grouped: GroupedRows, bound: float, mesh: ProcessMesh) -> tuple[Candidates, int]:
    """Positive entries >= a bound, and how many there are on the whole mesh."""
    candidates = grouped.reaching(torch.full((len(grouped.values), 1), bound, device=grouped.values.device))
    count = torch.tensor([len(candidates.values)], device=grouped.values.device)
    return candidates, int(mesh.all_reduce(count, "world"))


def _safe_bound(grouped: GroupedRows, n_keep: int, mesh: ProcessMesh) -> float:
    """A number that at least n_keep entries of the whole batch reach, or 0.

    Every rank has its share of n_keep entries at or above that share's last group maximum, and the least of those is
    below all of them.
    """
    share = -(-n_keep // mesh.size("world"))
    maxima = grouped.maxima.reshape(1, -1)
    local = kth_largest(maxima, share) if share <= maxima.shape[1] else maxima.new_zeros(1, 1)
    return max(0.0, float(torch.cat(mesh.all_gather(local.to(torch.float64), "world")).min()))


def _global_min(values: Tensor, mesh: ProcessMesh) -> float:
    local = values.min().float() if len(values) else torch.tensor(torch.inf, device=values.device)
    smallest = float(torch.stack(mesh.all_gather(local, "world")).min())
    return smallest if smallest < torch.inf else 0.0


def _radix_cut(candidates: Candidates, n_keep: int, shape: torch.Size, mesh: ProcessMesh) -> tuple[Candidates, float]:
    """The n_keep largest of more than n_keep candidates, and the value of the smallest."""
    keys = _ordered_bits(candidates.values)
    n_bits = 8 * candidates.values.element_size()
    cut, n_missing = 0, n_keep
    in_prefix = keys
    for shift in range(n_bits - 8, -1, -8):
        digits = (in_prefix >> shift) & 0xFF
        counts = mesh.all_reduce(torch.bincount(digits, minlength=256), "world").flip(0).cumsum(0).tolist()
        n_above = bisect_left(counts, n_missing)
        digit = 255 - n_above
        n_missing -= counts[n_above - 1] if n_above else 0
        in_prefix = in_prefix[digits == digit]
        cut = (cut << 8) | digit
    is_tied = keys == cut
    kept = keys > cut
    if _is_too_many(is_tied, n_missing, mesh):
        is_tied &= _first_ties(candidates, is_tied, n_missing, shape, mesh)
    value = torch.tensor(cut, dtype=keys.dtype).view(candidates.values.dtype)
    return candidates.where(kept | is_tied), float(value)


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of the given positive floats: for those the bit pattern is already ordered."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.view(integer)


def _is_too_many(is_tied: Tensor, n_wanted: int, mesh: ProcessMesh) -> bool:
    return int(mesh.all_reduce(is_tied.sum().reshape(1), "world")) > n_wanted


def _first_ties(candidates: Candidates, is_tied: Tensor, n_wanted: int, shape: torch.Size, mesh: ProcessMesh) -> Tensor:
    """Which candidates, of those equal to the cut, are among the first n_wanted by (token, feature)."""
    n_tokens, n_local = shape
    d_sae = n_local * mesh.features
    position = (candidates.tokens + mesh.replica * n_tokens) * d_sae + candidates.features + mesh.shard * n_local
    tied = torch.cat(mesh.all_gather_ragged([position[is_tied]], "world")[0]).sort().values
    return position <= tied[n_wanted - 1]
