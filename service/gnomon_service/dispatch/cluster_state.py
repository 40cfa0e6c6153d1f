"""What dispatchers tell the API and each other through the database: that they live, who leads, and what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, delete, or_, select, update

from gnomon_service.db.engine import Database, database_now, upsert
from gnomon_service.db.tables import cluster, nodes
from gnomon_workers.runtime.protocol import ClusterSnapshot

N_COLLECTED: Final = 300
"""Of what the collector deleted, so much is remembered."""


class Observations:
    """The one row of the table `cluster`, and its nodes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def forget_dispatcher(self) -> None:
        """Note that no dispatcher is known to live, until one notes otherwise."""
        with self._database.write() as connection:
            connection.execute(update(cluster).values(dispatcher_at=None))

    def note(self, snapshot: ClusterSnapshot | None) -> None:
        """Note that the dispatcher's loop came round, and the cluster's resources where it answered."""
        values: dict[str, Any] = {"dispatcher_at": database_now()}
        if snapshot is not None:
            values |= {
                "seen_at": database_now(),
                "n_cpus": snapshot.n_cpus,
                "n_gpus": snapshot.n_gpus,
                "n_nodes": snapshot.n_nodes,
            }
        with self._database.write() as connection:
            upsert(connection, cluster, {"id": 1}, values)
            if snapshot is not None:
                _note_nodes(connection, snapshot)

    def lead(self, owner: str, lease_s: float) -> bool:
        """Whether this dispatcher is the one that decides what is started: the first to ask, for as long as it asks."""
        free = or_(cluster.c.leader.is_(None), cluster.c.leader == owner, cluster.c.leader_until < database_now())
        values = {"leader": owner, "leader_until": database_now() + lease_s}
        with self._database.write() as connection:
            return bool(connection.execute(update(cluster).where(cluster.c.id == 1, free).values(values)).rowcount)

    def leads(self, owner: str) -> bool:
        """Whether this is the dispatcher that leads, just now."""
        mine = (cluster.c.leader == owner) & (cluster.c.leader_until > database_now())
        with self._database.read() as connection:
            return connection.execute(select(cluster.c.id).where(mine)).first() is not None

    def note_collection(self, removed: Sequence[Mapping[str, Any]]) -> None:
        """Note that the collector came round, and what it deleted: rows with project, kind, id, why and n_bytes."""
        with self._database.write() as connection:
            upsert(connection, cluster, {"id": 1}, {"collected_at": database_now()})
            if removed:
                now = connection.execute(select(database_now())).scalar_one()
                before = connection.execute(select(cluster.c.collected)).scalar() or []
                rows = [{**row, "at": now} for row in reversed(removed)]
                connection.execute(update(cluster).values(collected=[*rows, *before][:N_COLLECTED]))

    def give_up_lead(self, owner: str) -> None:
        """Let another dispatcher decide at once."""
        with self._database.write() as connection:
            connection.execute(update(cluster).where(cluster.c.leader == owner).values(leader=None, leader_until=None))


def _note_nodes(connection: Connection, snapshot: ClusterSnapshot) -> None:
    """Machines that are there now; one that is gone and was drained is remembered, in case it comes back."""
    ids = [node.id for node in snapshot.nodes]
    connection.execute(delete(nodes).where(nodes.c.id.not_in(ids), nodes.c.drained_by.is_(None)))
    for node in snapshot.nodes:
        values = {
            "name": node.name[:255],
            "n_cpus": node.n_cpus,
            "n_gpus": node.n_gpus,
            "memory_bytes": node.memory_bytes,
            "gpu_memory_bytes": node.gpu_memory_bytes,
            "seen_at": database_now(),
        }
        upsert(connection, nodes, {"id": node.id}, values)
