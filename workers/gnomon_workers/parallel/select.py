"""Exact TopK and BatchTopK over a mesh: the same picks as on one process, ties included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.selection import topk_rows
from gnomon_workers.sae.sparse import Picks, picks_from_mask


def global_topk(hidden_pre: Tensor, k: int, mesh: ProcessMesh, *, relu: bool = True) -> Picks:
    """The k largest of every token over all feature shards, as far as they lie in this shard.

    hidden_pre is (tokens, n_local). One round: local top-k, all-gather of values, select again. Ties go to the
    lowest global index. With relu, picks <= 0 are left out, for they are zero.
    """
    values, indices = topk_rows(hidden_pre, min(k, hidden_pre.shape[1]))
    mask = _is_globally_kept(values, k, mesh) if mesh.features > 1 else torch.ones_like(values, dtype=torch.bool)
    if relu:
        mask &= values > 0
    return picks_from_mask(indices, values, mask)


def _is_globally_kept(values: Tensor, k: int, mesh: ProcessMesh) -> Tensor:
    """Which local candidates are among the k largest of all shards; values by ascending index in every row."""
    width = values.shape[1]
    candidates = torch.cat(mesh.all_gather(values, "features"), dim=1)
    # Shards lie in index order and candidates in index order within, so a stable sort breaks ties to the lowest
    # global index without a word about indices.
    order = candidates.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, order, True)
    return kept[:, mesh.shard * width : (mesh.shard + 1) * width]


@dataclass(slots=True)
class BatchTopKSelector:
    """The n_keep largest positive activations of the whole batch: over tokens, shards and replicas.

    A radix select on the ordered bits of the candidates: four all-reduces of a 256-bin histogram, whatever the
    size of the batch. Ties go to the lowest (token, feature). Candidates are prefiltered by a bound a little below
    the last cut, which is checked: if too few pass, the bound falls to zero and the selection is made again.
    """

    bound: float = 0.0
    """Lower bound of the next cut; a guess that saves work and never changes the result."""

    def select(self, hidden_pre: Tensor, n_keep: int, mesh: ProcessMesh) -> tuple[Picks, float]:
        """Picks of this shard and replica, and the smallest activation kept anywhere (0 if none is positive)."""
        candidates = _Candidates.above(hidden_pre, self.bound)
        n_candidates = mesh.all_reduce(torch.tensor([len(candidates.values)]), "world")
        if self.bound > 0 and int(n_candidates) < n_keep:
            candidates = _Candidates.above(hidden_pre, 0.0)
            n_candidates = mesh.all_reduce(torch.tensor([len(candidates.values)]), "world")
        if int(n_candidates) <= n_keep:
            kept, cut = candidates, _global_min(candidates.values, mesh)
        else:
            kept, cut = _radix_cut(candidates, n_keep, hidden_pre.shape, mesh)
        self.bound = 0.75 * cut
        return kept.picks(len(hidden_pre)), cut


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Positive activations by ascending (token, feature)."""

    tokens: Tensor
    features: Tensor
    values: Tensor

    @classmethod
    def above(cls, hidden_pre: Tensor, bound: float) -> _Candidates:
        tokens, features = (hidden_pre > bound).nonzero(as_tuple=True)
        return cls(tokens=tokens, features=features, values=hidden_pre[tokens, features])

    def where(self, mask: Tensor) -> _Candidates:
        return _Candidates(tokens=self.tokens[mask], features=self.features[mask], values=self.values[mask])

    def picks(self, n_tokens: int) -> Picks:
        offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=self.tokens.device)
        torch.cumsum(torch.bincount(self.tokens, minlength=n_tokens), 0, out=offsets[1:])
        return Picks(features=self.features, values=self.values, offsets=offsets)


def _global_min(values: Tensor, mesh: ProcessMesh) -> float:
    local = values.min() if len(values) else values.new_tensor(torch.inf)
    smallest = float(torch.stack(mesh.all_gather(local, "world")).min())
    return smallest if smallest < torch.inf else 0.0


def _radix_cut(candidates: _Candidates, n_keep: int, shape: torch.Size, mesh: ProcessMesh) -> tuple[_Candidates, float]:
    """The n_keep largest of more than n_keep candidates, and the value of the smallest."""
    keys = _ordered_bits(candidates.values)
    n_bits = 8 * candidates.values.element_size()
    cut, n_missing = 0, n_keep
    for shift in range(n_bits - 8, -1, -8):
        # shift in two steps: a shift by the full width of the type is undefined
        in_prefix = ((keys >> shift) >> 8) == cut
        digits = (keys[in_prefix] >> shift) & 0xFF
        counts = mesh.all_reduce(torch.bincount(digits, minlength=256), "world").flip(0).cumsum(0)
        digit = 255 - int((counts < n_missing).sum())
        n_missing -= int(counts[255 - digit - 1]) if digit < 255 else 0
        cut = (cut << 8) | digit
    is_tied = keys == cut
    kept = (keys > cut) | (is_tied & _first_ties(candidates, is_tied, n_missing, shape, mesh))
    value = torch.tensor(cut, dtype=keys.dtype).view(candidates.values.dtype)
    return candidates.where(kept), float(value)


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of the given positive floats: for those the bit pattern is already ordered."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.view(integer)


def _first_ties(
    candidates: _Candidates, is_tied: Tensor, n_wanted: int, shape: torch.Size, mesh: ProcessMesh
) -> Tensor:
    """Which candidates, of those equal to the cut, are among the first n_wanted by (token, feature)."""
    n_tokens, n_local = shape
    d_sae = n_local * mesh.features
    position = (candidates.tokens + mesh.replica * n_tokens) * d_sae + candidates.features + mesh.shard * n_local
    tied = torch.cat(mesh.all_gather_ragged(position[is_tied], "world")).sort().values
    return position <= tied[n_wanted - 1]
