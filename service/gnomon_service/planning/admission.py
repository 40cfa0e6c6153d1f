"""What is checked before a job is queued: everything about it that can be known by then.

A request that passes names sources that exist, hooks the model has, and a mesh the cluster can hold; one that does
not is refused with a code and a sentence, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from gnomon.errors import Conflict, InvalidRequest
from gnomon.resources import ActivationStoreRecord
from gnomon.specs import EvaluateSpec, HarvestSpec, JobRequest, Mesh, StoredActivations, TrainSpec
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import find_store, read_cluster, read_dictionary, read_store
from gnomon_service.jobs.deletions import gone
from gnomon_service.jobs.submission import Plan
from gnomon_service.planning.costs import Room, choose
from gnomon_service.planning.inspector import Inspector
from gnomon_service.settings import Settings
from gnomon_workers.harvest.identity import store_id as id_of_store
from gnomon_workers.harvest.inspection import SeenHarvest
from gnomon_workers.sae.costs import TrainJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that passed, and what was found out about it."""

    plan: Plan
    """What queuing it takes."""
    seen: SeenHarvest | None = None
    """The model and text of its harvest, where it names them."""
    training: TrainJob | None = None
    """What a training's costs follow from; None where only the run will tell the width of a hook."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where training rows come from."""

    store_id: str
    hooks: dict[str, int | None]
    """Hook -> d_in; None where only the run will tell."""
    seen: SeenHarvest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """For whom a request is checked, and what with."""

    project: str
    database: Database
    inspector: Inspector
    input_roots: tuple[str, ...]


def admit(request: JobRequest, project: str, database: Database, settings: Settings, inspector: Inspector) -> Admitted:
    """What a request comes to, which queues nothing: submitting it and planning it refuse the same.

    Raises InvalidRequest, NotFound, Conflict, CorruptArtifact, or Unavailable while large files are still read.
    """
    asked = _Asked(project=project, database=database, inspector=inspector, input_roots=settings.input_roots)
    match request.spec:
        case HarvestSpec() as spec:
            return _check_harvest_alone(spec, asked)
        case TrainSpec() as spec:
            return _check_train(spec, asked)
        case EvaluateSpec() as spec:
            return _check_evaluate(spec, asked)


# ---------------------------------------------------------------------------------------------- harvest


def _check_harvest(spec: HarvestSpec, asked: _Asked) -> tuple[Plan, SeenHarvest]:
    """The plan, with the model's revision pinned, and what is known of model and text."""
    seen = asked.inspector.harvest(spec, asked.input_roots)
    model = spec.model.model_copy(update={"revision": seen.revision or spec.model.revision})
    pinned = spec.model_copy(update={"model": model})
    store_id = id_of_store(pinned, seen.model_fingerprint, seen.text_fingerprint)
    return Plan(spec=pinned, store_id=store_id), seen


def _check_harvest_alone(spec: HarvestSpec, asked: _Asked) -> Admitted:
    """The plan of a harvest that may be done already: then its bytes must be there still."""
    plan, seen = _check_harvest(spec, asked)
    _find_sealed(plan.store_id, asked)
    return Admitted(plan=plan, seen=seen)


def _find_sealed(store_id: str, asked: _Asked) -> ActivationStoreRecord | None:
    """The store if it is sealed; raises CorruptArtifact where its files are not all there."""
    with asked.database.read() as connection:
        store = find_store(connection, asked.project, store_id)
    if store is None or store.state != "sealed":
        return None
    asked.inspector.check_store(store.location)
    return store


# ---------------------------------------------------------------------------------------------- train


def _check_train(spec: TrainSpec, asked: _Asked) -> Admitted:
    if isinstance(spec.activations, StoredActivations):
        source = _stored_source(spec.activations.id, asked)
        pinned = spec
    else:
        source, pinned = _harvested_source(spec, spec.activations, asked)
    names = spec.hook_names or (_choose_hook(spec.hook_name, source),)
    target = spec.target_hook_name or names[0]
    for name in (*names, target):
        _check_known(name, source)
    training = _check_shape(spec, names, target, source, asked)
    return Admitted(plan=Plan(spec=pinned, store_id=source.store_id), seen=source.seen, training=training)


def _stored_source(store_id: str, asked: _Asked) -> _Source:
    with asked.database.read() as connection:
        store = read_store(connection, asked.project, store_id)
    if store.state != "sealed":
        raise Conflict(
            f"activation store {store_id!r} is {store.state}, not sealed; wait for job {store.job_id!r}, or give "
            "its harvest spec instead of its id, and the service waits by itself",
            code="store_not_sealed",
        )
    asked.inspector.check_store(store.location)
    return _Source(store_id=store_id, hooks=dict(store.hooks))


