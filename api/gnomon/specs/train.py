"""Specs of a training: what a dictionary is trained on and how, alone or as one of several variants."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gnomon.specs.activations import (
    DEFAULT_BETAS,
    DEFAULT_LR,
    LARGEST_DEFAULT_LR,
    LONG_RUN_STEPS,
    Activation,
    Matryoshka,
    PAnneal,
    TopK,
    chooses_k,
)
from gnomon.specs.base import HookName, Spec, StoreId
from gnomon.specs.evaluate import Evaluation
from gnomon.specs.harvest import HarvestSpec

LEAST_D_SAE = 2
LARGEST_D_SAE = 2**24
UNTRACED_STEPS = 10
"""Steps of an attempt before a trace begins: the first ones allocate, compile and fill caches."""
Alignment = Literal["orth", "none", "scale", "stopgrad", "tied"]


class StoredActivations(Spec):
    """Activations that were harvested before."""

    kind: Literal["store"] = "store"
    id: StoreId
    """Id of a sealed activation store of this project."""


class Adam(Spec):
    """Adam with gradient clipping; the gradient is clipped after the alignment hook."""

    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the weights; it does not depend on the units of the inputs.

    None = 7e-5 for "jumprelu", 5e-5 for "gated", 2e-4 / sqrt(d_sae / 2^14) for all others, in a run of 400,000 steps or
    more. In a shorter one as many times more as sqrt(400,000 / steps), and at most 7e-3.
    """
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the first moment; None = .9 for "gated", "relu" and "p_anneal", 0 for all others."""
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the second moment; None = .99 for "topk", "batchtopk" and "matryoshka", .999 for all others."""
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """Added to the root of the second moment."""
    b_enc_rate: Annotated[float, Field(ge=0, le=1e6)] = 5.0
    """Learning rate of b_enc in units of what it is added to, as a multiple of lr.

    The unit is the root mean square of a component of the inputs about its mean. 0 keeps b_enc at 0.
    """
    b_dec_rate: Annotated[float, Field(ge=0, le=1e6)] = 0.03
    """The same for b_dec, in units of a component of what is reconstructed; 0 keeps it where it begins."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.2
    """Largest global gradient norm, of the loss of normalised inputs; None = no clipping."""


class Schedule(Spec):
    """Linear warm-up, then constant, then linear decay to zero."""

    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps of warm-up; None = 1,000, or a twentieth of a run shorter than 20,000 steps."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the steps, at the end, over which the rate falls to zero; 1 = from the beginning on."""


MOST_OF_AN_AXIS: Final = 1024
"""Ranks of one axis of a mesh."""


class Mesh(Spec):
    """How a gang of ranks divides the work: dp * features ranks."""

    dp: Annotated[int, Field(ge=1, le=MOST_OF_AN_AXIS)] = 1
    """Replicas; each takes batch_size / dp tokens of every step."""
    features: Annotated[int, Field(ge=1, le=MOST_OF_AN_AXIS)] = 1
    """Shards; each holds d_sae / features features."""


class TrainVariant(Spec):
    """One of several dictionaries that are trained on the same batches; what it leaves out is as in the spec."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Tells it from the others; part of its dictionary's name."""
    activation: Activation | None = None
    """Which features are active."""
    k: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """The activation's k."""
    alignment: Alignment | None = None
    """How encoder . decoder = 1 is kept."""
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """The optimizer's peak learning rate."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of initialisation alone: the order of the data is the same for all."""


