"""What people do to jobs that wait or run: pause them, change their class and priority, hold all of a project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, RowMapping, select, update

from gnomon.errors import Conflict, NotFound
from gnomon.events import Logged
from gnomon.resources import TERMINAL_STATES, Job, ProjectState
from gnomon.specs.request import JobChange
from gnomon_service.db.engine import Database, upsert
from gnomon_service.db.reads import read_job, read_project
from gnomon_service.db.tables import cluster, jobs, nodes, projects
from gnomon_service.jobs.transitions import add_events, as_row

_HELD = ("scheduled", "running")


class Steering:
    """Jobs, projects and the cluster, as people steer them; every method but those of the cluster is of one project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def pause(self, project: str, job_id: str, *, by: str) -> Job:
        """Let a job wait until it is resumed: one that runs saves what it has and leaves, which costs it no attempt.

        Harmless if it is paused. Raises NotFound; Conflict, "job_ended".
        """
        with self._database.write() as connection:
            row = _live_row(connection, project, job_id, "paused")
            if row["paused_by"] is None:
                values: dict[str, Any] = {"paused_by": by}
                if row["state"] in _HELD and row["leave_why"] is None:
                    values["leave_why"] = f"paused by {by}"
                add_events(connection, jobs.c.id == job_id, [as_row(Logged(message=f"paused by {by}"))], **values)
            return read_job(connection, project, job_id)

    def change(self, project: str, job_id: str, change: JobChange) -> Job:
        """Give a job, and the harvest that was made for it, another class or priority; raises as `pause`."""
        values = change.model_dump(exclude_none=True)
        with self._database.write() as connection:
            _live_row(connection, project, job_id, "changed")
            if values:
                told = ", ".join(f"{name} is now {value}" for name, value in values.items())
                of_it = (jobs.c.id == job_id) | (jobs.c.made_for == job_id)
                its = select(jobs.c.id).where(of_it, jobs.c.state.not_in(TERMINAL_STATES)).order_by(jobs.c.id)
                for each in connection.execute(its.with_for_update()).scalars().all():
                    add_events(connection, jobs.c.id == each, [as_row(Logged(message=told))], **values)
            return read_job(connection, project, job_id)

    def hold(self, project: str, *, by: str | None) -> None:
        """Start nothing of a project, or, where nobody holds it, everything again; what runs goes on."""
        with self._database.write() as connection:
            upsert(connection, projects, {"name": project}, {"held_by": by})

    def set_project(
        self,
        project: str,
        *,
        weight: float | None,
        n_jobs_most: int | None,
        n_devices_most: int | None,
        n_store_bytes_most: int | None = None,
    ) -> ProjectState:
        """Give a project a weight, or quotas, 0 for none; what is None stays as it is.

        Raises Conflict, "quota_below_use", where it has more by now.
        """
        quotas = {
            "n_jobs_most": n_jobs_most,
            "n_devices_most": n_devices_most,
            "n_store_bytes_most": n_store_bytes_most,
        }
        values: dict[str, Any] = {name: n or None for name, n in quotas.items() if n is not None}
        values |= {} if weight is None else {"weight": weight}
        with self._database.write() as connection:
            _check_use(connection, project, values)
            if values:
                upsert(connection, projects, {"name": project}, values)
            return read_project(connection, project)

    def drain(self, *, by: str | None) -> None:
        """Start nothing on the cluster, or, where nobody drains it, everything again; what runs is finished."""
        with self._database.write() as connection:
            upsert(connection, cluster, {"id": 1}, {"drained_by": by})

    def drain_node(self, node: str, *, by: str | None) -> None:
        """Have whatever runs on a node leave it, and start nothing there, or end that. Raises NotFound."""
        with self._database.write() as connection:
            if not connection.execute(update(nodes).where(nodes.c.id == node).values(drained_by=by)).rowcount:
                raise NotFound(f"the cluster has no node {node!r}; look at the cluster's nodes", code="node_not_found")


def end_pause(connection: Connection, row: RowMapping) -> None:
    """Let a paused job be started again; one that has not left yet still does, and comes back."""
    add_events(connection, jobs.c.id == row["id"], [as_row(Logged(message="resumed by the user"))], paused_by=None)


def _check_use(connection: Connection, project: str, quotas: Mapping[str, Any]) -> None:
    """Raise Conflict where a project has more than it is to have at most."""
    held = select(jobs.c.places).where(jobs.c.project == project, jobs.c.state.in_(_HELD))
    places = connection.execute(held).scalars().all()
    use = {"n_jobs_most": len(places), "n_devices_most": sum(len(each or ()) for each in places)}
    for name, n in use.items():
        most = quotas.get(name)
        if most is not None and n > most:
            raise Conflict(
                f"project {project!r} has {n} {name.split('_')[1]}, more than the {most} that it is to have at most; "
                "pause some, or wait until they are done",
                code="quota_below_use",
            )


def _live_row(connection: Connection, project: str, job_id: str, what: str) -> RowMapping:
    """The job's row, locked; raises NotFound and Conflict."""
    read_job(connection, project, job_id)
    row = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).mappings().one()
    if row["state"] in TERMINAL_STATES:
        raise Conflict(f"job {job_id!r} has ended as {row['state']} and cannot be {what}", code="job_ended")
    return row
