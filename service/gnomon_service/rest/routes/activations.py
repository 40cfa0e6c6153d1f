"""/v1/activations: the stores of this project."""

from __future__ import annotations

from fastapi import APIRouter

from gnomon.resources import ActivationStoreRecord, Page
from gnomon_service.db import reads
from gnomon_service.jobs import artifacts as stores
from gnomon_service.rest.deps import Cursor, Id, Limit, Reader, ServicesDep, Writer

router = APIRouter(prefix="/v1/activations", tags=["activations"])


@router.get("")
def list_stores(
    principal: Reader, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50
) -> Page[ActivationStoreRecord]:
    """Activation stores, newest first."""
    with services.database.read() as connection:
        return reads.list_stores(connection, principal.project, cursor=cursor, limit=limit)


@router.get("/{store_id}")
def read_store(store_id: Id, principal: Reader, services: ServicesDep) -> ActivationStoreRecord:
    """One activation store."""
    with services.database.read() as connection:
        return reads.read_store(connection, principal.project, store_id)


@router.delete("/{store_id}", status_code=204)
def delete_store(store_id: Id, principal: Writer, services: ServicesDep) -> None:
    """Delete a store's activations; the same harvest then makes them anew."""
    with services.database.write() as connection:
        location = stores.begin_deletion(connection, principal.project, store_id)
    location.delete()  # in no transaction: it may take minutes, and SQLite has one writer
    with services.database.write() as connection:
        stores.end_deletion(connection, principal.project, store_id)
