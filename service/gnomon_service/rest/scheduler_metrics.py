"""The scheduler in Prometheus' text format: one project's jobs, and what every key may see of the cluster."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy import Connection

from gnomon_service.db.queue_reads import (
    count_ended_attempts,
    count_gangs,
    leader_lease_s,
    read_devices,
    read_queued,
)

ENDS = ("succeeded", "failed", "cancelled", "lost", "left")


def add_scheduler(registry: CollectorRegistry, connection: Connection, project: str) -> None:
    """Add gauges of what is so now."""
    _add_queue(registry, connection, project)
    _add_devices(registry, connection, project)
    left_s = leader_lease_s(connection)
    lease = Gauge(
        "gnomon_leader_lease_seconds",
        "Until another dispatcher may lead; 0 or less: none does.",
        registry=registry,
    )
    lease.set(left_s or 0.0)
    ended = Gauge("gnomon_attempts_ended", "Attempts that ended within a day, by how.", ("state",), registry=registry)
    counts = count_ended_attempts(connection, project)
    for state in dict.fromkeys((*ENDS, *counts)):
        ended.labels(state).set(counts.get(state, 0))


def _add_queue(registry: CollectorRegistry, connection: Connection, project: str) -> None:
    labels = ("job_class", "code")
    queued = Gauge("gnomon_queued_jobs", "Queued jobs by class and by why they wait.", labels, registry=registry)
    longest = Gauge("gnomon_longest_wait_seconds", "Of queued jobs, the longest wait.", labels, registry=registry)
    for each in read_queued(connection, project):
        queued.labels(each.job_class, each.code).set(each.n_jobs)
        longest.labels(each.job_class, each.code).set(each.longest_s)
    gangs = Gauge("gnomon_gangs", "Jobs that hold devices.", ("kind", "job_class"), registry=registry)
    for (kind, job_class), n_jobs in count_gangs(connection, project).items():
        gangs.labels(kind, job_class).set(n_jobs)


def _add_devices(registry: CollectorRegistry, connection: Connection, project: str) -> None:
    seen = read_devices(connection, project)
    if seen is None:
        return
    devices = Gauge(
        "gnomon_devices", "Devices of the cluster by what is done with them.", ("device", "state"), registry=registry
    )
    for state, n_devices in (("free", seen.n_free), ("held", seen.n_held), ("drained", seen.n_drained)):
        devices.labels(seen.device, state).set(n_devices)
    own = Gauge("gnomon_project_devices", "Devices that this project holds.", ("device",), registry=registry)
    own.labels(seen.device).set(seen.n_of_project)
