"""/v1/cluster: what jobs can run on."""

from __future__ import annotations

from fastapi import APIRouter

from gnomon.resources import ClusterState
from gnomon_service.db import reads
from gnomon_service.rest.deps import Reader, ServicesDep

router = APIRouter(prefix="/v1/cluster", tags=["cluster"])


@router.get("")
def read_cluster(_: Reader, services: ServicesDep) -> ClusterState:
    """What the dispatcher last saw of the cluster."""
    with services.database.read() as connection:
        return reads.read_cluster(connection)
