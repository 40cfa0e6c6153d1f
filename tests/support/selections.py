"""Selection as its definition has it: masks, dense matrices and values with ties."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon_workers.sae.sparse import Picks


def stable_topk(values: Tensor, k: int) -> Tensor:
    """The definition: a stable descending sort, cut at k, as a mask of the positive ones."""
    kept = values.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, kept, True) & (values > 0)


def dense(picks: Picks, n_features: int) -> Tensor:
    """Picks as (tokens, n_features)."""
    out = torch.zeros(picks.n_tokens, n_features, dtype=picks.values.dtype)
    out[picks.token_indices(), picks.features] = picks.values
    return out


def values_with_ties(n_rows: int, n: int, levels: int, seed: int) -> Tensor:
    """Values on few levels, so that ties are everywhere; about half are negative."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (n_rows, n), generator=generator).float() / 8


def assembled(parts: list[Tensor], dp: int, features: int) -> Tensor:
    """The parts of all ranks as one (tokens, d_sae)."""
    return torch.cat([torch.cat(parts[r * features : (r + 1) * features], dim=1) for r in range(dp)])