class TrainSpec(Spec):
    """Train aligned dictionaries on harvested activations, then evaluate and publish them: one, or several variants."""

    kind: Literal["train"] = "train"
    activations: Annotated[StoredActivations | HarvestSpec, Field(discriminator="kind")]
    """A store by id, or a harvest spec; the service reuses the sealed store of the same harvest."""
    hook_name: HookName | None = None
    """Hook to train on; may be left out where the store has only one."""
    hook_names: Annotated[tuple[HookName, ...], Field(min_length=2, max_length=32)] | None = None
    """Hooks whose activations are joined into one input and reconstructed together: a crosscoder."""
    target_hook_name: HookName | None = None
    """Hook to reconstruct instead of the input: a transcoder. None = the input itself."""
    d_sae: Annotated[int, Field(ge=LEAST_D_SAE, le=LARGEST_D_SAE)] | None = None
    """Number of features. Give this or expansion_factor."""
    expansion_factor: Annotated[float, Field(gt=0, le=4096)] | None = None
    """d_sae / d_in. Give this or d_sae."""
    activation: Activation = TopK()
    """Which features are active."""
    alignment: Alignment = "orth"
    """How encoder . decoder = 1 is kept for every feature; "none" is the standard SAE."""
    optimizer: Adam = Adam()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    token_budget: Annotated[int, Field(ge=1, le=10**13)]
    """Activations to train on, counting repeats when it exceeds the store."""
    batch_size: Annotated[int, Field(ge=1, le=2**22)] = 4096
    """Activations per step, over all replicas."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the products that may round; everything else, and all weights, are float32.

    "auto" is bfloat16 where the hardware is fast at it and the dictionary is large enough to gain by it: for "topk",
    "batchtopk" and "matryoshka" the encoder's product, which only chooses features, whose activations are computed
    again in float32; for the others the products behind the encoder's while most features are active, as half are in
    the first steps. "float32" rounds nothing.
    """
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialisation, and of the order of the data."""
    data_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the order of the data; None = seed."""
    variants: Annotated[tuple[TrainVariant, ...], Field(min_length=1, max_length=64)] | None = None
    """Dictionaries to train at once on the same batches, each with changes of its own; None = one, without changes."""
    mesh: Mesh | Literal["auto"] = "auto"
    """Division over ranks; "auto" takes as much of the cluster as pays."""
    kernels: Literal["auto", "reference", "sparse", "triton"] = "auto"
    """Implementation of the products of a step: "sparse", PyTorch's, on any device; "triton", for CUDA; "reference",
    dense and slow, to compare with; "auto", "triton" on CUDA and "sparse" elsewhere."""
    gradient_exchange: Literal["auto", "batch", "dense"] = "auto"
    """What replicas send each other: "batch", the tokens and their active features, so that losses do not depend on
    mesh.dp; "dense", the sums of their gradients; "auto", whichever is less."""
    shard_optimizer: bool = False
    """Divide Adam's moments over replicas: each keeps and moves its share of every shard's rows, and gets the others.
    Saves memory where mesh.dp > 1, and sends 4 (d_in + d_out) d_sae / mesh.features bytes more a step."""
    normalize: Literal["centred", "mean_squared_norm", "none"] = "centred"
    """What is done to inputs, and folded back into the exported weights: "centred" takes the mean of the store's rows
    from them and scales what is left to unit mean squared norm; "mean_squared_norm" scales them as they are."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    """Initial decoder bias, from a first sample of the activations."""
    dead_after_tokens: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """A feature that has not fired for this many tokens counts as dead; None = 10,000,000, or a quarter of a run of
    fewer than 40,000,000 tokens. Until that many tokens were seen, nothing is known of dead features."""
    log_every: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Steps between two metrics reports."""
    checkpoint_every: Annotated[int, Field(ge=1, le=10**7)] = 500
    """Steps between two checkpoints."""
    profile_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Steps of every attempt of which a Chrome trace is written; None = no trace. Tracing slows them."""
    evaluation: Evaluation | None = Evaluation()
    """Evaluation on held-out text; None skips it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.d_sae is None) == (self.expansion_factor is None):
            raise ValueError("give exactly one of d_sae and expansion_factor")
        if self.d_sae is not None:
            check_shape(self, self.d_sae)
        if self.token_budget < self.batch_size:
            raise ValueError(
                f"token_budget={self.token_budget} is less than one batch of {self.batch_size}; "
                "raise token_budget or lower batch_size"
            )
        if self.hook_names is not None:
            _check_crosscoder(self, self.hook_names)
        if self.target_hook_name not in (None, self.hook_name) and self.alignment != "none":
            raise PydanticCustomError(
                "transcoder_alignment",
                f"alignment={self.alignment!r} is undefined for a transcoder (target_hook_name="
                f"{self.target_hook_name!r}): encoder, decoder live in different spaces; set alignment='none'",
            )
        if self.encoder_dtype == "bfloat16" and not chooses_k(self.activation):
            raise ValueError(
                f"encoder_dtype='bfloat16' is offered where k features are chosen (topk, batchtopk, matryoshka), not "
                f"for {self.activation.kind!r}, whose thresholds need float32; leave it at 'auto'"
            )
        if isinstance(self.mesh, Mesh) and self.batch_size % self.mesh.dp:
            raise ValueError(
                f"mesh.dp={self.mesh.dp} does not divide batch_size={self.batch_size}; "
                f"use a batch of {self.batch_size - self.batch_size % self.mesh.dp or self.mesh.dp}"
            )
        if len(set(self.variant_names)) != len(self.variant_names):
            raise ValueError("variants lists the same name twice; give each its own")
        self.variant_specs()
        return self

    @property
    def dead_window(self) -> int:
        """Tokens without firing after which a feature counts as dead, with the default resolved."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(10_000_000, self.token_budget // 4))

    def check_reach(self, d_sae: int | None = None) -> None:
        """Raise ValueError for a setting whose effect lies behind the end of the run, or beyond d_sae features.

        Asked of what is submitted, and not of every spec that is read: jobs of earlier releases hold such settings.
        """
        if self.dead_window > self.token_budget:
            raise ValueError(
                f"dead_after_tokens={self.dead_window} exceeds token_budget={self.token_budget}: no feature could ever "
                "count as dead; lower it, or leave it out for a quarter of the run"
            )
        steps = {
            "schedule.warmup_steps": self.schedule.warmup_steps,
            "activation.warmup_steps": getattr(self.activation, "warmup_steps", None),
            "activation.start_step": getattr(self.activation, "start_step", None),
        }
        for name, step in steps.items():
            if step is not None and step >= self.n_steps:
                raise ValueError(
                    f"{name}={step} is not reached by a run of {self.n_steps} steps; lower it, or leave it out for a "
                    "share of the run"
                )
        self._check_effect(d_sae)

    def _check_effect(self, d_sae: int | None) -> None:
        """Raise ValueError for settings that could change nothing."""
        if self.profile_steps is not None and self.n_steps <= UNTRACED_STEPS:
            raise ValueError(
                f"profile_steps={self.profile_steps} traces nothing: a trace begins after {UNTRACED_STEPS} steps, and "
                f"the run has {self.n_steps}; leave it out, or raise token_budget"
            )
        n_updates = getattr(self.activation, "n_updates", 0)
        if n_updates > max(self.n_steps, PAnneal().n_updates):  # the default is for runs of any length
            raise ValueError(
                f"activation.n_updates={n_updates} exceeds the {self.n_steps} steps of the run, and p falls once "
                "a step at most; lower it"
            )
        target = getattr(self.activation, "target_l0", None)
        if target is not None and d_sae is not None and target > d_sae:
            raise ValueError(f"activation.target_l0={target:g} exceeds d_sae={d_sae}; lower it or raise d_sae")

    @property
    def variant_names(self) -> tuple[str, ...]:
        """A name for each dictionary that is trained; of a spec without variants the only one is empty."""
        return tuple(variant.name for variant in self.variants) if self.variants is not None else ("",)

    def variant_specs(self) -> tuple[TrainSpec, ...]:
        """The spec of each dictionary by itself, as if it were trained alone: in the order of variant_names."""
        if self.variants is None:
            return (self,)
        return tuple(_spec_of_variant(self, variant) for variant in self.variants)

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.token_budget // self.batch_size

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps, with the default resolved."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        return min(1000, self.n_steps // 20)

    def resolve_d_sae(self, d_in: int) -> int:
        """Number of features for inputs of width d_in; raises ValueError where it is out of bounds or does not fit."""
        d_sae = self.d_sae if self.d_sae is not None else round(d_in * (self.expansion_factor or 0))
        check_shape(self, d_sae)
        return d_sae

    def resolve_lr(self, d_sae: int) -> float:
        """Peak learning rate, with the default resolved."""
        if self.optimizer.lr is not None:
            return self.optimizer.lr
        long_run = DEFAULT_LR.get(self.activation.kind, 2e-4 / math.sqrt(d_sae / 2**14))
        return max(long_run, min(LARGEST_DEFAULT_LR, long_run * math.sqrt(LONG_RUN_STEPS / self.n_steps)))

    @property
    def beta1(self) -> float:
        """Decay of Adam's first moment, with the default resolved."""
        given = self.optimizer.beta1
        return given if given is not None else DEFAULT_BETAS[self.activation.kind][0]

    @property
    def beta2(self) -> float:
        """Decay of Adam's second moment, with the default resolved."""
        given = self.optimizer.beta2
        return given if given is not None else DEFAULT_BETAS[self.activation.kind][1]


