"""A train job resolved against its store and the cluster: what the parts of the job are told."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from gnomon.errors import InvalidRequest
from gnomon.specs import TrainSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.protocol import Assignment
from gnomon_workers.train.plan import TrainPlan, choose_mesh, make_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """One attempt at a train job, with its spec resolved."""

    assignment: Assignment
    spec: TrainSpec
    store: ActivationStore
    hook_name: str
    plan: TrainPlan
    root: Location

    @property
    def checkpoints(self) -> Location:
        """Checkpoints of all attempts of the job."""
        return self.root.child("checkpoints", self.assignment.job_id)

    @property
    def dictionary(self) -> Location:
        """Folder of the dictionary that the job publishes, with one folder for each attempt that got so far."""
        assert self.assignment.dictionary_id is not None
        return self.root.child("dictionaries", self.assignment.dictionary_id)


def resolve(assignment: Assignment) -> TrainRun:
    """Resolve a train job against its store and the cluster."""
    spec = TrainSpec.model_validate(assignment.spec)
    root = Location.open(assignment.storage_root)
    store = ActivationStore.open(root.child("activations", assignment.store_id))
    hook_name = spec.hook_name or next(iter(store.manifest.hooks))
    d_in = store.manifest.hooks[hook_name].d_in
    mesh = choose_mesh(spec, d_sae=spec.resolve_d_sae(d_in), n_ranks=_n_ranks())
    if mesh.dp * mesh.features > _n_ranks():
        raise InvalidRequest(
            f"mesh {mesh.dp} x {mesh.features} needs {mesh.dp * mesh.features} devices, the cluster has {_n_ranks()}",
            code="mesh_does_not_fit",
        )
    plan = make_plan(spec, d_in=d_in, mesh=mesh, mean_squared_norm=store.manifest.hooks[hook_name].mean_squared_norm)
    return TrainRun(assignment=assignment, spec=spec, store=store, hook_name=hook_name, plan=plan, root=root)


def _n_ranks() -> int:
    """Ranks the cluster can hold: one for each GPU, or for each core where there is none."""
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0) or resources.get("CPU", 0))
