"""Steps of variants without a fixed number of active features, for as long as a large share of them is active.

Half of all features are active at first. Their picks would take ten times the memory of the matrices that they are, and
ten times the time of the encoder's product; as matrices they take two passes over blocks of features:

    decode      x_hat += acts[:, block] W_dec[block]
    gradients   pulls = residual W_dec[block]^T;  h = acts^T residual;  g = dL/dprojection^T inputs

Beside the pre-activations nothing as large as [tokens, n_local] is ever held, whatever is active. The products may be
made in bfloat16 where the hardware is fast at it; which features are active, losses' sums and penalties are not.

Which way a step takes depends on the density of the step before, which checkpoints keep and all ranks share: the same
after a restart, and on any mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from gnomon_workers.sae.arrays import count_true
from gnomon_workers.sae.variants.base import Batch, sum_of_squares

DENSE_SHARE: Final = {torch.bfloat16: 0.1, torch.float32: 0.2, torch.float64: 0.2}
"""Share of active (token, feature) pairs above which matrices are the faster way, by the dtype of their products."""
DENSITY: Final = "density"
"""Name of the last step's share among the running numbers."""
BLOCK_BYTES: Final = {"cpu": 2 << 20, "cuda": 1 << 30}
"""Of a float32 matrix [tokens, features of a block]."""
MIN_WIDTH: Final = 32
"""Features of a block, whatever the batch: less makes no good products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What one block of features adds to the gradients, as the factors of its products."""

    activations: Tensor
    """(tokens, width): the weights of the decoder's rows, as they were decoded."""
    projections: Tensor
    """(tokens, width) dL/d(projection)"""
    vectors: dict[str, Tensor]
    """(width,) each, summed over tokens, by name; "b_enc" among them."""


class DenseRule(Protocol):
    """A variant's activation at one step, for a block of features at a time."""

    def activations(self, pre: Tensor, features: slice) -> tuple[Tensor, ...]:
        """What is decoded, from pre-activations (tokens, width): the activations, and what else there is."""

    def sums(self, activations: tuple[Tensor, ...], features: slice) -> dict[str, Tensor]:
        """Float64 scalars that add up over blocks and shards, for penalties."""

    def pulled(self, pre: Tensor, features: slice, pulls: Sequence[Tensor]) -> Pulled:
        """From the gradients of what was decoded, (tokens, width) each."""


def factor(matrix: Tensor, batch: Batch) -> Tensor:
    """A float32 matrix as a factor of the batch's dense products; one of another precision stays as it is."""
    return matrix.to(batch.dense_dtype) if matrix.dtype == torch.float32 else matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseGradient:
    """All gradients of a shard as functions of a block of features, for the tokens of one replica."""

    batch: Batch
    rule: DenseRule
    residuals: tuple[Tensor, ...]
    """(tokens, d_out) each: dL/dx_hat of everything that was decoded, the reconstruction's first."""
    fired: Tensor
    """(n_local,) bool"""

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, dict[str, Tensor]]]:
        """(features, g, h, vectors) of every block: dL/dW_enc rows, dL/dW_dec rows and the vectors' gradients."""
        batch = self.batch
        inputs = factor(batch.encoder_inputs, batch)
        residuals = [factor(residual, batch) for residual in self.residuals]
        for features in feature_blocks(batch):
            pre, W_dec = batch.hidden_pre[:, features], factor(batch.parameters.W_dec[features], batch)
            pulled = self.rule.pulled(pre, features, [residual @ W_dec.t() for residual in residuals])
            g = factor(pulled.projections, batch).t() @ inputs
            h = factor(pulled.activations, batch).t() @ residuals[0]
            dtype = batch.parameters.W_dec.dtype
            yield features, g.to(dtype), h.to(dtype), pulled.vectors

    def b_dec_gradient(self) -> Tensor:
        """dL/d(b_dec) through the reconstruction, (d_out,)."""
        return self.residuals[0].sum(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """What was decoded of a whole batch."""

    errors: tuple[Tensor, ...]
    """x_hat - x, (tokens, d_out), of everything that was decoded; complete over shards."""
    squares: tuple[Tensor, ...]
    """Their sums of squares, float64 scalars of this replica."""
    sums: dict[str, Tensor]
    """As the rule's, complete over shards."""
    n_active: int
    """Active (token, feature) pairs of this rank."""
    fired: Tensor
    """(n_local,) bool"""


def is_dense(batch: Batch) -> bool:
    """Whether a step is to be made with matrices: by the density of the step before."""
    return batch.state.get(DENSITY, 1.0) > DENSE_SHARE[batch.dense_dtype]


def density(n_active: int, batch: Batch) -> float:
    """Share of active (token, feature) pairs of the whole batch; collective over the mesh."""
    count = torch.tensor([n_active], device=batch.targets.device)
    n_pairs = len(batch.targets) * batch.parameters.n_local * batch.mesh.size("world")
    return int(batch.mesh.all_reduce(count, "world")) / n_pairs


def feature_blocks(batch: Batch) -> Iterator[slice]:
    """The shard's features, as many at a time as the processor's cache can hold the activations of."""
    device = batch.targets.device.type
    width = max(MIN_WIDTH, BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"]) // (4 * max(1, len(batch.targets))))
    n_local = batch.parameters.n_local
    return (slice(start, min(start + width, n_local)) for start in range(0, n_local, width))


def reconstruct(rule: DenseRule, batch: Batch) -> Reconstruction:
    """Decode everything. Collective over shards."""
    params = batch.parameters
    totals: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    fired: list[Tensor] = []
    for features in feature_blocks(batch):
        decoded = rule.activations(batch.hidden_pre[:, features], features)
        W_dec = factor(params.W_dec[features], batch)
        parts = [factor(acts, batch) @ W_dec for acts in decoded]
        # the first of bfloat16 products is widened, so that their sum is not rounded at every block
        totals = (
            [p.to(params.W_dec.dtype) for p in parts]
            if not totals
            else [total.add_(part) for total, part in zip(totals, parts, strict=True)]
        )
        found = {"active": count_true(decoded[0] > 0), **rule.sums(decoded, features)}
        sums = {name: sums[name] + value if sums else value for name, value in found.items()}
        fired.append(decoded[0].amax(0) > 0)
    n_active = int(sums["active"])
    shared = batch.mesh.all_reduce(torch.stack(list(sums.values())), "features")
    errors = tuple(batch.mesh.all_reduce(total, "features").sub_(batch.targets) for total in totals)
    return Reconstruction(
        errors=errors,
        squares=tuple(sum_of_squares(error) for error in errors),
        sums=dict(zip(sums, shared, strict=True)),
        n_active=n_active,
        fired=torch.cat(fired),
    )


def dense_gradient(rule: DenseRule, batch: Batch, found: Reconstruction, scale: float) -> DenseGradient:
    """The gradient of scale / 2 times the sums of squares, and of what the rule adds to it."""
    residuals = tuple(error.mul_(scale) for error in found.errors)
    return DenseGradient(batch=batch, rule=rule, residuals=residuals, fired=found.fired)
