"""What a user submits: one pydantic model per kind of job, with every limit in the type.

The same models validate a body in the API, build a request in the SDK and travel to the workers, so a spec
that was accepted once needs no second check of its shape.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16"]
Alignment = Literal["orth", "none", "scale", "stopgrad", "tied"]
Url = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]
HookName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.]+$")]
StoreId = Annotated[str, StringConstraints(pattern=r"^act_[0-9a-f]{32}$")]
DictionaryId = Annotated[str, StringConstraints(pattern=r"^dict_[0-9a-z]{26}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^job_[0-9a-z]{26}$")]


class Spec(BaseModel):
    """Base of all specs: immutable, and an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


# ---------------------------------------------------------------------------------------------- harvest


class ModelSource(Spec):
    """Which model to read activations from."""

    source: Url
    """Hub id ("org/name"), folder in Hugging Face layout, or .gguf file; paths as fsspec URLs or plain."""
    revision: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]{1,128}$")] | None = None
    """Hub revision (branch, tag or commit); pinned to a commit when the job is accepted. Hub ids only."""
    dtype: Dtype = "bfloat16"
    """Arithmetic of the forward pass."""


class TextSource(Spec):
    """Where documents come from."""

    url: Url
    """fsspec URL or path of one file, or a pattern with * for several (read in sorted order)."""
    format: Literal["auto", "txt", "jsonl", "json", "parquet"] = "auto"
    """File format; "auto" goes by the file name's ending. A .txt file is one document; .json is a list."""
    field: Annotated[str, StringConstraints(min_length=1, max_length=128)] = "text"
    """Name of the field or column that holds the text (jsonl, json, parquet)."""


class ConcatPacking(Spec):
    """Documents joined end to end and cut into full contexts; nothing is padded."""

    kind: Literal["concat"] = "concat"
    separator: Literal["eos", "bos", "none"] = "eos"
    """Token written after every document."""
    bos: bool = False
    """Begin every context with the tokenizer's BOS token."""


class DocumentPacking(Spec):
    """One document per context, cut to the context length and padded; padding is masked and never stored."""

    kind: Literal["document"] = "document"
    special_tokens: bool = True
    """Let the tokenizer add its own special tokens ([CLS] and [SEP], or BOS)."""


Packing = Annotated[ConcatPacking | DocumentPacking, Field(discriminator="kind")]


class DropPolicy(Spec):
    """Tokens that pass through the model but are not stored: attention sinks would dominate the loss."""

    first_positions: Annotated[int, Field(ge=0, le=1024)] = 1
    """Tokens dropped from the start of every context."""
    special_tokens: bool = True
    """Drop every special token of the tokenizer (BOS, EOS, separators, [CLS])."""


class HarvestSpec(Spec):
    """Run text through a model and store the activations of one or more hooks."""

    kind: Literal["harvest"] = "harvest"
    model: ModelSource
    """The model."""
    text: Annotated[tuple[TextSource, ...], Field(min_length=1, max_length=64)]
    """Documents, read in this order."""
    hooks: Annotated[tuple[HookName, ...], Field(min_length=1, max_length=32)]
    """Module paths whose output is stored, e.g. "model.layers.10"; all are read in one pass."""
    context_length: Annotated[int, Field(ge=8, le=131_072)] = 128
    """Tokens in a context."""
    packing: Packing = ConcatPacking()
    """How documents become contexts."""
    drop: DropPolicy = DropPolicy()
    """Which tokens are not stored."""
    dtype: Dtype = "bfloat16"
    """Stored element type. float16 is not offered: some models exceed its range."""
    token_budget: Annotated[int, Field(ge=256, le=10**13)]
    """Tokens to run through the model at most; the text may end earlier."""
    held_out_every: Annotated[int, Field(ge=2, le=10_000)] = 16
    """Every n-th context is held out: never trained on, used for evaluation."""
    segment_tokens: Annotated[int, Field(ge=1024, le=2**26)] = 65_536
    """Tokens in a segment, the unit of parallel work and of resume (rounded to whole contexts)."""
    batch_contexts: Annotated[int, Field(ge=1, le=4096)] = 8
    """Contexts in one forward pass."""
    n_workers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Harvest workers; None = one per free device or core, at least two where the cluster has them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.hooks)) != len(self.hooks):
            raise ValueError("hooks lists the same hook twice; name each once")
        if self.drop.first_positions >= self.context_length:
            raise ValueError(
                f"drop.first_positions={self.drop.first_positions} leaves nothing of context_length="
                f"{self.context_length}; lower it"
            )
        return self


# ---------------------------------------------------------------------------------------------- train


class StoredActivations(Spec):
    """Activations that were harvested before."""

    kind: Literal["store"] = "store"
    id: StoreId
    """Id of a sealed activation store of this project."""


class AuxK(Spec):
    """Auxiliary loss that lets dead features reconstruct the residual (arXiv:2406.04093)."""

    coefficient: Annotated[float, Field(gt=0, le=10)] = 1 / 32
    """Weight of the auxiliary loss."""
    k: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Dead features used per token; None = the power of two nearest d_in / 2."""


class TopK(Spec):
    """Keep the k largest activations of every token (arXiv:2406.04093)."""

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Active features per token."""
    aux: AuxK | None = None
    """Auxiliary loss; off by default because alignment already keeps features alive."""