def _spec_of_variant(spec: TrainSpec, variant: TrainVariant) -> TrainSpec:
    activation = variant.activation or spec.activation
    if variant.k is not None:
        if not chooses_k(activation):
            raise ValueError(
                f"variant {variant.name!r}: k={variant.k} is given, and activation {activation.kind!r} has no k; "
                "leave k out, or give the variant an activation that has one (topk, batchtopk, matryoshka)"
            )
        activation = activation.model_copy(update={"k": variant.k})
    changes: dict[str, Any] = {"activation": activation, "variants": None}
    if variant.alignment is not None:
        changes["alignment"] = variant.alignment
    if variant.lr is not None:
        changes["optimizer"] = spec.optimizer.model_copy(update={"lr": variant.lr})
    if variant.seed not in (None, spec.seed):
        changes |= {"seed": variant.seed, "data_seed": spec.seed if spec.data_seed is None else spec.data_seed}
    try:
        return TrainSpec.model_validate({name: getattr(spec, name) for name in TrainSpec.model_fields} | changes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"variant {variant.name!r}: {first.get('ctx', {}).get('error', first['msg'])}"
        if first["type"] == "transcoder_alignment":  # it has a code of its own, which must stay
            raise PydanticCustomError("transcoder_alignment", "{message}", {"message": message}) from None
        raise ValueError(message) from None


def _check_crosscoder(spec: TrainSpec, hook_names: tuple[HookName, ...]) -> None:
    if spec.hook_name is not None or spec.target_hook_name is not None:
        raise ValueError("hook_names (a crosscoder) excludes hook_name and target_hook_name; give one or the other")
    if len(set(hook_names)) != len(hook_names):
        raise ValueError("hook_names lists the same hook twice; name each once")


def check_shape(spec: TrainSpec, d_sae: int) -> None:
    """Raise ValueError where d_sae is out of bounds, k exceeds it, a Matryoshka group is empty or the mesh does not
    divide it.
    """
    if not LEAST_D_SAE <= d_sae <= LARGEST_D_SAE:
        how = "d_sae" if spec.expansion_factor is None else f"expansion_factor={spec.expansion_factor:g} makes d_sae"
        raise ValueError(f"{how}={d_sae}, wanted {LEAST_D_SAE} to {LARGEST_D_SAE}; give another")
    k = getattr(spec.activation, "k", 0)
    if k > d_sae:
        raise ValueError(f"k={k} exceeds d_sae={d_sae}; lower k or raise d_sae")
    if isinstance(spec.activation, Matryoshka):
        spec.activation.group_bounds(d_sae)
    if isinstance(spec.mesh, Mesh) and d_sae % spec.mesh.features:
        below = d_sae - d_sae % spec.mesh.features
        raise ValueError(
            f"mesh.features={spec.mesh.features} does not divide d_sae={d_sae}; "
            f"use d_sae={below or spec.mesh.features} or another number of shards"
        )
