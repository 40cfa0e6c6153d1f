"""A train spec with everything resolved: what the ranks are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gnomon.specs import Activation, Adam, Alignment, AuxK, Mesh, TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """The numbers of one run; the same on every rank."""

    d_in: int
    d_sae: int
    batch_size: int
    n_steps: int
    activation: Activation
    alignment: Alignment
    optimizer: Adam
    lr: float
    """Peak learning rate."""
    warmup_steps: int
    decay_fraction: float
    seed: int
    dp: int
    features: int
    scale: float
    """Inputs are multiplied by this; folded back at export."""
    b_dec_init: Literal["mean", "geometric_median"]
    dead_after_tokens: int
    log_every: int
    checkpoint_every: int

    @property
    def aux(self) -> AuxK | None:
        """The auxiliary loss, if any."""
        return self.activation.aux

    @property
    def k_aux(self) -> int:
        """Dead features used per token by the auxiliary loss: given, or the power of two nearest d_in / 2."""
        if self.aux is not None and self.aux.k is not None:
            return min(self.aux.k, self.d_sae)
        half = self.d_in / 2
        below = 1 << max(0, int(half).bit_length() - 1)
        return min(below if half / below <= 1.5 else 2 * below, self.d_sae)


def make_plan(spec: TrainSpec, *, d_in: int, mesh: Mesh, mean_squared_norm: float) -> TrainPlan:
    """Resolve a spec against its store (d_in, mean squared norm) and its mesh."""
    d_sae = spec.resolve_d_sae(d_in)
    normalize = spec.normalize == "mean_squared_norm" and mean_squared_norm > 0
    return TrainPlan(
        d_in=d_in,
        d_sae=d_sae,
        batch_size=spec.batch_size,
        n_steps=spec.n_steps,
        activation=spec.activation,
        alignment=spec.alignment,
        optimizer=spec.optimizer,
        lr=spec.resolve_lr(d_sae),
        warmup_steps=spec.warmup_steps,
        decay_fraction=spec.schedule.decay_fraction,
        seed=spec.seed,
        dp=mesh.dp,
        features=mesh.features,
        scale=mean_squared_norm**-0.5 if normalize else 1.0,
        b_dec_init=spec.b_dec_init,
        dead_after_tokens=spec.dead_after_tokens,
        log_every=spec.log_every,
        checkpoint_every=spec.checkpoint_every,
    )


def choose_mesh(spec: TrainSpec, *, d_sae: int, n_ranks: int) -> Mesh:
    """The mesh of a spec; "auto" takes as many of n_ranks as d_sae or the batch can be divided by.

    Features are sharded first, which divides memory and arithmetic alike; what is left becomes replicas.
    """
    if isinstance(spec.mesh, Mesh):
        return spec.mesh
    features = max(n for n in range(1, max(1, n_ranks) + 1) if d_sae % n == 0)
    dp = max(n for n in range(1, max(1, n_ranks // features) + 1) if spec.batch_size % n == 0)
    return Mesh(dp=dp, features=features)
