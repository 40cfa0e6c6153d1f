"""What REST returns, and what the workers report back: one pydantic model per resource.

What comes from elsewhere is taken by `read`, so that a newer server may send fields that this release does not know.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from gnomon.events import TERMINAL_STATES, EventData, JobState, Progressed, read_event
from gnomon.metrics import DictionaryMetrics
from gnomon.specs import AnySpec, Mesh
from gnomon.specs.base import Document

__all__ = [
    "TERMINAL_STATES",
    "ActivationStoreRecord",
    "ApiKey",
    "ClusterState",
    "Collection",
    "DictionaryRecord",
    "DictionaryState",
    "EvaluateResult",
    "Event",
    "HarvestResult",
    "HarvestedOn",
    "Job",
    "JobError",
    "JobKind",
    "JobState",
    "NewApiKey",
    "NodeState",
    "Page",
    "ProjectState",
    "QueuePlace",
    "Remaining",
    "Removable",
    "StoreState",
    "TrainResult",
    "TrainedDictionary",
    "TrainedOn",
    "UnknownResult",
]

JobKind = Literal["harvest", "train", "evaluate"]
StoreState = Literal["harvesting", "sealed", "failed", "deleting", "deleted"]
DictionaryState = Literal["published", "deleting", "deleted"]


class JobError(Document):
    """Why a job failed."""

    code: str
    """Stable, for programs."""
    message: str
    """For people: what, got, wanted, next."""


class HarvestedOn(Document):
    """What the last attempt at a harvest ran on: plans of others are learned from it."""

    device: Literal["cpu", "gpu"] | str
    n_workers: int
    n_parameters: int
    """Of the model."""


class HarvestResult(Document):
    """What a harvest leaves."""

    store_id: str
    n_rows: int
    """Rows to train on."""
    n_held_out_rows: int
    """Rows held out for evaluation."""
    n_tokens: int
    """Tokens that passed through the model, dropped ones included; 0 where every segment was there."""
    n_bad_documents: int | None = None
    """Documents that were passed over (`max_bad_documents`); None where the store was there before the job."""
    bad_documents: tuple[str, ...] = ()
    """Where the first of them are, and what is wrong with them."""
    tokens_per_s: float | None = None
    """Tokens a second over the whole phase."""
    run: HarvestedOn | None = None
    """None where every segment was there."""


class TrainedDictionary(Document):
    """One of the dictionaries that a training with variants leaves."""

    dictionary_id: str
    metrics: DictionaryMetrics
    """As of a TrainResult."""


class TrainedOn(Document):
    """What the last attempt at a training ran on, and how fast: plans of others are learned from it."""

    mesh: Mesh
    device: Literal["cpu", "gpu"] | str
    """What every rank had one of."""
    d_in: int
    d_out: int | None = None
    """Width of a transcoder's target."""
    tokens_per_s: float
    """While its steps were made, without the start."""
    peak_memory_bytes: int | None = None
    """Most memory that rank 0 ever held."""


class TrainResult(Document):
    """What training leaves; of one with variants, dictionary_id and metrics are those of the first."""

    dictionary_id: str
    store_id: str
    n_steps: int
    metrics: DictionaryMetrics
    """What is known of the dictionary: on held-out activations, and from its weights."""
    dictionaries: dict[str, TrainedDictionary] = Field(default_factory=dict)
    """By the variants' names; empty where there are no variants."""
    run: TrainedOn | None = None
    """None where all steps were made by attempts of an earlier release, or before the last one."""


class EvaluateResult(Document):
    """What an evaluation leaves."""

    dictionary_id: str
    metrics: DictionaryMetrics


class UnknownResult(Document):
    """The result of a job of a kind that this release does not know."""

    fields: dict[str, Any]
    """What it says, unread."""


class QueuePlace(Document):
    """Where a job is in the queue, and why it is not started."""

    position: int | None = None
    """1 = the next one; None where it waits for something else than room, or behind very many."""
    ahead: tuple[str, ...] = ()
    """The last jobs ahead of it."""
    code: str
    """Why, for programs; docs/rest.md lists them."""
    message: str
    """Why, for people."""


class Remaining(Document):
    """How long something will still take."""

    expected: float
    least: float
    most: float
    """Seconds, as if it went on at its last rate, at its best and at its worst."""


