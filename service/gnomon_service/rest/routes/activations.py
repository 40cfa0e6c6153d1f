"""/v1/activations: the stores of this project."""

from __future__ import annotations

from fastapi import APIRouter

from gnomon.resources import ActivationStoreRecord, Page
from gnomon_service.db import reads
from gnomon_service.jobs.deletions import begin_store_deletion
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


@router.delete("/{store_id}", status_code=202)
def delete_store(store_id: Id, principal: Writer, services: ServicesDep) -> ActivationStoreRecord:
    """Delete a store's activations; the same harvest then makes them anew.

    A dispatcher deletes the bytes, which may take minutes; the store is "deleting" until then.
    """
    with services.database.write() as connection:
        begin_store_deletion(connection, principal.project, store_id, why=f"deleted by {principal.name}")
        return reads.read_store(connection, principal.project, store_id)
