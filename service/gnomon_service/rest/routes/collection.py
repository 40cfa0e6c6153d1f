"""/v1/collection: what of the store is deleted, and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from fastapi import APIRouter
from sqlalchemy import select

from gnomon.resources import Collection, Removable
from gnomon_service.db.tables import cluster
from gnomon_service.dispatch.garbage import Rules, find_garbage
from gnomon_service.rest.deps import Reader, ServicesDep

router = APIRouter(prefix="/v1/collection", tags=["collection"])

N_UPCOMING: Final = 1000


@router.get("")
def read_collection(principal: Reader, services: ServicesDep) -> Collection:
    """What of this project's bytes is deleted, when and why, and what was deleted last."""
    settings = services.settings
    rules = Rules(resumable_days=settings.resumable_days, store_days=settings.store_days)
    with services.database.read() as connection:
        found = find_garbage(connection, rules, project=principal.project)[:N_UPCOMING]
        seen = connection.execute(select(cluster.c.collected_at, cluster.c.collected)).one_or_none()
    collected_at, removed = (None, None) if seen is None else seen
    return Collection(
        collected_at=_time(collected_at),
        upcoming=[
            Removable(kind=each.kind, id=each.id, why=each.why, at=_time(each.due_at), n_bytes=each.n_bytes)
            for each in found
        ],
        removed=[
            Removable(kind=row["kind"], id=row["id"], why=row["why"], at=_time(row["at"]), n_bytes=row["n_bytes"])
            for row in removed or ()
            if row["project"] == principal.project
        ],
    )


def _time(seconds: float | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None