class Job(Document):
    """A unit of work in the queue."""

    id: str
    kind: JobKind | str
    name: str
    state: JobState | str
    attempt: int
    """Attempts begun; also the fencing token of the current one."""
    max_attempts: int
    """Losses in a row, with nothing committed among them, after which the job fails."""
    n_losses: int = 0
    """Losses of machines in a row since the job committed anything."""
    job_class: str = "normal"
    priority: int
    queue: QueuePlace | None = None
    """Of a queued job, its place and why it waits; None as long as no dispatcher has looked at it."""
    paused_by: str | None = None
    """The key that paused it; it waits until it is resumed."""
    leave_why: str | None = None
    """Why its attempt was asked to save what it has and leave; it is then queued again, at no cost of an attempt."""
    n_devices: int = 0
    """Devices that it holds."""
    mesh: tuple[int, int] | None = None
    """(dp, features) of a training, fixed by its first attempt."""
    remaining_s: Remaining | None = None
    """Of a running job, what its present phase will still take."""
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    depends_on: tuple[str, ...] = ()
    """Jobs that must succeed first."""
    made_for: str | None = None
    """Of a harvest that nobody asked for by itself: the job that needs it."""
    progress: Progressed | None = None
    """Where a running job is."""
    error: JobError | None = None
    result: dict[str, Any] | None = None
    """A HarvestResult, TrainResult or EvaluateResult once succeeded."""
    spec: AnySpec
    cancel_requested: bool = False


class Event(Document):
    """Something that happened to a job; ids grow within a job."""

    id: int
    job_id: str
    attempt: int
    kind: str
    """"state", "phase", "progress", "metrics", "checkpoint", "profile", "segment", "log"."""
    created_at: datetime
    data: dict[str, Any]
    """What it tells, as JSON."""

    @property
    def told(self) -> EventData:
        """What it tells, as the model of its kind in gnomon.events; an UnknownEvent where this release knows none."""
        return read_event(self.kind, self.data)


class ActivationStoreRecord(Document):
    """Harvested activations of one or more hooks."""

    id: str
    state: StoreState | str
    job_id: str
    """The harvest that makes or made it."""
    created_at: datetime
    n_rows: int | None = None
    n_held_out_rows: int | None = None
    n_bytes: int | None = None
    hooks: dict[str, int] = Field(default_factory=dict)
    """Hook name -> d_in."""
    location: str
    spec: dict[str, Any]
    deleted_why: str | None = None
    """Who or what had it deleted, and when it was last."""


class DictionaryRecord(Document):
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
    metrics: DictionaryMetrics
    state: DictionaryState | str = "published"
    """A dictionary that is "deleting" can be had, and restored, until `purge_at`."""
    deleted_why: str | None = None
    purge_at: datetime | None = None
    """From then on its files are deleted."""


class Removable(Document):
    """Something in the store that is deleted, or will be unless it is used."""

    kind: Literal["leftovers", "store", "dictionary"] | str
    """"leftovers": a job's checkpoints, segments and files that became no dictionary."""
    id: str
    """Of the job, store or dictionary."""
    why: str
    at: datetime | None = None
    """When it was deleted, or may be; None = its deletion has begun."""
    n_bytes: int | None = None
    """None where nobody has counted."""


class Collection(Document):
    """What the collector deletes of a project, and what it deleted last."""

    collected_at: datetime | None = None
    """When a dispatcher last looked; None = never."""
    upcoming: list[Removable] = Field(default_factory=list)
    """Soonest first, at most 1,000."""
    removed: list[Removable] = Field(default_factory=list)
    """Of all projects' last few hundred, this project's; newest first."""


class ApiKey(Document):
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


class NodeState(Document):
    """A machine of the cluster."""

    id: str
    name: str
    n_cpus: float
    n_gpus: float
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    """Of one of its GPUs; None where it has none, or that is not known."""
    drained_by: str | None = None
    """The key that drains it: what runs there leaves, and nothing is started."""


class ClusterState(Document):
    """What the dispatcher last saw of the Ray cluster."""

    seen_at: datetime | None = None
    n_cpus: float = 0
    n_gpus: float = 0
    n_nodes: int = 0
    nodes: tuple[NodeState, ...] = ()
    drained_by: str | None = None
    """The key that drains it: what runs is finished, and nothing is started."""


class ProjectState(Document):
    """What a project is owed of the cluster, and what it may take."""

    name: str
    weight: float = 1.0
    """Against those of other projects with work: its share of the devices."""
    n_jobs_most: int | None = None
    """Jobs that may run at once; None = any number."""
    n_devices_most: int | None = None
    """Devices that they may hold."""
    n_store_bytes_most: int | None = None
    """Bytes of its activation stores: above them, those that were not used for longest are deleted."""
    held_by: str | None = None
    """The key that holds it: nothing of it is started."""


T = TypeVar("T")


class Page(Document, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = None
    """Pass as ?cursor= for the next page; None on the last."""
