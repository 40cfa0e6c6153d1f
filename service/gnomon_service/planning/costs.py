"""What a training costs on each mesh that the cluster holds: memory, time and money."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

from gnomon.plans import Duration, MemoryPlan, MeshPlan
from gnomon.resources import ClusterState
from gnomon.specs import Mesh
from gnomon_service.planning.rates import Rate, TrainingRates
from gnomon_service.settings import Settings
from gnomon_workers.runtime.protocol import device_memory_bytes
from gnomon_workers.sae.costs import Choice, TrainJob, check_fits, n_ranks, pay
from gnomon_workers.sae.shape import Device

MOST_MESHES: Final = 24
"""Meshes that a plan lists."""
_HOUR_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where ranks and workers can be, one in each place."""

    n_places: int
    what: Literal["GPUs", "CPUs"]
    memory_bytes_per_place: float | None = None
    """Of the GPU, or a core's share of its node's memory, on the node that has most; None where it is not known."""
    n_on_a_node: int | None = None
    """Places on the largest node; None where nodes are not known."""

    @classmethod
    def of(cls, cluster: ClusterState) -> Self | None:
        """That of the cluster as it was last seen; None if it never was."""
        if cluster.seen_at is None:
            return None
        uses_gpus = cluster.n_gpus > 0
        on_nodes = [int(node.n_gpus if uses_gpus else node.n_cpus) for node in cluster.nodes]
        return cls(
            n_places=int(cluster.n_gpus if uses_gpus else cluster.n_cpus),
            what="GPUs" if uses_gpus else "CPUs",
            memory_bytes_per_place=device_memory_bytes(cluster.nodes, uses_gpus=uses_gpus),
            n_on_a_node=max(on_nodes, default=None),
        )

    @property
    def device(self) -> Device:
        """What is in a place."""
        return "gpu" if self.what == "GPUs" else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What an hour of a device costs, where the operator said so."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None
    currency: str | None = None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Those of the settings."""
        return cls(gpu_hour=settings.price_gpu_hour, cpu_hour=settings.price_cpu_hour, currency=settings.currency)

    def duration(self, rate: Rate, n_tokens: int, n_devices: int, device: str) -> Duration:
        """How long so many tokens take at a rate, and what that costs on so many devices."""
        hours = n_tokens / rate.tokens_per_s / _HOUR_S
        price = self.gpu_hour if device == "gpu" else self.cpu_hour
        return Duration(
            tokens_per_s=rate.tokens_per_s,
            hours=hours,
            error=rate.error,
            n_jobs=rate.n_jobs,
            device_hours=hours * n_devices,
            cost=None if price is None else hours * n_devices * price,
        )


def choose(job: TrainJob, room: Room | None) -> Choice:
    """The mesh that a training would run on, and why.

    Raises InvalidRequest, "does_not_fit", where weights and moments alone exceed the memory of a place.
    """
    if room is None:
        if isinstance(job.spec.mesh, Mesh):
            return Choice(mesh=job.spec.mesh, why="the spec says so")
        return Choice(mesh=Mesh(), why="no cluster was seen yet: the mesh is chosen when the job begins")
    if isinstance(job.spec.mesh, Mesh):
        check_fits(job, job.spec.mesh, room.memory_bytes_per_place)
        return Choice(mesh=job.spec.mesh, why="the spec says so")
    return pay(job, room.n_places, room.memory_bytes_per_place)


def mesh_plans(job: TrainJob, chosen: Mesh, room: Room | None, rates: TrainingRates, prices: Prices) -> list[MeshPlan]:
    """The chosen mesh and others that the room holds, the smallest first: of many, the fastest of each size."""
    meshes = job.meshes(room.n_places) if room is not None else []
    if len(meshes) > MOST_MESHES:
        fastest: dict[int, Mesh] = {}
        for mesh in sorted(meshes, key=job.step_seconds):
            fastest.setdefault(n_ranks(mesh), mesh)
        meshes = sorted(fastest.values(), key=n_ranks)
        step = -(-len(meshes) // MOST_MESHES)
        meshes = meshes[::-1][::step][::-1]
    listed = sorted({*meshes, chosen}, key=lambda mesh: (n_ranks(mesh), mesh.dp))
    return [_mesh_plan(job, mesh, room, rates, prices) for mesh in listed]


def _mesh_plan(job: TrainJob, mesh: Mesh, room: Room | None, rates: TrainingRates, prices: Prices) -> MeshPlan:
    memory = job.memory(mesh)
    available = room.memory_bytes_per_place if room is not None else None
    n_tokens = job.spec.n_steps * job.spec.batch_size
    return MeshPlan(
        mesh=mesh,
        n_ranks=n_ranks(mesh),
        memory=MemoryPlan(
            n_bytes=memory.n_bytes, parts=memory.parts, phase=memory.phase, variant=memory.variant or None
        ),
        fits=None if available is None else memory.n_bytes <= available,
        training=prices.duration(rates.of(job, mesh), n_tokens, n_ranks(mesh), job.device),
    )
