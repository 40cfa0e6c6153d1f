"""What REST returns, and what the workers report back: one pydantic model per resource."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from gnomon.specs import JobSpec

JobKind = Literal["harvest", "train", "evaluate"]
JobState = Literal["queued", "scheduled", "running", "succeeded", "failed", "cancelled"]
StoreState = Literal["harvesting", "sealed", "failed"]
Phase = Literal["harvest", "train", "evaluate", "export"]

TERMINAL_STATES: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled"})


class Resource(BaseModel):
    """Base of all resources; a client ignores fields that a newer server adds."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Problem(Resource):
    """Why a job failed, or a request was refused."""

    code: str
    """Stable, for programs."""
    message: str
    """For people: what, got, wanted, next."""


class Progress(Resource):
    """Where a running job is."""

    phase: Phase
    """What it is doing."""
    done: int
    """Units done in this phase."""
    total: int | None = None
    """Units in this phase, where known."""
    unit: str = "tokens"
    """What is counted."""
    rate: float | None = None
    """Units per second, lately."""
    variant: str | None = None
    """Whose phase it is, where a training has variants and the phase is of one alone."""


class HarvestResult(Resource):
    """What a harvest leaves."""

    store_id: str
    n_rows: int
    """Rows to train on."""
    n_held_out_rows: int
    """Rows held out for evaluation."""
    n_tokens: int
    """Tokens that passed through the model, dropped ones included; 0 where every segment was there."""
    tokens_per_s: float | None = None
    """Tokens a second over the whole phase."""


class TrainedDictionary(Resource):
    """One of the dictionaries that a training with variants leaves."""

    dictionary_id: str
    metrics: dict[str, Any]
    """As of a TrainResult."""


class TrainResult(Resource):
    """What training leaves; of one with variants, dictionary_id and metrics are those of the first."""

    dictionary_id: str
    store_id: str
    n_steps: int
    metrics: dict[str, Any]
    """Core metrics on held-out activations, the alignment quantiles, and tokens/s per stage."""
    dictionaries: dict[str, TrainedDictionary] = {}
    """By the variants' names; empty where there are no variants."""


class EvaluateResult(Resource):
    """What an evaluation leaves."""

    dictionary_id: str
    metrics: dict[str, Any]


class Job(Resource):
    """A unit of work in the queue."""

    id: str
    kind: JobKind
    name: str
    state: JobState
    attempt: int
    """Attempts begun; also the fencing token of the current one."""
    max_attempts: int
    priority: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    depends_on: tuple[str, ...] = ()
    """Jobs that must succeed first."""
    progress: Progress | None = None
    error: Problem | None = None
    result: dict[str, Any] | None = None
    """A HarvestResult, TrainResult or EvaluateResult once succeeded."""
    spec: JobSpec
    cancel_requested: bool = False


class Event(Resource):
    """Something that happened to a job; ids grow within a job."""

    id: int
    job_id: str
    attempt: int
    kind: str
    """"state", "phase", "progress", "metrics", "checkpoint", "profile", "segment", "log"."""
    created_at: datetime
    data: dict[str, Any]


class ActivationStore(Resource):
    """Harvested activations of one or more hooks."""

    id: str
    state: StoreState
    job_id: str
    """The harvest that makes or made it."""
    created_at: datetime
    n_rows: int | None = None
    n_held_out_rows: int | None = None
    n_bytes: int | None = None
    hooks: dict[str, int] = {}
    """Hook name -> d_in."""
    location: str
    spec: dict[str, Any]


class Dictionary(Resource):
    """A published dictionary."""

    id: str
    job_id: str
    name: str
    created_at: datetime
    store_id: str
    hook_name: str
    d_in: int
    d_sae: int
    activation: str
    alignment: str
    location: str
    files: dict[str, int]
    """File name -> bytes; each is at /v1/dictionaries/{id}/files/{name}."""
    metrics: dict[str, Any]


class ApiKey(Resource):
    """An API key, without its secret."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewApiKey(ApiKey):
    """A key just made; the only time its text is shown."""

    key: str


class Cluster(Resource):
    """What the dispatcher last saw of the Ray cluster."""

    seen_at: datetime | None = None
    n_cpus: float = 0
    n_gpus: float = 0
    n_nodes: int = 0


T = TypeVar("T")


class Page(Resource, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = None
    """Pass as ?cursor= for the next page; None on the last."""
