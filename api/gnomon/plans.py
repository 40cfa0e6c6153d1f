"""What a job would be, told before it is queued: what it makes anew, what it takes, and how long."""

from __future__ import annotations

from typing import Literal

from gnomon.specs import Mesh
from gnomon.specs.base import Document


class Duration(Document):
    """How long a part of a job would take, while it runs."""

    tokens_per_s: float
    """Tokens a second of all ranks or workers together."""
    hours: float
    """Of all its tokens at that rate; starting, evaluating and exporting come on top."""
    error: float
    """How far off the rate may be, relative: .25 is a quarter more or less, 1 half or twice as much."""
    n_jobs: int
    """Finished jobs that it was learned from; 0 where none is near, and the rate is that of a documented machine."""
    device_hours: float
    """Hours of all GPUs, or of all cores where there are none."""
    cost: float | None = None
    """device_hours at the price that the operator set, in `currency` of the plan; None where none is set."""


class MemoryPlan(Document):
    """The most memory of one rank, in the phase in which it is most."""

    n_bytes: int
    """All parts together."""
    parts: dict[str, int]
    """Bytes by what they are for: weights, moments, gradients, pre_activations, batch, selection, exchange, loader
    (main memory alone, of a rank on a core) and process."""
    phase: str
    """"initialise", "step"; "dense", while most features are active, and "sparse", as soon as few are."""
    variant: str | None = None
    """Whose phase it is, where there are variants."""


class MeshPlan(Document):
    """A mesh that the cluster holds, and what it gives."""

    mesh: Mesh
    n_ranks: int
    memory: MemoryPlan
    fits: bool | None = None
    """Whether a rank is expected to have that memory; None where the memory of the nodes is not known."""
    training: Duration


class HarvestPlan(Document):
    """A harvest that the job would make or wait for."""

    n_tokens: int
    """Tokens that would pass through the model."""
    n_workers: int
    running: Duration


class DiskPlan(Document):
    """Bytes that the job would write."""

    store_bytes: int | None = None
    """Of the activation store, as it is where it is sealed; None where the width of a hook is not known."""
    checkpoint_bytes: int | None = None
    """Of one checkpoint of all variants."""
    checkpoints_kept_bytes: int | None = None
    """Of the checkpoints that are kept while the job runs; once it succeeded there are none."""
    checkpoints_peak_bytes: int | None = None
    """The same while another is written."""
    dictionary_bytes: int | None = None
    """Of what is published, all variants together."""


class JobPlan(Document):
    """What a job would be; nothing was queued."""

    kind: str
    store_id: str
    """The store that would be harvested, trained on or evaluated against."""
    reuses: Literal["sealed_store", "harvest_under_way", "nothing"] | str
    """What of its activations exists already."""
    job_id: str | None = None
    """The harvest that made or makes them."""
    n_rows: int | None = None
    """Rows to train on."""
    disk: DiskPlan
    harvest: HarvestPlan | None = None
    """None where nothing would be harvested."""
    device: Literal["cpu", "gpu"] | str
    """What ranks and workers get one of each."""
    n_devices: int
    """Of the whole cluster, as it was last seen; 0 where it never was."""
    meshes: tuple[MeshPlan, ...] = ()
    """Of a training: those that the cluster holds, at most MOST_MESHES of them, the smallest first."""
    mesh: Mesh | None = None
    """The mesh that it would run on: the spec's, or what "auto" would take."""
    why: str | None = None
    """Why this one."""
    currency: str | None = None
    """Of every `cost`."""

    @property
    def chosen(self) -> MeshPlan | None:
        """What is planned for the mesh that it would run on."""
        return next((plan for plan in self.meshes if plan.mesh == self.mesh), None)
