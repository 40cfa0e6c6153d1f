"""What an activation store says of itself, on disk: one commit for each segment, and one manifest over all of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gnomon.errors import CorruptArtifact
from gnomon.specs import StoredDtype
from gnomon_storage.digests import combine

Split: TypeAlias = Literal["segments", "held_out"]
Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count: TypeAlias = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of the stored documents."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class StoredFile(Record):
    """One file of a segment's Zarr folder."""

    n_bytes: Count
    sha256: Digest


class HookSums(Record):
    """Sums over a segment's rows, in float64: sums travel, ratios do not."""

    total: tuple[float, ...]
    """Sum of the rows, (d_in,)."""
    squared_norm: float
    """Sum of the rows' squared norms."""
    squared_error: float | None = None
    """Sum of the squared distances between the rows and what the model gave, before it was rounded to be stored; None
    where that was not measured."""


class SegmentCommit(Record):
    """Makes one segment part of the store; written create-only, so the first attempt to finish it wins."""

    name: str
    """part-00042"""
    split: Split
    index: Count
    attempt: Count
    life: Count = 0
    """Workers that the attempt had lost and replaced before the one that wrote the segment began."""
    n_rows: Count
    n_contexts: Count
    n_tokens: Count
    """Tokens that passed through the model, dropped ones and held-in padding excluded."""
    chunk_rows: Annotated[int, Field(ge=1)]
    files: dict[str, StoredFile]
    """Every file of the Zarr folder, by relative path."""
    sums: dict[str, HookSums]
    """By hook name."""

    @property
    def path(self) -> str:
        """The segment's Zarr folder, relative to the store."""
        return segment_path(self.split, self.index, self.attempt, self.life)


class SegmentInfo(Record):
    """A segment as the manifest lists it; its commit holds the digests of its files."""

    name: str
    split: Split
    index: Count
    path: str
    """Zarr folder, relative to the store."""
    n_rows: Count
    n_contexts: Count
    n_bytes: Count
    chunk_rows: Annotated[int, Field(ge=1)]
    commit_sha256: Digest


class HookInfo(Record):
    """One hook of a store."""

    d_in: Annotated[int, Field(ge=1)]
    mean: tuple[float, ...]
    """Mean of the rows to train on, (d_in,)."""
    mean_squared_norm: float
    """Mean of their squared norms."""
    rounding_error: float | None = None
    """Mean squared distance of the rows from what the model gave, as a share of their variance: what no dictionary can
    explain. None where it was not measured."""


class Manifest(Record):
    """Seals a store: it is whole if and only if this document is there and its digest is right."""

    format: Literal["gnomon-activations"] = "gnomon-activations"
    version: Literal[1] = 1
    store_id: str
    spec: dict[str, Any]
    """The harvest spec."""
    hooks: dict[str, HookInfo]
    dtype: StoredDtype
    context_length: Annotated[int, Field(ge=1)]
    n_rows: Count
    n_held_out_rows: Count
    n_tokens: Count
    """Tokens that passed through the model."""
    n_bytes: Count
    packing: dict[str, Any]
    drop: dict[str, Any]
    model: dict[str, Any]
    """Where the model came from: source, kind, revision, fingerprint, class."""
    tokenizer: dict[str, Any]
    """Its special tokens and size."""
    text: dict[str, Any]
    """Where the text came from: sources and fingerprint."""
    versions: dict[str, str]
    """Of the packages that took part."""
    segments: tuple[SegmentInfo, ...]
    """Both splits; training segments first, each in order of index."""
    digest: str = ""
    """SHA-256 of everything above."""

    def split(self, split: Split) -> tuple[SegmentInfo, ...]:
        """Segments of one split, in order."""
        return tuple(segment for segment in self.segments if segment.split == split)

    def sealed(self) -> Manifest:
        """The same with its digest."""
        return self.model_copy(update={"digest": combine(self.model_dump(mode="json", exclude={"digest"}))})


def segment_name(index: int) -> str:
    """Name of a segment within its split."""
    return f"part-{index:05d}"


def segment_path(split: Split, index: int, attempt: int, life: int = 0) -> str:
    """Zarr folder of a segment; attempt and life in it keep a stale worker away from a live one's files."""
    written_by = f"a{attempt:04d}" + (f".l{life:04d}" if life else "")
    return f"{split}/{segment_name(index)}.{written_by}.zarr"


def parse_manifest(data: bytes, url: str) -> Manifest:
    """The manifest in a file; raises CorruptArtifact where it is damaged."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptArtifact(
            f"manifest {url} is damaged: {_first(error)}; delete the store and harvest it again"
        ) from error
    # over what is written, and not over what is known: a newer release may have written more
    if manifest.digest != combine({name: value for name, value in json.loads(data).items() if name != "digest"}):
        raise CorruptArtifact(f"manifest {url} was changed after it was written; delete the store and harvest it again")
    return manifest


def parse_commit(data: bytes, url: str) -> SegmentCommit:
    """The commit in a file; raises CorruptArtifact where it is damaged."""
    try:
        return SegmentCommit.model_validate_json(data)
    except ValidationError as error:
        raise CorruptArtifact(
            f"commit {url} is damaged: {_first(error)}; delete the store and harvest it again"
        ) from error


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
