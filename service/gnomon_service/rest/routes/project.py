"""/v1/project: what the key's project is owed of the cluster, and whether it is held."""

from __future__ import annotations

from fastapi import APIRouter

from gnomon.resources import ProjectState
from gnomon.specs.request import ProjectChange
from gnomon_service.db import reads
from gnomon_service.rest.deps import Admin, Reader, ServicesDep

router = APIRouter(prefix="/v1/project", tags=["project"])


@router.get("")
def read_project(principal: Reader, services: ServicesDep) -> ProjectState:
    """Weight, quotas, and who holds it."""
    with services.database.read() as connection:
        return reads.read_project(connection, principal.project)


@router.patch("")
def change_project(change: ProjectChange, principal: Admin, services: ServicesDep) -> ProjectState:
    """Hold the project: nothing of it is started, and what runs goes on; or end that."""
    services.steering.hold(principal.project, by=principal.name if change.is_held else None)
    with services.database.read() as connection:
        return reads.read_project(connection, principal.project)
