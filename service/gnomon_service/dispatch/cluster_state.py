"""What the dispatcher tells the API through the database: that it lives, and what the cluster has."""

from __future__ import annotations

from typing import Any

from sqlalchemy import insert, update

from gnomon_service.db.engine import Database, database_now
from gnomon_service.db.tables import cluster
from gnomon_workers.runtime.protocol import ClusterSnapshot


class Observations:
    """The one row of the table `cluster`."""

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
            if not connection.execute(update(cluster).where(cluster.c.id == 1).values(values)).rowcount:
                connection.execute(insert(cluster).values(id=1, **values))
