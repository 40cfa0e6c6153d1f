"""The REST API as an ASGI application. Imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import gnomon
from gnomon_service.db.engine import Database
from gnomon_service.jobs.steering import Steering
from gnomon_service.jobs.submission import Queue
from gnomon_service.planning.inspector import Inspector
from gnomon_service.rest.body_limits import BodyLimits
from gnomon_service.rest.deps import Services
from gnomon_service.rest.key_gate import KeyGate
from gnomon_service.rest.metrics import Metrics, RequestMetrics
from gnomon_service.rest.news import News
from gnomon_service.rest.problems import add_problem_handlers
from gnomon_service.rest.rate_limits import RateLimits
from gnomon_service.rest.routes import (
    activations,
    cluster,
    collection,
    dictionaries,
    health,
    jobs,
    keys,
    plans,
    project,
)
from gnomon_service.settings import Settings
from gnomon_service.storage_root import make_storage_root
from gnomon_service.tenancy.keys import Keys


def make_app(settings: Settings) -> FastAPI:
    """The application, on a database whose schema is brought up to date first."""
    settings.make_folders()
    database = Database(settings.database_url)
    database.migrate()
    make_storage_root(settings)
    services = _make_services(settings, database)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        services.news.close()
        services.inspector.close()
        database.close()

    app = FastAPI(
        title="Gnomon",
        version=gnomon.__version__,
        description="Distributed training of aligned sparse autoencoders.",
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.services = services
    app.state.metrics = Metrics()
    app.state.submits = jobs.limit_submits()
    app.state.dispatcher_check = health.Check[health.Seen]()
    app.state.store_check = health.Check[str]()
    for routes in (project, jobs, plans, activations, dictionaries, collection, keys, cluster, health):
        app.include_router(routes.router)
    add_problem_handlers(app)
    # The last one added is the first one passed: count, then authenticate, then read the body.
    app.add_middleware(
        BodyLimits,
        max_body_bytes=settings.max_body_bytes,
        max_json_depth=settings.max_json_depth,
        body_timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(KeyGate, keys=services.keys, limits=RateLimits(settings.requests_per_s))
    app.add_middleware(RequestMetrics, metrics=app.state.metrics)
    return app


def _make_services(settings: Settings, database: Database) -> Services:
    """The parts that the routes work with."""
    known = Keys(database)
    return Services(
        settings=settings,
        database=database,
        queue=Queue(database, project_root=settings.project_root),
        steering=Steering(database),
        keys=known,
        inspector=Inspector(answer_s=settings.reading_s),
        news=News(database, known, poll_s=settings.poll_s),
    )
