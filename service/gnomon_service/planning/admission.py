"""What is checked before a job is queued: everything about it that can be known by then.

A request that passes names sources that exist, hooks the model has, and a mesh the cluster can hold; one that does
not is refused with a code and a sentence, and leaves nothing behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from gnomon.errors import Conflict, InvalidRequest
from gnomon.resources import ActivationStoreRecord, ClusterState
from gnomon.specs import EvaluateSpec, HarvestSpec, JobRequest, Mesh, StoredActivations, TrainSpec
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import find_store, read_cluster, read_dictionary, read_store
from gnomon_service.jobs.submission import Plan
from gnomon_service.planning.inspector import Inspector
from gnomon_service.settings import Settings
from gnomon_workers.harvest.identity import store_id as id_of_store


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where training rows come from."""

    store_id: str
    hooks: dict[str, int | None]
    """Hook -> d_in; None where only the run will tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """For whom a request is checked, and what with."""

    project: str
    database: Database
    inspector: Inspector
    input_roots: tuple[str, ...]


def check_job(request: JobRequest, project: str, database: Database, settings: Settings, inspector: Inspector) -> Plan:
    """The plan of a request, which queues nothing.

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


def _check_harvest(spec: HarvestSpec, asked: _Asked) -> tuple[Plan, dict[str, int | None]]:
    """The plan, with the model's revision pinned, and the width of each hook."""
    seen = asked.inspector.harvest(spec, asked.input_roots)
    model = spec.model.model_copy(update={"revision": seen.revision or spec.model.revision})
    pinned = spec.model_copy(update={"model": model})
    store_id = id_of_store(pinned, seen.model_fingerprint, seen.text_fingerprint)
    return Plan(spec=pinned, store_id=store_id), dict(seen.hooks)


def _check_harvest_alone(spec: HarvestSpec, asked: _Asked) -> Plan:
    """The plan of a harvest that may be done already: then its bytes must be there still."""
    plan, _ = _check_harvest(spec, asked)
    _find_sealed(plan.store_id, asked)
    return plan


def _find_sealed(store_id: str, asked: _Asked) -> ActivationStoreRecord | None:
    """The store if it is sealed; raises CorruptArtifact where its files are not all there."""
    with asked.database.read() as connection:
        store = find_store(connection, asked.project, store_id)
    if store is None or store.state != "sealed":
        return None
    asked.inspector.check_store(store.location)
    return store


# ---------------------------------------------------------------------------------------------- train


def _check_train(spec: TrainSpec, asked: _Asked) -> Plan:
    if isinstance(spec.activations, StoredActivations):
        source = _stored_source(spec.activations.id, asked)
        pinned = spec
    else:
        source, pinned = _harvested_source(spec, spec.activations, asked)
    names = spec.hook_names or (_choose_hook(spec.hook_name, source),)
    for name in (*names, spec.target_hook_name or names[0]):
        _check_known(name, source)
    widths = [width for name in names if (width := source.hooks[name]) is not None]
    _check_shape(spec, sum(widths) if len(widths) == len(names) else None, asked.database)
    return Plan(spec=pinned, store_id=source.store_id)


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
    plan, hooks = _check_harvest(harvest, asked)
    store = _find_sealed(plan.store_id, asked)
    source = _Source(store_id=plan.store_id, hooks=hooks if store is None else dict(store.hooks))
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


def _check_shape(spec: TrainSpec, d_in: int | None, database: Database) -> None:
    d_sae = spec.d_sae
    for variant, its_spec in zip(spec.variant_names, spec.variant_specs(), strict=True):
        try:
            if d_in is not None:
                d_sae = its_spec.resolve_d_sae(d_in)
            its_spec.check_reach(d_sae)
        except ValueError as error:
            of = f"variant {variant!r}: " if variant else ""
            raise InvalidRequest(f"spec: {of}{error}", code="invalid_spec") from error
    if isinstance(spec.mesh, Mesh):
        with database.read() as connection:
            _check_mesh(spec, spec.mesh, d_sae, read_cluster(connection))


def _check_mesh(spec: TrainSpec, mesh: Mesh, d_sae: int | None, cluster: ClusterState) -> None:
    """Raise InvalidRequest if the cluster, as it was last seen, cannot hold the mesh."""
    if cluster.seen_at is None:
        return
    n_places, what = (cluster.n_gpus, "GPUs") if cluster.n_gpus > 0 else (cluster.n_cpus, "CPUs")
    n_ranks = mesh.dp * mesh.features
    if n_ranks <= n_places:
        return
    fitting = _fitting_meshes(spec, d_sae, int(n_places))
    raise InvalidRequest(
        f"mesh {mesh.dp} x {mesh.features} needs {n_ranks} ranks, and the cluster has {n_places:g} {what}; "
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


def _check_evaluate(spec: EvaluateSpec, asked: _Asked) -> Plan:
    with asked.database.read() as connection:
        dictionary = read_dictionary(connection, asked.project, spec.dictionary)
        store = read_store(connection, asked.project, dictionary.store_id)
    asked.inspector.check_store(store.location)
    return Plan(spec=spec, store_id=store.id)