class BatchTopK(Spec):
    """Keep the k * batch largest activations of the whole batch (arXiv:2412.06410)."""

    kind: Literal["batchtopk"] = "batchtopk"
    k: Annotated[int, Field(ge=1, le=65_536)] = 32
    """Active features per token, on average."""
    threshold_beta: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the smallest kept activation, the threshold used at inference.

    Early in a run the average forgets faster: its memory is at most a tenth of the steps so far.
    """
    aux: AuxK | None = None
    """Auxiliary loss; off by default because alignment already keeps features alive."""


Activation = Annotated[TopK | BatchTopK, Field(discriminator="kind")]


class Adam(Spec):
    """Adam with gradient clipping; the gradient is clipped after the alignment hook."""

    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate for inputs of unit mean squared norm; None = 2e-4 / sqrt(d_sae / 2^14)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    """Added to the root of the second moment."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; None = no clipping."""


class Schedule(Spec):
    """Linear warm-up, constant, linear decay to zero."""

    warmup_steps: Annotated[int, Field(ge=0, le=10**7)] | None = None
    """Steps of warm-up; None = 1,000, or a twentieth of a run shorter than 20,000 steps."""
    decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the steps, at the end, over which the rate falls to zero."""


class Mesh(Spec):
    """How a gang of ranks divides the work: dp * features ranks."""

    dp: Annotated[int, Field(ge=1, le=1024)] = 1
    """Replicas; each takes batch_size / dp tokens of every step."""
    features: Annotated[int, Field(ge=1, le=1024)] = 1
    """Shards; each holds d_sae / features features."""


class Evaluation(Spec):
    """What is measured on held-out text once a dictionary is trained."""

    n_tokens: Annotated[int, Field(ge=256, le=10**9)] = 65_536
    """Held-out activations to use at most."""
    ce: bool = True
    """Patch the reconstruction into the model and measure the CE loss score and KL (causal models only)."""
    n_ce_tokens: Annotated[int, Field(ge=256, le=10**9)] = 8_192
    """Held-out tokens to use at most for the CE loss score and KL."""


class TrainSpec(Spec):
    """Train one aligned dictionary on harvested activations, then evaluate and publish it."""

    kind: Literal["train"] = "train"
    activations: Annotated[StoredActivations | HarvestSpec, Field(discriminator="kind")]
    """A store by id, or a harvest spec; the service reuses the sealed store of the same harvest."""
    hook_name: HookName | None = None
    """Hook to train on; may be left out where the store has only one."""
    target_hook_name: HookName | None = None
    """Hook to reconstruct instead of the input: a transcoder. None = the input itself."""
    d_sae: Annotated[int, Field(ge=2, le=2**24)] | None = None
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
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initialisation and data order."""
    mesh: Mesh | Literal["auto"] = "auto"
    """Division over ranks; "auto" takes what the cluster has free and d_sae allows."""
    normalize: Literal["mean_squared_norm", "none"] = "mean_squared_norm"
    """Scale inputs to unit mean squared norm; folded back into the exported weights."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    """Initial decoder bias, from a first sample of the activations."""
    dead_after_tokens: Annotated[int, Field(ge=1, le=10**12)] = 10_000_000
    """A feature that has not fired for this many tokens counts as dead."""
    log_every: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Steps between two metrics reports."""
    checkpoint_every: Annotated[int, Field(ge=1, le=10**7)] = 500
    """Steps between two checkpoints."""
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
        if self.target_hook_name not in (None, self.hook_name) and self.alignment != "none":
            raise PydanticCustomError(
                "transcoder_alignment",
                f"alignment={self.alignment!r} is undefined for a transcoder (target_hook_name="
                f"{self.target_hook_name!r}): encoder, decoder live in different spaces; set alignment='none'",
            )
        if isinstance(self.mesh, Mesh) and self.batch_size % self.mesh.dp:
            raise ValueError(
                f"mesh.dp={self.mesh.dp} does not divide batch_size={self.batch_size}; "
                f"use a batch of {self.batch_size - self.batch_size % self.mesh.dp or self.mesh.dp}"
            )
        return self

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
        """Number of features for inputs of width d_in; raises ValueError where k or the mesh does not fit."""
        d_sae = self.d_sae if self.d_sae is not None else round(d_in * (self.expansion_factor or 0))
        check_shape(self, d_sae)
        return d_sae

    def resolve_lr(self, d_sae: int) -> float:
        """Peak learning rate, with the default resolved."""
        return self.optimizer.lr if self.optimizer.lr is not None else 2e-4 / math.sqrt(d_sae / 2**14)


def check_shape(spec: TrainSpec, d_sae: int) -> None:
    """Raise ValueError where k exceeds d_sae or the mesh does not divide it."""
    if spec.activation.k > d_sae:
        raise ValueError(f"k={spec.activation.k} exceeds d_sae={d_sae}; lower k or raise d_sae")
    if isinstance(spec.mesh, Mesh) and d_sae % spec.mesh.features:
        below = d_sae - d_sae % spec.mesh.features
        raise ValueError(
            f"mesh.features={spec.mesh.features} does not divide d_sae={d_sae}; "
            f"use d_sae={below or spec.mesh.features} or another number of shards"
        )


# ---------------------------------------------------------------------------------------------- evaluate


class EvaluateSpec(Spec):
    """Measure a published dictionary on the held-out text of its own store."""

    kind: Literal["evaluate"] = "evaluate"
    dictionary: DictionaryId
    """The dictionary."""
    evaluation: Evaluation = Evaluation()
    """What is measured."""


JobSpec = Annotated[HarvestSpec | TrainSpec | EvaluateSpec, Field(discriminator="kind")]


class JobRequest(Spec):
    """Body of POST /v1/jobs."""

    spec: JobSpec
    """What to do."""
    name: Annotated[str, StringConstraints(max_length=128, pattern=r"^[^\x00-\x1f]*$")] = ""
    """A label for people."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher runs first."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Attempts before infrastructure losses fail the job; an error in the job itself is never retried."""
    deadline_s: Annotated[int, Field(ge=1, le=10**8)] | None = None
    """Seconds from submission after which the job is failed; None = no deadline."""
