"""A train spec with everything resolved: what the ranks are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gnomon.specs import Activation, Adam, Alignment, AuxK, BatchTopK, Matryoshka, Mesh, TopK, TrainSpec, chooses_k
from gnomon_workers.sae.variants import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRows:
    """The rows of one hook, as a part of the rows that a run reads."""

    name: str
    """Empty where the run does not care."""
    width: int
    scale: float = 1.0
    """They are multiplied by this; folded back at export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """The numbers of one run; the same on every rank."""

    inputs: tuple[HookRows, ...]
    """What the encoder reads: one hook, or the joined hooks of a crosscoder."""
    target: HookRows | None
    """What a transcoder reconstructs; None = the input. In a row that is read it follows the inputs."""
    d_sae: int
    batch_size: int
    n_steps: int
    encoder_dtype: Literal["auto", "float32", "bfloat16"]
    """Of the encoder product; "auto" is resolved on the device."""
    dense_dtype: Literal["auto", "float32", "bfloat16"]
    """Of the other products where most features are active; "auto" is resolved on the device."""
    activation: Activation
    alignment: Alignment
    optimizer: Adam
    beta1: float
    """Decay of Adam's first moment, with the variant's default resolved."""
    lr: float
    """Peak learning rate."""
    warmup_steps: int
    decay_fraction: float
    seed: int
    """Of the initialisation."""
    data_seed: int
    """Of the order of the data."""
    dp: int
    features: int
    kernels: Literal["auto", "reference", "sparse", "triton"]
    """Which implementation computes the products; "auto" is resolved on the device."""
    gradient_exchange: Literal["auto", "batch", "dense"]
    """How replicas share gradients; "auto" is resolved by size."""
    shard_optimizer: bool
    """Whether replicas divide Adam's moments."""
    b_dec_init: Literal["mean", "geometric_median"]
    dead_after_tokens: int
    log_every: int
    checkpoint_every: int

    @property
    def d_in(self) -> int:
        """Width of the encoder's input."""
        return sum(hook.width for hook in self.inputs)

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.target.width if self.target is not None else self.d_in

    @property
    def hooks(self) -> tuple[HookRows, ...]:
        """The hooks that a row is joined from, in order."""
        return self.inputs if self.target is None else (*self.inputs, self.target)

    @property
    def output_scale(self) -> float:
        """A feature of the raw dictionary is that of the trained one divided by this.

        Of one hook it is its scale, so that the weights need no folding. Of several it is that of their mean squared
        norms taken together, so that decoder rows keep a norm near 1.
        """
        outputs = self.inputs if self.target is None else (self.target,)
        if len(outputs) == 1:
            return outputs[0].scale
        return float((sum(hook.scale**-2 for hook in outputs) / len(outputs)) ** -0.5)

    @property
    def setting(self) -> Setting:
        """What variants need to know of the run."""
        return Setting(
            d_sae=self.d_sae,
            batch_size=self.batch_size,
            n_steps=self.n_steps,
            k_aux=self.k_aux,
            dead_after_tokens=self.dead_after_tokens,
        )

    @property
    def aux(self) -> AuxK | None:
        """The auxiliary loss, if any."""
        activation = self.activation
        return activation.aux if isinstance(activation, TopK | BatchTopK | Matryoshka) else None

    @property
    def expected_l0(self) -> float:
        """Active features of a token, as far as that is known beforehand."""
        return float(self.activation.k) if chooses_k(self.activation) else self.d_sae / 16

    @property
    def n_rows(self) -> int:
        """Rows of residual gradients of each token: one for every Matryoshka group, and one for the auxiliary loss."""
        n_groups = len(self.activation.group_fractions) if isinstance(self.activation, Matryoshka) else 1
        return n_groups + (self.aux is not None)

    @property
    def k_aux(self) -> int:
        """Dead features used per token by the auxiliary loss: given, or the power of two nearest d_in / 2."""
        if self.aux is not None and self.aux.k is not None:
            return min(self.aux.k, self.d_sae)
        half = self.d_in / 2
        below = 1 << max(0, int(half).bit_length() - 1)
        return min(below if half / below <= 1.5 else 2 * below, self.d_sae)


def make_plan(spec: TrainSpec, *, d_in: int, mesh: Mesh, mean_squared_norm: float) -> TrainPlan:
    """Resolve a spec that trains on one hook against its store (d_in, mean squared norm) and its mesh."""
    hook = make_hook(spec, "", d_in, mean_squared_norm)
    return make_joint_plan(spec, inputs=(hook,), target=None, mesh=mesh)


def make_hook(spec: TrainSpec, name: str, width: int, mean_squared_norm: float) -> HookRows:
    """A hook with the scale that the spec asks for."""
    normalize = spec.normalize == "mean_squared_norm" and mean_squared_norm > 0
    return HookRows(name=name, width=width, scale=mean_squared_norm**-0.5 if normalize else 1.0)


def make_joint_plan(spec: TrainSpec, *, inputs: Sequence[HookRows], target: HookRows | None, mesh: Mesh) -> TrainPlan:
    """Resolve a spec against the hooks it reads, several for a crosscoder, and its mesh."""
    d_sae = spec.resolve_d_sae(sum(hook.width for hook in inputs))
    return TrainPlan(
        inputs=tuple(inputs),
        target=target,
        d_sae=d_sae,
        batch_size=spec.batch_size,
        n_steps=spec.n_steps,
        encoder_dtype=spec.encoder_dtype if chooses_k(spec.activation) else "float32",
        dense_dtype=spec.encoder_dtype,
        activation=spec.activation,
        alignment=spec.alignment,
        optimizer=spec.optimizer,
        beta1=spec.beta1,
        lr=spec.resolve_lr(d_sae),
        warmup_steps=spec.warmup_steps,
        decay_fraction=spec.schedule.decay_fraction,
        seed=spec.seed,
        data_seed=spec.seed if spec.data_seed is None else spec.data_seed,
        dp=mesh.dp,
        features=mesh.features,
        kernels=spec.kernels,
        gradient_exchange=spec.gradient_exchange,
        shard_optimizer=spec.shard_optimizer,
        b_dec_init=spec.b_dec_init,
        dead_after_tokens=spec.dead_after_tokens,
        log_every=spec.log_every,
        checkpoint_every=spec.checkpoint_every,
    )


def scale_of(hooks: Sequence[HookRows], like: Tensor) -> float | Tensor:
    """What rows of joined hooks are multiplied by: a number where one will do, else (width,) like a given tensor."""
    scales = {hook.scale for hook in hooks}
    if len(scales) == 1:
        return scales.pop()
    return torch.cat([like.new_full((hook.width,), hook.scale) for hook in hooks])


def choose_mesh(spec: TrainSpec, *, d_sae: int, n_ranks: int) -> Mesh:
    """The mesh of a spec; "auto" takes as many of n_ranks as d_sae or the batch can be divided by.

    Features are sharded first, which divides memory and arithmetic alike; what is left becomes replicas.
    """
    if isinstance(spec.mesh, Mesh):
        return spec.mesh
    features = max(n for n in range(1, max(1, n_ranks) + 1) if d_sae % n == 0)
    dp = max(n for n in range(1, max(1, n_ranks // features) + 1) if spec.batch_size % n == 0)
    return Mesh(dp=dp, features=features)
