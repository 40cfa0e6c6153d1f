"""What a job asks of the cluster: the shapes of gangs that it can run on, from its spec and its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gnomon.errors import InvalidRequest
from gnomon.specs import EvaluateSpec, HarvestSpec, Mesh, TrainSpec
from gnomon_service.dispatch.room import FreeDevices, Shape
from gnomon_workers.sae.costs import TrainJob, meshes_that_pay, smallest_that_holds
from gnomon_workers.sae.shape import Device

N_EVALUATION_CORES: Final = 4
"""An evaluation on cores takes at most so many: each of its workers has the whole model in memory."""
LEAST_SHARE: Final = 0.5
"""Of what pays for a training whose mesh is "auto", it begins with no less: it keeps what it begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a job can run on."""

    shapes: tuple[Shape, ...]
    """Preferred first; of an elastic job the least."""
    n_most: int | None = None
    """Of an elastic job, the devices it can make use of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a cluster has, all of it free."""

    empty: FreeDevices
    device: Device
    memory_bytes: float | None
    """Of a device; None where it is not known."""


def demand_of(
    kind: str,
    spec: Mapping[str, Any],
    hooks: Mapping[str, int],
    *,
    mesh: tuple[int, int] | None,
    capacity: Capacity,
) -> Demand:
    """What a job asks for on a cluster of this capacity, hooks being those of its store, with their widths.

    mesh: the one that the job had before, which it keeps as long as the cluster can hold it.
    """
    n_devices = max(1, capacity.empty.n_devices)
    if kind == "harvest":
        harvest = HarvestSpec.read(spec)
        n_segments = -(-harvest.token_budget // harvest.segment_tokens) + 1  # one of them held out
        return Demand(shapes=(Shape(1),), n_most=min(harvest.n_workers or n_devices, n_segments))
    if kind == "evaluate":
        EvaluateSpec.read(spec)
        n_most = n_devices if capacity.device == "gpu" else min(N_EVALUATION_CORES, n_devices)
        return Demand(shapes=tuple(Shape(n) for n in range(n_most, 0, -1)))
    return _training(TrainSpec.read(spec), hooks, mesh=mesh, capacity=capacity)


def _training(spec: TrainSpec, hooks: Mapping[str, int], *, mesh: tuple[int, int] | None, capacity: Capacity) -> Demand:
    if mesh is not None and capacity.empty.place(Shape(*mesh)) is not None:
        return Demand(shapes=(Shape(*mesh),))
    if isinstance(spec.mesh, Mesh):
        return Demand(shapes=(Shape(spec.mesh.dp, spec.mesh.features),))
    names = spec.hook_names or (spec.hook_name or min(hooks),)
    target = spec.target_hook_name
    d_out = hooks[target] if target is not None and target != names[0] else None
    job = TrainJob.of(spec, sum(hooks[name] for name in names), d_out=d_out, device=capacity.device)
    shapes = [Shape(mesh.dp, mesh.features) for mesh in _meshes(job, capacity)]
    least = LEAST_SHARE * shapes[0].n_devices
    return Demand(shapes=tuple(shape for shape in shapes if shape.n_devices >= least))


def _meshes(job: TrainJob, capacity: Capacity) -> list[Mesh]:
    """Those that pay; where the cluster has too little memory one that is larger, which waits until there is more."""
    try:
        return list(meshes_that_pay(job, max(1, capacity.empty.n_devices), capacity.memory_bytes))
    except InvalidRequest:
        assert capacity.memory_bytes is not None
        return [smallest_that_holds(job, capacity.memory_bytes)]
