"""Commands for the host that runs the service; the `gnomon` command finds them by their entry point."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from gnomon.errors import GnomonError, InvalidRequest

if TYPE_CHECKING:
    from gnomon_service.db.engine import Database
    from gnomon_service.settings import Settings
    from gnomon_service.tenancy.keys import Scope

# Heavy modules are imported by the command that needs them, so that `gnomon --help` stays quick.

_M_ARENA_MAX = -8
"""Of malloc.h."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys_app = typer.Typer(no_args_is_help=True, help="API keys, made on the host against the database.")
db_app = typer.Typer(no_args_is_help=True, help="The database, on its host.")
app.add_typer(keys_app, name="keys")
app.add_typer(db_app, name="db")

Home = Annotated[
    Path | None, typer.Option(help="Folder of database, store, logs; default GNOMON_HOME, else ~/.gnomon.")
]
Scopes = Annotated[
    list[str] | None, typer.Option(help="read, write or admin; once per scope. Default: read and write.")
]
Project = Annotated[str, typer.Option(help="Whose key it is; projects do not see each other.")]


def _n_bytes(text: str) -> int:
    """Bytes from a number with or without a unit."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(-1)
    if not 0 <= size < 1 << 63:
        raise typer.BadParameter(f"{text!r} is no size; give bytes, or a number with a unit, as 500GB or 2TiB")
    return int(size)


def main() -> None:
    """Run a command; an error of ours is one line, not a traceback."""
    try:
        app()
    except GnomonError as error:
        _print_error(error)
        sys.exit(1)


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


@keys_app.command("create", epilog="Example: `gnomon keys create laptop --scope read --scope write`")
def create_key(
    name: Annotated[str, typer.Argument(help="A label for people.")] = "host",
    project: Project = "default",
    scope: Scopes = None,
    expires_in_s: Annotated[int | None, typer.Option(min=1, max=10**9, help="Seconds until it expires.")] = None,
    home: Home = None,
) -> None:
    """Make an API key in the database, on the service's host, and print it: the only time it is shown."""
    from gnomon_service.tenancy.keys import Keys

    _, database = _open_database(home)
    scopes = _check_scopes(scope or ["read", "write"])
    made = Keys(database).create(project=_check_project(project), name=name, scopes=scopes, expires_in_s=expires_in_s)
    typer.echo(made.key)
    database.close()


@db_app.command("list-keys", epilog="For the host, with the API down; `gnomon keys list` asks the API.")
def list_keys(
    project: Project = "default",
    home: Home = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the API keys of a project, without their secrets."""
    from gnomon._screen import show_json, show_keys
    from gnomon_service.tenancy.keys import Keys

    _, database = _open_database(home)
    found = Keys(database).list(project)
    show_json(found) if as_json else show_keys(found)
    database.close()


@db_app.command("revoke-key", epilog="For the host, with the API down; `gnomon keys revoke` asks the API.")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Id of a key.")],
    project: Project = "default",
    home: Home = None,
) -> None:
    """Revoke an API key; it is refused from now on."""
    from gnomon_service.tenancy.keys import Keys

    _, database = _open_database(home)
    Keys(database).revoke(project, key_id)
    typer.echo(f"{key_id} is revoked")
    database.close()


@db_app.command("set-project", epilog="Example: `gnomon db set-project lab --weight 2 --max-jobs 4 --max-devices 8`")
def set_project(
    name: Annotated[str, typer.Argument(help="Name of a project, as its keys have it.")],
    weight: Annotated[float | None, typer.Option(min=0.001, max=1000, help="Its share; 1 at first.")] = None,
    max_jobs: Annotated[int | None, typer.Option(min=0, help="Jobs that may run at once; 0 = any number.")] = None,
    max_devices: Annotated[int | None, typer.Option(min=0, help="Devices that they may hold; 0 = any number.")] = None,
    max_store_bytes: Annotated[
        int | None,
        typer.Option(
            parser=_n_bytes,
            metavar="SIZE",
            help="Of its stores, as 2TB or 500GiB; above, those used longest ago are deleted. 0 = any.",
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Set what a project is owed of the cluster and may take, and print it."""
    from gnomon_service.jobs.steering import Steering
    from gnomon_service.tenancy.keys import Keys

    _, database = _open_database(home)
    steering = Steering(database)
    found = steering.set_project(
        name,
        weight=weight,
        n_jobs_most=max_jobs,
        n_devices_most=max_devices,
        n_store_bytes_most=max_store_bytes,
    )
    if not Keys(database).list(name):
        typer.echo(f"project {name!r} has no key yet; 'gnomon keys create NAME --project {name}' makes one", err=True)
    database.close()
    typer.echo(found.model_dump_json())


@db_app.command("collect", epilog="The dispatcher does this by itself. Example: `gnomon db collect --dry-run`")
def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would be.")] = False,
    home: Home = None,
) -> None:
    """Delete from the store what nobody needs any more, now, and print it: a JSON object a line."""
    from gnomon_service.dispatch.collecting import Collector, Removed
    from gnomon_service.dispatch.garbage import Rules

    settings, database = _open_database(home)
    rules = Rules(resumable_days=settings.resumable_days, store_days=settings.store_days)
    collector = Collector(database, settings.project_root, rules)
    if dry_run:
        found = [Removed(garbage=garbage, n_bytes=collector.count_bytes(garbage)) for garbage in collector.due()]
    else:
        found = collector.collect()
    for each in found:
        typer.echo(json.dumps(each.as_row()))
    done = "would be deleted" if dry_run else "deleted"
    things = "1 thing" if len(found) == 1 else f"{len(found)} things"
    typer.echo(f"{things}, {sum(each.n_bytes for each in found):,} bytes: {done}", err=True)
    database.close()


@db_app.command("upgrade")
def upgrade_database(home: Home = None) -> None:
    """Bring the database's schema up to date; the service does this by itself when it starts."""
    _, database = _open_database(home)
    typer.echo("the schema is up to date")
    database.close()


def _open_database(home: Path | None) -> tuple[Settings, Database]:
    from gnomon_service.db.engine import Database
    from gnomon_service.settings import load_settings

    settings = load_settings(home=home)
    settings.make_folders()
    database = Database(settings.database_url)
    database.migrate()
    return settings, database


def _check_scopes(scopes: list[str]) -> tuple[Scope, ...]:
    from gnomon_service.tenancy.keys import SCOPES

    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        raise InvalidRequest(f"scope {unknown[0]!r} is unknown; use one of: {', '.join(SCOPES)}", code="unknown_scope")
    return tuple(scope for scope in SCOPES if scope in scopes)


def _check_project(project: str) -> str:
    if not (project.isascii() and project.replace("-", "").isalnum() and 1 <= len(project) <= 40):
        raise InvalidRequest(
            f"project {project!r} is not a name: use letters, digits and -, at most 40", code="bad_project"
        )
    return project


def _set_on_signals(stop: threading.Event, has_gone: threading.Event) -> None:
    def on_signal(number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            has_gone.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)


def _print_error(error: GnomonError) -> None:
    typer.echo(f"error: {error.message} ({error.code})", err=True)
