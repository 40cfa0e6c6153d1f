"""A train spec with everything resolved: what the ranks are told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from gnomon.errors import InvalidRequest
from gnomon.specs import AuxK, Mesh, TrainSpec, chooses_k
from gnomon_workers.sae.shape import Shape, aux_of, n_residual_rows, resolve_k_aux
from gnomon_workers.sae.variants import Setting

_ROUNDING: Final = 1e-12
"""Variance below this share of the mean squared norm is what float64 leaves of none at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRows:
    """The rows of one hook, as a part of the rows that a run reads."""

    name: str
    """Empty where the run does not care."""
    width: int
    mean: tuple[float, ...] | None = None
    """It is taken from them, (width,); folded back at export, as the scale is. None = nothing is."""
    scale: float = 1.0
    """They are then multiplied by this."""
    variance: float = 1.0
    """Mean squared distance from their mean that they then have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """One dictionary to train: its spec, and what was resolved against its store and the cluster."""

    spec: TrainSpec
    """As if this dictionary were trained alone."""
    inputs: tuple[HookRows, ...]
    """What the encoder reads: one hook, or the joined hooks of a crosscoder."""
    target: HookRows | None
    """What a transcoder reconstructs; None = the input. In a row that is read it follows the inputs."""
    d_sae: int
    mesh: Mesh

    @property
    def n_ranks(self) -> int:
        """Processes that train it."""
        return self.mesh.dp * self.mesh.features

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.spec.resolve_lr(self.d_sae)

    @property
    def data_seed(self) -> int:
        """Of the order of the data; `spec.seed` is that of the initialisation."""
        return self.spec.seed if self.spec.data_seed is None else self.spec.data_seed

    @property
    def encoder_dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """Of the encoder's product, which may round where it only decides which features are chosen."""
        return self.spec.encoder_dtype if chooses_k(self.spec.activation) else "float32"

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
    def bias_rates(self) -> dict[str, float]:
        """What the learning rate of each bias is, as a multiple of that of the weights.

        A step of Adam moves every parameter by about its rate, whatever it is a step of. Weights have a length of
        their own, but biases have the units of what they are added to: a component of the inputs or of the outputs.
        """
        outputs = self.inputs if self.target is None else (self.target,)
        projections = self.spec.optimizer.b_enc_rate * _component_rms(self.inputs)
        reconstructions = self.spec.optimizer.b_dec_rate * _component_rms(outputs)
        return {"b_enc": projections, "b_gate": projections, "b_dec": reconstructions}

    @property
    def setting(self) -> Setting:
        """What variants need to know of the run."""
        return Setting(
            d_sae=self.d_sae,
            batch_size=self.spec.batch_size,
            n_steps=self.spec.n_steps,
            k_aux=self.k_aux,
            dead_after_tokens=self.spec.dead_window,
        )

    @property
    def aux(self) -> AuxK | None:
        """The auxiliary loss, if any."""
        return aux_of(self.spec.activation)

    @property
    def n_rows(self) -> int:
        """Rows of residual gradients of each token: one for every Matryoshka group, and one for the auxiliary loss."""
        return n_residual_rows(self.spec.activation)

    @property
    def shape(self) -> Shape:
        """What its costs follow from."""
        return Shape(
            spec=self.spec,
            d_in=self.d_in,
            d_out=self.d_out,
            d_sae=self.d_sae,
            mesh=self.mesh,
            is_transcoder=self.target is not None,
        )

    @property
    def k_aux(self) -> int:
        """Dead features used per token by the auxiliary loss: given, or the power of two nearest d_in / 2."""
        return resolve_k_aux(self.aux, d_in=self.d_in, d_sae=self.d_sae)


def make_plan(spec: TrainSpec, *, d_in: int, mesh: Mesh, mean_squared_norm: float) -> TrainPlan:
    """Resolve a spec that trains on one hook against its store (d_in, mean squared norm) and its mesh."""
    hook = make_hook(spec, "", mean=(0.0,) * d_in, mean_squared_norm=mean_squared_norm)
    return make_joint_plan(spec, inputs=(hook,), target=None, mesh=mesh)


def make_hook(spec: TrainSpec, name: str, *, mean: Sequence[float], mean_squared_norm: float) -> HookRows:
    """A hook, of whose raw rows the mean and the mean squared norm are given, with what the spec makes of them.

    Raises InvalidRequest where the rows are all the same: there is nothing to learn, and no scale to learn it at.
    """
    variance = mean_squared_norm - sum(value * value for value in mean)
    if not variance > _ROUNDING * mean_squared_norm:
        raise InvalidRequest(
            f"the activations of hook {name!r} are all the same: nothing can be learnt from them; choose another hook",
            code="constant_activations",
        )
    match spec.normalize:
        case "centred":
            return HookRows(name=name, width=len(mean), mean=tuple(mean), scale=variance**-0.5)
        case "mean_squared_norm":
            share = variance / mean_squared_norm
            return HookRows(name=name, width=len(mean), scale=mean_squared_norm**-0.5, variance=share)
        case "none":
            return HookRows(name=name, width=len(mean), variance=variance)


def make_joint_plan(spec: TrainSpec, *, inputs: Sequence[HookRows], target: HookRows | None, mesh: Mesh) -> TrainPlan:
    """Resolve a spec against the hooks it reads, several for a crosscoder, and its mesh."""
    d_sae = spec.resolve_d_sae(sum(hook.width for hook in inputs))
    return TrainPlan(spec=spec, inputs=tuple(inputs), target=target, d_sae=d_sae, mesh=mesh)


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What makes raw rows of joined hooks into what is trained on."""

    mean: Tensor | None
    """(width,)"""
    scale: float | Tensor
    """A number where one will do, else (width,)."""

    @classmethod
    def of(cls, hooks: Sequence[HookRows], like: Tensor) -> Normalisation:
        """That of hooks, with tensors like the one given."""
        mean = None
        if any(hook.mean is not None for hook in hooks):
            mean = torch.cat([like.new_tensor(hook.mean or (0.0,) * hook.width) for hook in hooks])
        scales = {hook.scale for hook in hooks}
        if len(scales) == 1:
            return cls(mean, scales.pop())
        return cls(mean, torch.cat([like.new_full((hook.width,), hook.scale) for hook in hooks]))

    def __call__(self, rows: Tensor) -> Tensor:
        """Raw rows (n, width) as they are trained on, in a new tensor."""
        # the mean first: it may be many times what is left, which would be rounded away if both were scaled
        return rows * self.scale if self.mean is None else (rows - self.mean).mul_(self.scale)


def _component_rms(hooks: Sequence[HookRows]) -> float:
    """Root mean square of a component of normalised rows about its mean."""
    return math.sqrt(sum(hook.variance for hook in hooks) / sum(hook.width for hook in hooks))
