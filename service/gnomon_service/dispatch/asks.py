"""What a job asks of the cluster: the shapes of gangs that it can run on, from its spec and its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gnomon.specs import EvaluateSpec, HarvestSpec, Mesh, TrainSpec
from gnomon_service.dispatch.room import FreeDevices, Shape
from gnomon_workers.sae.costs import choose_mesh
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


def demand_of(
    kind: str,
    spec: Mapping[str, Any],
    hooks: Mapping[str, int],
    *,
    mesh: tuple[int, int] | None,
    empty: FreeDevices,
    device: Device,
) -> Demand:
    """What a job asks for on a cluster with these devices, hooks being those of its store, with their widths.

    mesh: the one that the job had before, which it keeps as long as the cluster can hold it.
    """
    n_devices = max(1, empty.n_devices)
    if kind == "harvest":
        harvest = HarvestSpec.read(spec)
        n_segments = -(-harvest.token_budget // harvest.segment_tokens) + 1  # one of them held out
        return Demand(shapes=(Shape(1),), n_most=min(harvest.n_workers or n_devices, n_segments))
    if kind == "evaluate":
        EvaluateSpec.read(spec)
        n_most = n_devices if device == "gpu" else min(N_EVALUATION_CORES, n_devices)
        return Demand(shapes=tuple(Shape(n) for n in range(n_most, 0, -1)))
    return _training(TrainSpec.read(spec), hooks, mesh=mesh, empty=empty, device=device)


def _training(
    spec: TrainSpec, hooks: Mapping[str, int], *, mesh: tuple[int, int] | None, empty: FreeDevices, device: Device
) -> Demand:
    if mesh is not None and empty.place(Shape(*mesh)) is not None:
        return Demand(shapes=(Shape(*mesh),))
    if isinstance(spec.mesh, Mesh):
        return Demand(shapes=(Shape(spec.mesh.dp, spec.mesh.features),))
    names = spec.hook_names or (spec.hook_name or min(hooks),)
    target = spec.target_hook_name
    d_out = hooks[target] if target is not None and target != names[0] else None
    n_most = max(1, empty.n_devices)
    shapes: list[Shape] = []
    while n_most > 0:
        chosen = choose_mesh(spec, sum(hooks[name] for name in names), n_most, None, d_out=d_out, device=device)
        shapes.append(Shape(chosen.dp, chosen.features))
        n_most = shapes[-1].n_devices - 1
    least = LEAST_SHARE * shapes[0].n_devices
    return Demand(shapes=tuple(shape for shape in shapes if shape.n_devices >= least))
