"""Commands on the service's host that work on its database and its store, with the API up or down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gnomon.errors import InvalidRequest

if TYPE_CHECKING:
    from gnomon_service.db.engine import Database
    from gnomon_service.settings import Settings
    from gnomon_service.tenancy.keys import Scope

# Heavy modules are imported by the command that needs them, so that `gnomon --help` stays quick.

keys_app = typer.Typer(no_args_is_help=True, help="API keys, made on the host against the database.")
db_app = typer.Typer(no_args_is_help=True, help="The database, on its host.")

Home = Annotated[
    Path | None, typer.Option(help="Folder of database, store, logs; default GNOMON_HOME, else ~/.gnomon.")
]
Scopes = Annotated[
    list[str] | None, typer.Option(help="read, write or admin; once per scope. Default: read and write.")
]
Project = Annotated[str, typer.Option(help="Whose it is; projects do not see each other.")]


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


@db_app.command("verify-store", epilog="Example: `gnomon db verify-store act_0123456789abcdef0123456789abcdef`")
def verify_store(
    store_id: Annotated[str, typer.Argument(metavar="STORE", help="Id of an activation store.")],
    project: Project = "default",
    home: Home = None,
) -> None:
    """Read all of an activation store, and print every file that is not as it was written; exits with 1 if any is."""
    from gnomon_service.settings import load_settings
    from gnomon_storage.activations import ActivationStore
    from gnomon_storage.layout import ProjectLayout

    layout = ProjectLayout.of(load_settings(home=home).project_root, _check_project(project))
    store = ActivationStore.open(layout.store(store_id))
    n_damaged = 0
    for error in store.damages():
        n_damaged += 1
        typer.echo(error.message)
    typer.echo(f"{store.manifest.n_bytes:,} bytes were read: {n_damaged or 'no'} damaged", err=True)
    raise typer.Exit(int(n_damaged > 0))


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
