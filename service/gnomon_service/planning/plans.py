"""What a request would make, take and cost, of all that admission found out about it; nothing is queued."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy import Connection

from gnomon.plans import DiskPlan, HarvestPlan, JobPlan
from gnomon.resources import TERMINAL_STATES, ActivationStoreRecord
from gnomon.specs import HarvestSpec, JobRequest
from gnomon_service.db.engine import Database
from gnomon_service.db.reads import find_store, read_cluster, read_job
from gnomon_service.jobs.artifacts import check_not_deleting
from gnomon_service.jobs.submission import Plan
from gnomon_service.planning.admission import Admitted, admit
from gnomon_service.planning.costs import Prices, Room, choose, mesh_plans
from gnomon_service.planning.inspector import Inspector
from gnomon_service.planning.rates import HarvestSize, harvest_rate, training_rates
from gnomon_service.settings import Settings
from gnomon_workers.harvest.room import StoreSize, store_size
from gnomon_workers.sae.costs import TrainJob, checkpoint_bytes, dictionary_bytes, kept_checkpoints
from gnomon_workers.sae.memory import Rows

TOKEN_BYTES: Final = 4
"""Of a text, a token: what tokenizers of English come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a plan is made of."""

    admitted: Admitted
    project: str
    connection: Connection
    settings: Settings
    room: Room | None

    @property
    def device(self) -> str:
        """What ranks and workers would get."""
        return self.room.device if self.room is not None else "cpu"


def plan_job(
    request: JobRequest, project: str, database: Database, settings: Settings, inspector: Inspector
) -> JobPlan:
    """What a job would be. Raises what submitting it would raise; see `admit`."""
    admitted = admit(request, project, database, settings, inspector)
    with database.read() as connection:
        asked = _Asked(
            admitted=admitted,
            project=project,
            connection=connection,
            settings=settings,
            room=Room.of(read_cluster(connection)),
        )
        store = find_store(connection, project, admitted.plan.store_id)
        check_not_deleting(None if store is None else {"id": store.id, "state": store.state})
        return JobPlan(
            kind=admitted.plan.spec.kind,
            store_id=admitted.plan.store_id,
            device=asked.device,
            n_devices=asked.room.n_places if asked.room is not None else 0,
            currency=settings.currency,
            **_reuse(asked, store),
            **_parts(asked, store),
        )


def with_duration(admitted: Admitted, project: str, database: Database) -> Plan:
    """The plan of a job that is queued, with how long its training is expected to run."""
    job = admitted.training
    if job is None:
        return admitted.plan
    with database.read() as connection:
        mesh = choose(job, Room.of(read_cluster(connection))).mesh
        rate = training_rates(connection, project).of(job, mesh)
    n_tokens = job.spec.n_steps * job.spec.batch_size
    return replace(admitted.plan, expected_s=n_tokens / rate.tokens_per_s * (1.0 + rate.error))


def _reuse(asked: _Asked, store: ActivationStoreRecord | None) -> dict[str, Any]:
    """What of the activations exists, as queuing the job would find it."""
    if store is not None and store.state == "sealed":
        return {"reuses": "sealed_store", "job_id": store.job_id}
    if store is not None:
        maker = read_job(asked.connection, asked.project, store.job_id)
        if maker.state not in TERMINAL_STATES and not maker.cancel_requested:
            return {"reuses": "harvest_under_way", "job_id": maker.id}
    return {"reuses": "nothing"}


def _parts(asked: _Asked, store: ActivationStoreRecord | None) -> dict[str, Any]:
    """Rows, disk, harvest and meshes."""
    sealed = store if store is not None and store.state == "sealed" else None
    harvest = asked.admitted.plan.harvest
    n_tokens = _n_tokens(asked, harvest) if harvest is not None else 0
    size = _store_size(asked, harvest, n_tokens) if harvest is not None else None
    n_rows = sealed.n_rows if sealed is not None else size.n_rows if size is not None else None
    n_bytes = sealed.n_bytes if sealed is not None else size.n_bytes if size is not None else None
    found: dict[str, Any] = {"n_rows": n_rows}
    if sealed is None and harvest is not None:
        found["harvest"] = _harvest_plan(asked, harvest, n_tokens)
    training = asked.admitted.training
    if training is None:
        return found | {"disk": DiskPlan(store_bytes=n_bytes)}
    job = training.with_rows(_rows(training, sealed, harvest, n_rows))
    return found | _training_parts(asked, job, n_bytes)


def _training_parts(asked: _Asked, job: TrainJob, store_bytes: int | None) -> dict[str, Any]:
    """Disk and meshes of a training."""
    choice = choose(job, asked.room)
    shapes = job.shapes(choice.mesh)
    one = sum(map(checkpoint_bytes, shapes))
    n_kept, n_peak = kept_checkpoints(job.spec)
    rates = training_rates(asked.connection, asked.project)
    return {
        "disk": DiskPlan(
            store_bytes=store_bytes,
            checkpoint_bytes=one,
            checkpoints_kept_bytes=n_kept * one,
            checkpoints_peak_bytes=n_peak * one,
            dictionary_bytes=sum(map(dictionary_bytes, shapes)),
        ),
        "meshes": tuple(mesh_plans(job, choice.mesh, asked.room, rates, Prices.of(asked.settings))),
        "mesh": choice.mesh,
        "why": choice.why,
    }


def _rows(job: TrainJob, sealed: ActivationStoreRecord | None, harvest: HarvestSpec | None, n_rows: int | None) -> Rows:
    """What of its store a training reads."""
    dtype = harvest.dtype if harvest is not None else (sealed.spec.get("dtype") if sealed is not None else None)
    n_bytes_value = {"float32": 4, "int8": 1}.get(dtype or "bfloat16", 2)
    return Rows(n_rows=n_rows or job.rows.n_rows, n_bytes_value=n_bytes_value, n_hooks=job.rows.n_hooks)


def _n_tokens(asked: _Asked, harvest: HarvestSpec) -> int:
    """Tokens of a harvest: a budget may be larger than any text."""
    seen = asked.admitted.seen
    n_bytes = seen.n_text_bytes if seen is not None else 0
    return min(harvest.token_budget, n_bytes // TOKEN_BYTES) if n_bytes else harvest.token_budget


def _store_size(asked: _Asked, harvest: HarvestSpec, n_tokens: int) -> StoreSize | None:
    seen = asked.admitted.seen
    if seen is None:
        return None
    scheme = "s3" if asked.settings.storage_root.startswith("s3:") else "file"
    return store_size(harvest, seen.hooks, n_tokens, scheme)


def _harvest_plan(asked: _Asked, harvest: HarvestSpec, n_tokens: int) -> HarvestPlan:
    """A harvest on all the cluster has, or as many workers as it asks for."""
    n_places = asked.room.n_places if asked.room is not None else 1
    n_segments = -(-n_tokens // harvest.segment_tokens) + 1
    n_workers = max(1, min(harvest.n_workers or n_places, n_places, n_segments))
    seen = asked.admitted.seen
    size = HarvestSize(
        spec=harvest,
        n_parameters=seen.n_parameters if seen is not None else 0,
        n_workers=n_workers,
        device=asked.device,
    )
    rate = harvest_rate(asked.connection, asked.project, size)
    prices = Prices.of(asked.settings)
    return HarvestPlan(
        n_tokens=n_tokens, n_workers=n_workers, running=prices.duration(rate, n_tokens, n_workers, asked.device)
    )