def _harvested_source(spec: TrainSpec, harvest: HarvestSpec, asked: _Asked) -> tuple[_Source, TrainSpec]:
    plan, seen = _check_harvest(harvest, asked)
    store = _find_sealed(plan.store_id, asked)
    hooks = seen.hooks if store is None else store.hooks
    source = _Source(store_id=plan.store_id, hooks=dict(hooks), seen=seen)
    return source, spec.model_copy(update={"activations": plan.spec})


def _choose_hook(name: str | None, source: _Source) -> str:
    known = sorted(source.hooks)
    if name is None:
        if len(known) == 1:
            return known[0]
        raise InvalidRequest(
            f"the store holds {len(known)} hooks ({', '.join(known)}); name one as hook_name, or several as hook_names "
            "for a crosscoder",
            code="hook_name_required",
            hooks=known,
        )
    return name


def _check_known(name: str, source: _Source) -> None:
    if name not in source.hooks:
        near = get_close_matches(name, sorted(source.hooks), n=len(source.hooks), cutoff=0.0)
        raise InvalidRequest(
            f"hook {name!r} is not in the store; it holds {', '.join(near)}", code="unknown_hook", hooks=near
        )


def _check_shape(spec: TrainSpec, names: Sequence[str], target: str, source: _Source, asked: _Asked) -> TrainJob | None:
    """What the training costs; raises InvalidRequest where its shape is wrong, or the cluster cannot hold it."""
    widths = [width for name in names if (width := source.hooks[name]) is not None]
    d_in = sum(widths) if len(widths) == len(names) else None
    d_sae = spec.d_sae
    for variant, its_spec in zip(spec.variant_names, spec.variant_specs(), strict=True):
        try:
            if d_in is not None:
                d_sae = its_spec.resolve_d_sae(d_in)
            its_spec.check_reach(d_sae)
        except ValueError as error:
            of = f"variant {variant!r}: " if variant else ""
            raise InvalidRequest(f"spec: {of}{error}", code="invalid_spec") from error
    with asked.database.read() as connection:
        room = Room.of(read_cluster(connection))
    if isinstance(spec.mesh, Mesh) and room is not None:
        _check_mesh(spec, spec.mesh, d_sae, room)
    d_out = source.hooks[target] if target != names[0] else None
    if d_in is None or (target != names[0] and d_out is None):
        return None
    training = TrainJob.of(spec, d_in, d_out=d_out, device=room.device if room is not None else "cpu")
    choose(training, room)
    return training


def _check_mesh(spec: TrainSpec, mesh: Mesh, d_sae: int | None, room: Room) -> None:
    """Raise InvalidRequest if the cluster, as it was last seen, has too few places for the mesh."""
    n_places, what = room.n_places, room.what
    n_ranks = mesh.dp * mesh.features
    if room.n_on_a_node is not None and room.n_on_a_node < mesh.features <= n_places:
        raise InvalidRequest(
            f"mesh {mesh.dp} x {mesh.features} needs {mesh.features} {what} on one node, for the shards of a replica, "
            f"and no node has more than {room.n_on_a_node}, though all together have {n_places}; use at most "
            f"{room.n_on_a_node} features and more replicas, or set mesh to 'auto'",
            code="mesh_fits_no_node",
            n_on_a_node=room.n_on_a_node,
        )
    if n_ranks <= n_places:
        return
    fitting = _fitting_meshes(spec, d_sae, n_places)
    raise InvalidRequest(
        f"mesh {mesh.dp} x {mesh.features} needs {n_ranks} ranks, and the cluster has {n_places} {what}; "
        f"as dp x features these fit: {', '.join(fitting)}; or set mesh to 'auto'",
        code="mesh_does_not_fit",
        n_ranks=n_ranks,
        n_places=n_places,
        fitting=fitting,
    )


def _fitting_meshes(spec: TrainSpec, d_sae: int | None, n_places: int) -> list[str]:
    """The largest meshes that the cluster holds and that divide batch and dictionary, largest first."""
    fitting = [
        (dp, features)
        for dp in range(1, n_places + 1)
        for features in range(1, n_places // dp + 1)
        if spec.batch_size % dp == 0 and (d_sae is None or d_sae % features == 0)
    ]
    largest = sorted(fitting, key=lambda mesh: (-mesh[0] * mesh[1], mesh[0]))[:8]
    return [f"{dp} x {features}" for dp, features in largest]


# ---------------------------------------------------------------------------------------------- evaluate


def _check_evaluate(spec: EvaluateSpec, asked: _Asked) -> Admitted:
    with asked.database.read() as connection:
        dictionary = read_dictionary(connection, asked.project, spec.dictionary)
        store = read_store(connection, asked.project, dictionary.store_id)
    if dictionary.state != "published":
        raise gone(dictionary.id)
    asked.inspector.check_store(store.location)
    return Admitted(plan=Plan(spec=spec, store_id=store.id))
