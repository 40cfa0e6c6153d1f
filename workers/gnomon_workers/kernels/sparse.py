"""Sparse products in PyTorch, for the CPU and for any GPU. Works in float64."""

from __future__ import annotations

from torch import Tensor

from gnomon.specs import Alignment
from gnomon_workers.kernels.blocks import BlockedUpdate
from gnomon_workers.sae.encoder import PreActivations
from gnomon_workers.sae.optimizer import AdamState
from gnomon_workers.sae.parameters import Parameters
from gnomon_workers.sae.selection import Candidates, GroupedRows, group_maxima, local_topk
from gnomon_workers.sae.sparse import Picks, activation_gradients, decode


class SparseKernels:
    """Group maxima, embedding bags, sampled products, and an update that goes through the features in blocks."""

    def local_topk(self, pre: PreActivations, k: int) -> Candidates:
        """Entries of the groups whose maximum reaches a bound, cut exactly among those."""
        return local_topk(GroupedRows(pre.dense(), k), k)

    def group_maxima(self, values: Tensor, width: int) -> Tensor:
        """One scan by PyTorch, as integers where that is faster."""
        return group_maxima(values, width)

    def decode(self, picks: Picks, W_dec: Tensor) -> Tensor:
        """An embedding bag for each token."""
        return decode(picks, W_dec)

    def activation_gradients(self, picks: Picks, residual_gradients: Tensor, W_dec: Tensor) -> Tensor:
        """A product sampled at the picks."""
        return activation_gradients(picks, residual_gradients, W_dec)

    def weight_update(self, parameters: Parameters, optimizer: AdamState, alignment: Alignment) -> BlockedUpdate:
        """An update that goes through the features in blocks that fit in the cache."""
        return BlockedUpdate(parameters, optimizer, alignment)
