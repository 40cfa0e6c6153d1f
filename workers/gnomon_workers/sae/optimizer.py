"""Adam over the parameters of one shard, with its state in plain tensors so that a checkpoint is the state.

Replicas may share the work: each then keeps the moments of its own rows of the two matrices, moves those, and gets the
others from their owners.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gnomon_workers.parallel.mesh import ProcessMesh
from gnomon_workers.sae.fused_adam import fused_adam
from gnomon_workers.sae.parameters import Parameters

MATRICES: Final = ("W_enc_rows", "W_dec")
"""Parameters with a row for each feature; all others are vectors, and every replica moves them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamState:
    """Moments by the names of Parameters.tensors(), and the number of steps."""

    eps: float
    betas: tuple[float, float]
    """Decays of the first and the second moment."""
    params: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    own: range
    """Features of the shard whose moments this replica keeps and whose rows it moves: all, unless replicas share."""
    rates: Mapping[str, float]
    """Learning rates of vectors, as multiples of that of the rows; 1 for those that are not named."""
    n_steps: Tensor
    """Steps made, a float32 scalar on the CPU, so that no kernel is waited for to know it."""

    @classmethod
    def create(
        cls,
        parameters: Parameters,
        *,
        betas: tuple[float, float],
        eps: float,
        rates: Mapping[str, float] | None = None,
        own: range | None = None,
    ) -> AdamState:
        """State of an optimizer that has made no step."""
        params = parameters.tensors()
        own = own if own is not None else range(parameters.n_local)
        moved = {name: p[own.start : own.stop] if name in MATRICES else p for name, p in params.items()}
        return cls(
            eps=eps,
            betas=betas,
            params=params,
            first={name: torch.zeros_like(p) for name, p in moved.items()},
            second={name: torch.zeros_like(p) for name, p in moved.items()},
            own=own,
            rates=rates or {},
            n_steps=torch.zeros(()),
        )

    def rows(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Parameter and moments of rows [start, stop), views; of a matrix they must be own rows."""
        first_row = self.own.start if name in MATRICES else 0
        moments = slice(start - first_row, stop - first_row)
        return self.params[name][start:stop], self.first[name][moments], self.second[name][moments]

    def begin(self, vectors: Mapping[str, Tensor], *, lr: float, clip_scale: float) -> None:
        """Count a step, and move the vectors, which every replica moves whole, down their gradients * clip_scale."""
        self.n_steps.add_(1)
        by_rate: dict[float, list[str]] = {}
        for name in vectors:
            by_rate.setdefault(self.rates.get(name, 1.0), []).append(name)
        for rate, names in by_rate.items():
            rows = [self.rows(name, 0, len(vectors[name])) for name in names]
            self.move(rows, [vectors[name] * clip_scale for name in names], lr * rate)

    def move(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]], grads: Sequence[Tensor], lr: float) -> None:
        """One step down the gradients for (parameter, first, second) triples; `begin` must have counted it."""
        beta1, beta2 = self.betas
        fused_adam(rows, grads, self.n_steps, lr=lr, beta1=beta1, beta2=beta2, eps=self.eps)


def owned_rows(n_local: int, replica: int, dp: int) -> range:
    """Features of a shard that a replica moves where replicas share the work: equal ranges, the last the shortest."""
    share = -(-n_local // dp)
    return range(min(replica * share, n_local), min((replica + 1) * share, n_local))


def share_rows(parameters: Parameters, mesh: ProcessMesh) -> None:
    """Give every replica the rows that the others have moved."""
    for replica in range(mesh.dp):
        own = owned_rows(parameters.n_local, replica, mesh.dp)
        for name, tensor in parameters.tensors().items():
            if name in MATRICES and len(own):
                mesh.broadcast(tensor[own.start : own.stop], replica)


def learning_rate(step: int, *, peak: float, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Rate of step `step` (from 0): linear warm-up, constant, linear decay over the last share of the run."""
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    n_decay = decay_fraction * n_steps
    decay = min(1.0, (n_steps - step) / n_decay) if n_decay > 0 else 1.0
    return peak * warm * decay
