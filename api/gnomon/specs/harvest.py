"""Specs of a harvest: which model reads which text, and what of its activations is stored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from gnomon.specs.base import Dtype, HookName, Spec, StoredDtype, Url


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
    max_bad_documents: Annotated[int, Field(ge=0, le=10**12)] = 0
    """Bad documents of this source to pass over and count: not UTF-8, not JSON, without the field, with something that
    is no text in it, or too long. One more ends the job; with 0 the first does."""


class ConcatPacking(Spec):
    """Documents joined end to end and cut into full contexts; nothing is padded."""

    kind: Literal["concat"] = "concat"
    separator: Literal["eos", "bos", "none"] = "eos"
    """Token written after every document."""
    bos: bool | Literal["auto"] = "auto"
    """Begin every context with the tokenizer's BOS token; "auto" where the tokenizer begins texts with it by itself,
    for a model that was trained with it is another one without."""


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
    dtype: StoredDtype = "bfloat16"
    """Stored element type. "int8" takes half the disk of bfloat16: each row is rounded to 255 steps of a scale of its
    own, and the store's manifest says what that cost. float16 is not offered: some models exceed its range."""
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
        if isinstance(self.packing, ConcatPacking) and self.token_budget < self.context_length:
            raise ValueError(
                f"token_budget={self.token_budget} is less than one context of {self.context_length} tokens; "
                "raise token_budget or lower context_length"
            )
        if self.drop.first_positions >= self.context_length:
            raise ValueError(
                f"drop.first_positions={self.drop.first_positions} leaves nothing of context_length="
                f"{self.context_length}; lower it"
            )
        return self
