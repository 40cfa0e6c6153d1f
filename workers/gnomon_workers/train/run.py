"""A train job resolved against its store and the cluster: what all parts of the job are told, and all of its ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from gnomon.errors import GnomonError, InvalidRequest
from gnomon.specs import Mesh, TrainSpec
from gnomon_storage.activations import ActivationStore
from gnomon_storage.layout import ProjectLayout
from gnomon_storage.location import Location
from gnomon_storage.rows import raw_dtype
from gnomon_workers.checkpoints.format import Checkpoint, committed_checkpoints
from gnomon_workers.runtime.devices import Devices
from gnomon_workers.runtime.protocol import Assignment, dictionary_ids
from gnomon_workers.sae.costs import choose_mesh
from gnomon_workers.sae.memory import Rows
from gnomon_workers.sae.plan import HookRows, TrainPlan, make_hook, make_joint_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One dictionary that a job trains: the only one, or one of its variants."""

    plan: TrainPlan
    checkpoints: Location
    """Folder of its checkpoints, those of all attempts."""
    dictionary: Location
    """Folder of the dictionary that is published, with one folder for each attempt that got so far."""
    variant: str = ""
    """Its name among the job's variants; empty where there are none."""
    resume: Checkpoint | None = None
    """What it goes on from; of the same step for all that are trained together."""

    @property
    def dictionary_id(self) -> str:
        """Id of the dictionary that is published."""
        return self.dictionary.name

    @property
    def first_step(self) -> int:
        """The step that it goes on with."""
        return self.resume.step if self.resume is not None else 0

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let an error say of which variant it is."""
        try:
            yield
        except GnomonError as error:
            if self.variant:
                error.message = f"variant {self.variant!r}: {error.message}"
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """One attempt at a train job."""

    assignment: Assignment
    trainings: tuple[Training, ...]
    """At least one; their plans differ in what a variant may change."""
    store: Location
    """The activation store that is read."""
    profile: Location
    """The trace that rank 0 writes, where the job asks for one."""

    @property
    def plan(self) -> TrainPlan:
        """The first training's, for what all of them share: batches, steps, mesh, hooks and the order of the data."""
        return self.trainings[0].plan

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Hooks whose activations are joined, in this order, into the rows that are read."""
        return tuple(hook.name for hook in self.plan.hooks)

    def resumed(self, checkpoints: Sequence[Checkpoint]) -> TrainRun:
        """The same run, going on from checkpoints of one step, one for each training."""
        trainings = [replace(t, resume=checkpoint) for t, checkpoint in zip(self.trainings, checkpoints, strict=True)]
        return replace(self, trainings=tuple(trainings))


def resolve(assignment: Assignment) -> TrainRun:
    """Resolve a train job against its store and the cluster, with a training for each variant, or one."""
    spec = TrainSpec.read(assignment.spec)
    places = ProjectLayout.open(assignment.storage_root)
    store = places.store(assignment.store_id)
    activations = ActivationStore.open(store)
    if activations.manifest.n_rows < spec.batch_size:
        raise InvalidRequest(
            f"the store has {activations.manifest.n_rows} rows to train on, less than one batch of {spec.batch_size}; "
            "harvest more, or lower batch_size",
            code="store_too_small",
        )
    inputs, target = hooks_of(spec, activations)
    names, specs = spec.variant_names, spec.variant_specs()
    checkpoints = places.checkpoints(assignment.job_id, names[0])
    before = next(committed_checkpoints(checkpoints), None) if spec.mesh == "auto" else None
    choose = partial(
        choose_mesh,
        spec,
        sum(hook.width for hook in inputs),
        d_out=target.width if target is not None else None,
        rows=rows_of(activations, len(inputs) + (target is not None)),
    )
    mesh = _given_mesh(assignment, before) or _mesh_of(choose, before)
    assert assignment.dictionary_id is not None
    ids = dictionary_ids(assignment.dictionary_id, len(names))
    return TrainRun(
        assignment=assignment,
        trainings=tuple(
            Training(
                plan=make_joint_plan(its_spec, inputs=inputs, target=target, mesh=mesh),
                checkpoints=places.checkpoints(assignment.job_id, name),
                dictionary=places.dictionary(dictionary_id),
                variant=name,
            )
            for name, dictionary_id, its_spec in zip(names, ids, specs, strict=True)
        ),
        store=store,
        profile=places.profile(assignment.job_id, assignment.attempt),
    )


def rows_of(store: ActivationStore, n_hooks: int) -> Rows:
    """What of a store a run reads, as far as its memory depends on that."""
    n_bytes_value = np.dtype(raw_dtype(store.manifest.dtype)).itemsize
    return Rows(n_rows=store.manifest.n_rows, n_bytes_value=n_bytes_value, n_hooks=n_hooks)


def _given_mesh(assignment: Assignment, before: Checkpoint | None) -> Mesh | None:
    """The mesh that the scheduler chose, or that of the last checkpoint on as many devices; None where it chose none.

    A job of a release whose dispatcher chose none may have checkpoints of another mesh, and goes on on the same bits.
    """
    if assignment.mesh is None:
        return None
    if before is not None and before.dp * len(before.shards) == len(assignment.places):
        return Mesh(dp=before.dp, features=len(before.shards))
    return Mesh(dp=assignment.mesh[0], features=assignment.mesh[1])


def _mesh_of(choose: Callable[..., Mesh], before: Checkpoint | None) -> Mesh:
    """The mesh of a run; "auto" is chosen once, and then kept as long as the cluster can hold it.

    Another mesh would go on from the same checkpoint, and not on the same bits. before is its last checkpoint, if any.
    """
    devices = Devices.of_cluster()
    if before is not None and 0 < before.dp * len(before.shards) <= devices.n_members:
        return Mesh(dp=before.dp, features=len(before.shards))
    mesh = choose(devices.n_members, None, device=devices.kind)
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
        return make_hook(spec, name, mean=known[name].mean, mean_squared_norm=known[name].mean_squared_norm)

    names = spec.hook_names or (spec.hook_name or next(iter(known)),)
    target = spec.target_hook_name
    return tuple(map(hook, names)), hook(target) if target is not None and target != names[0] else None
