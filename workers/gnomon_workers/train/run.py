"""A train job resolved against its store and the cluster: what the parts of the job are told, for each dictionary."""

from __future__ import annotations

from dataclasses import dataclass

from gnomon.errors import InvalidRequest
from gnomon.specs import Mesh, TrainSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.location import Location
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.protocol import Assignment, dictionary_ids
from gnomon_workers.sae.plan import HookRows, TrainPlan, choose_mesh, make_hook, make_joint_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """One dictionary of an attempt at a train job, with its spec resolved."""

    assignment: Assignment
    variant: str
    """Its name among the job's variants; empty where there are none."""
    dictionary_id: str
    spec: TrainSpec
    """As if it were trained alone."""
    store: ActivationStore
    plan: TrainPlan
    root: Location

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Hooks whose activations are read, joined in this order."""
        return tuple(hook.name for hook in self.plan.hooks)

    @property
    def checkpoints(self) -> Location:
        """Checkpoints of all attempts of the job; of each variant by themselves."""
        folder = self.root.child("checkpoints", self.assignment.job_id)
        return folder.child(self.variant) if self.variant else folder

    @property
    def profile(self) -> Location:
        """The trace of this attempt, where the job asks for one."""
        return self.root.child("profiles", self.assignment.job_id, f"attempt-{self.assignment.attempt:04d}.json.gz")

    @property
    def dictionary(self) -> Location:
        """Folder of the dictionary that is published, with one folder for each attempt that got so far."""
        return self.root.child("dictionaries", self.dictionary_id)


def resolve_all(assignment: Assignment) -> tuple[TrainRun, ...]:
    """Resolve a train job against its store and the cluster: a run for each variant, or one."""
    spec = TrainSpec.model_validate(assignment.spec)
    root = Location.open(assignment.storage_root)
    store = ActivationStore.open(root.child("activations", assignment.store_id))
    inputs, target = hooks_of(spec, store)
    mesh = _mesh_of(spec, spec.resolve_d_sae(sum(hook.width for hook in inputs)))
    assert assignment.dictionary_id is not None
    names, specs = spec.variant_names, spec.variant_specs()
    return tuple(
        TrainRun(
            assignment=assignment,
            variant=name,
            dictionary_id=dictionary_id,
            spec=its_spec,
            store=store,
            plan=make_joint_plan(its_spec, inputs=inputs, target=target, mesh=mesh),
            root=root,
        )
        for name, dictionary_id, its_spec in zip(
            names, dictionary_ids(assignment.dictionary_id, len(names)), specs, strict=True
        )
    )


def _mesh_of(spec: TrainSpec, d_sae: int) -> Mesh:
    devices = Devices.of_cluster()
    mesh = choose_mesh(spec, d_sae=d_sae, n_ranks=devices.n_members)
    if mesh.dp * mesh.features > devices.n_members:
        raise InvalidRequest(
            f"mesh {mesh.dp} x {mesh.features} needs {mesh.dp * mesh.features} "
            f"{'GPUs' if devices.use_gpu else 'cores'}, the cluster has {devices}",
            code="mesh_does_not_fit",
        )
    return mesh


def hooks_of(spec: TrainSpec, store: ActivationStore) -> tuple[tuple[HookRows, ...], HookRows | None]:
    """The hooks that a spec reads from a store, and the one that a transcoder reconstructs, if it is another."""
    known = store.manifest.hooks

    def hook(name: str) -> HookRows:
        if name not in known:
            raise InvalidRequest(f"the store has no hook {name!r}; it has {', '.join(known)}", code="unknown_hook")
        return make_hook(spec, name, known[name].d_in, known[name].mean_squared_norm)

    names = spec.hook_names or (spec.hook_name or next(iter(known)),)
    target = spec.target_hook_name
    return tuple(map(hook, names)), hook(target) if target is not None and target != names[0] else None
