"""Prometheus metrics: requests as they pass, and the queue as it is when asked."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnomon_service.db.engine import Database
from gnomon_service.db.reads import count_jobs, dispatcher_age_s, oldest_queued_s
from gnomon_service.rest.scheduler_metrics import add_scheduler

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """What one API process counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("gnomon_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "gnomon_request_seconds",
            "Time to the first byte of the answer.",
            ("method", "route"),
            registry=self._registry,
            buckets=_BUCKETS_S,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Note one answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def render(self, database: Database, project: str) -> bytes:
        """The metrics in Prometheus' text format; jobs are those of one project, and the cluster is everybody's."""
        registry = CollectorRegistry()
        with database.read() as connection:
            counts = count_jobs(connection, project)
            oldest_s = oldest_queued_s(connection, project)
            age_s = dispatcher_age_s(connection)
            add_scheduler(registry, connection, project)
        jobs = Gauge("gnomon_jobs", "Jobs by kind and state.", ("kind", "state"), registry=registry)
        for (kind, state), count in counts.items():
            jobs.labels(kind, state).set(count)
        queued = Gauge("gnomon_oldest_queued_seconds", "Wait of the oldest queued job.", registry=registry)
        queued.set(oldest_s)
        if age_s is not None:
            age = Gauge("gnomon_dispatcher_age_seconds", "Since a dispatcher was last seen.", registry=registry)
            age.set(age_s)
        return generate_latest(self._registry) + generate_latest(registry)


class RequestMetrics:
    """ASGI middleware that counts requests by route, never by path: paths hold ids."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - started
                # a label is kept for ever, and a client may send any word as its method
                method = scope["method"] if scope["method"] in _METHODS else "other"
                self._metrics.count(method, route, message["status"], seconds)
            await send(message)

        await self._app(scope, receive, counted_send)
