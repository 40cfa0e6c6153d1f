"""/v1/cluster: what jobs can run on, and what of it is drained."""

from __future__ import annotations

from fastapi import APIRouter

from gnomon.resources import ClusterState
from gnomon.specs.request import ClusterChange
from gnomon_service.db import reads
from gnomon_service.rest.deps import Admin, Id, Reader, Services, ServicesDep

router = APIRouter(prefix="/v1/cluster", tags=["cluster"])


@router.get("")
def read_cluster(_: Reader, services: ServicesDep) -> ClusterState:
    """What the dispatcher last saw of the cluster."""
    return _read(services)


@router.patch("")
def change_cluster(change: ClusterChange, principal: Admin, services: ServicesDep) -> ClusterState:
    """Drain the cluster: what runs is finished, and nothing is started; or end that. It concerns all projects."""
    services.steering.drain(by=principal.name if change.is_drained else None)
    return _read(services)


@router.patch("/nodes/{node_id}")
def change_node(node_id: Id, change: ClusterChange, principal: Admin, services: ServicesDep) -> ClusterState:
    """Drain a node: what runs there saves what it has and goes on elsewhere, and nothing is started; or end that."""
    services.steering.drain_node(node_id, by=principal.name if change.is_drained else None)
    return _read(services)


def _read(services: Services) -> ClusterState:
    with services.database.read() as connection:
        return reads.read_cluster(connection)
