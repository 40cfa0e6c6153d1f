"""Commands that run the service: all of it, or one of its processes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import uuid
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from gnomon_service.commands.host import Home

if TYPE_CHECKING:
    from gnomon_service.settings import Settings

# Heavy modules are imported by the command that needs them, so that `gnomon --help` stays quick.

_M_ARENA_MAX = -8
"""Of malloc.h."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: `gnomon up --cpus 4`")
def up(
    home: Home = None,
    host: Annotated[str | None, typer.Option(help="Address the API listens on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port of the API; 0 = any.")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that jobs may use; default all.")] = None,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    from gnomon_service.local.embedded import CLIENT_FILE, Embedded
    from gnomon_service.logs import setup_logging
    from gnomon_service.settings import load_settings

    settings = load_settings(home=home, host=host, port=port, n_cpus=cpus)
    setup_logging("up", settings.log_level)
    try:
        with Embedded(settings) as service:
            typer.echo(f"Gnomon is at {service.url}")
            typer.echo(f"The API key is in {settings.home / CLIENT_FILE}; `gnomon` and the SDK find it there")
            typer.echo(f"Logs are in {settings.home / 'logs'}; Ctrl-C stops everything")
            sys.stdout.flush()
            _wait_for_the_end(settings)
    except KeyboardInterrupt:
        typer.echo("Stopped")


def _wait_for_the_end(settings: Settings) -> None:
    """Wait for Ctrl-C or SIGTERM, and say at once that it was heard: to stop takes a while."""
    try:
        threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):
        jobs = "are queued again, and go on at the next start" if settings.ray_address is None else "go on"
        typer.echo(f"Stopping: running jobs {jobs} ...")
        sys.stdout.flush()
        raise


@app.command()
def api() -> None:
    """Run the API process; settings come from GNOMON_* variables."""
    import uvicorn

    from gnomon_service.app import make_app
    from gnomon_service.logs import setup_logging
    from gnomon_service.rest.connections import Connection
    from gnomon_service.settings import load_settings

    settings = load_settings()
    setup_logging("api", settings.log_level)
    _share_one_heap()
    # with the default of 5 ms each, a few requests that compute would hold up all others for tens of milliseconds
    sys.setswitchinterval(0.0005)
    uvicorn.run(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
    )


def _share_one_heap() -> None:
    """Let all threads take memory from one place.

    glibc gives threads heaps of their own, and each keeps what its worst requests took: with forty threads that come
    and go a process grows by megabytes a minute for as long as it is busy.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc alone
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


@app.command()
def dispatcher(
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue", help="On SIGTERM queue running jobs again, on SIGHUP as lost: for a cluster that stops too."
        ),
    ] = False,
) -> None:
    """Run the dispatcher process; SIGTERM leaves running jobs on the cluster for the next one."""
    from gnomon_service.db.engine import Database
    from gnomon_service.dispatch.cluster_state import Observations
    from gnomon_service.dispatch.collecting import Collector
    from gnomon_service.dispatch.deciding import Scheduler
    from gnomon_service.dispatch.event_keeping import EventKeeper
    from gnomon_service.dispatch.garbage import Rules
    from gnomon_service.dispatch.loop import Dispatcher
    from gnomon_service.jobs.held import RetryPolicy
    from gnomon_service.jobs.leases import Leases
    from gnomon_service.local.processes import wait_for_address
    from gnomon_service.logs import setup_logging
    from gnomon_service.settings import load_settings
    from gnomon_workers.attempts.cluster import RayCluster

    settings = load_settings()
    settings.make_folders()
    setup_logging("dispatcher", settings.log_level)
    stop, has_gone = threading.Event(), threading.Event()
    _set_on_signals(stop, has_gone)
    # Ray's own wait for a head ends this process after a while; here a cluster may come up as late as it likes.
    if settings.ray_address is not None and not wait_for_address(settings.ray_address, stop):
        return
    database = Database(settings.database_url)
    database.migrate()
    cluster = RayCluster.connect(address=settings.ray_address, namespace=settings.ray_namespace)
    _set_on_signals(stop, has_gone)  # again: connecting to Ray replaced the handlers
    owner = f"{socket.gethostname()[:64]}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
    observations = Observations(database)
    retry = RetryPolicy(base_s=settings.retry_base_s, cap_s=settings.retry_cap_s)
    loop = Dispatcher(
        leases=Leases(database, lease_s=settings.lease_s, retry=retry),
        observations=observations,
        scheduler=Scheduler(database),
        cluster=cluster,
        settings=settings,
        ends_with_cluster=requeue,
        has_gone=has_gone,
        owner=owner,
    )
    rules = Rules(resumable_days=settings.resumable_days, store_days=settings.store_days)
    collector = Collector(database, settings.project_root, rules, may_collect=lambda: observations.leads(owner))
    events = EventKeeper.of(database, settings.events_days)
    with collector.running(), events.running():
        loop.run(stop)
    database.close()


def _set_on_signals(stop: threading.Event, has_gone: threading.Event) -> None:
    def on_signal(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            has_gone.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
