"""Primitives of index work: NumPy's where tensors lie in main memory, for it is several times as fast there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def offsets_of(counts: Tensor) -> Tensor:
    """Where runs of the given (n,) lengths begin, and where the last ends: (n + 1,) int64."""
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every row, (rows, 1), in float32 where rows are bfloat16."""
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows
    if rows.device.type != "cpu":
        return rows.topk(k, dim=1).values[:, -1:]
    place = rows.shape[1] - k
    return torch.from_numpy(np.partition(rows.numpy(), place, axis=1)[:, place : place + 1])


def stable_order(keys: Tensor) -> Tensor:
    """The permutation that sorts keys, equal ones in their order; NumPy's is many times torch's speed on CPU."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    array = keys.numpy()
    if len(array) and array.dtype == np.int64 and array.min() >= 0 and array.max() <= np.iinfo(np.uint16).max:
        array = array.astype(np.uint16)  # sorted by radix
    return torch.from_numpy(np.argsort(array, kind="stable"))


def true_indices(mask: Tensor) -> Tensor:
    """Flat indices at which a mask is true, ascending."""
    if mask.device.type != "cpu":
        return mask.reshape(-1).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def where_positive(values: Tensor, other: Tensor) -> Tensor:
    """The values at which another tensor is positive, else 0: one pass, where a product with a mask takes three."""
    found: Tensor = torch.ops.aten.threshold_backward(values, other, 0.0)
    return found


def count_true(mask: Tensor) -> Tensor:
    """How many entries are true, a float64 scalar; NumPy's count is twenty times torch's on CPU."""
    if mask.device.type != "cpu":
        return mask.sum(dtype=torch.float64)
    return torch.tensor(float(np.count_nonzero(mask.numpy())), dtype=torch.float64)


def take(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices] along the first dim; NumPy's is several times torch's speed for short rows."""
    if rows.device.type != "cpu":
        return rows[indices]
    if rows.dtype == torch.bfloat16:
        return torch.from_numpy(rows.view(torch.int16).numpy().take(indices.numpy(), axis=0)).view(torch.bfloat16)
    return torch.from_numpy(rows.numpy().take(indices.numpy(), axis=0))
