"""The command line: a thin file over the SDK. Commands that run the service come from plugins."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gnomon import _removal_commands, _steering_commands
from gnomon._command_parts import AsJson, JobArgument, client_of
from gnomon._job_view import job_name, number, show_job
from gnomon._plan_text import show_plan
from gnomon._plugins import CommandGroup
from gnomon._screen import (
    event_text,
    moment,
    progress_text,
    show_error,
    show_json,
    show_keys,
    show_line,
    show_note,
    show_table,
)
from gnomon._settings import resolve_settings
from gnomon._steering_commands import show_cluster
from gnomon.client import JobHandle
from gnomon.errors import GnomonError, InvalidRequest, how_to_install
from gnomon.resources import TERMINAL_STATES, JobKind, JobState
from gnomon.specs.request import JobClass

app = typer.Typer(
    cls=CommandGroup,
    name="gnomon",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train aligned sparse autoencoders of a model's activations, as a service.",
    epilog="First steps: `gnomon demo` shows the whole path on this machine; `gnomon up` starts a service "
    "here; `gnomon submit train.json --wait` gives it work.",
)
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(keys_app, name="keys")
_steering_commands.add_commands(app)
_removal_commands.add_commands(app)

Scopes = Annotated[
    list[str] | None, typer.Option(help="read, write or admin; once per scope. Default: read and write.")
]
Limit = Annotated[int, typer.Option(min=1, help="Show at most this many.")]


def main() -> None:
    """Entry point of the `gnomon` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    logging.getLogger("stamina").addHandler(logging.NullHandler())
    try:
        app(arguments, prog_name="gnomon")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ModuleNotFoundError as error:
        show_error(_missing_extra(error))
    except (GnomonError, OSError) as error:  # TimeoutError is an OSError
        show_error(error)
    except Exception as error:
        if os.environ.get("GNOMON_DEBUG"):
            raise
        show_error(GnomonError(f"unexpected {type(error).__name__}: {error}; GNOMON_DEBUG=1 shows where"))
    return 1


@app.callback(invoke_without_command=True)
def _options(
    ctx: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="URL of the service; default: GNOMON_URL, else that of client.json.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import gnomon

        show_line(f"gnomon {gnomon.__version__}")
        raise typer.Exit
    ctx.obj = url


@app.command(epilog="Example: `gnomon submit train.json --name layer-10 --wait`")
def submit(
    ctx: typer.Context,
    file: Annotated[typer.FileText, typer.Argument(help="A spec or a whole request as JSON; - reads standard input.")],
    name: Annotated[str | None, typer.Option(help="A label for people; default none.")] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100, higher runs first; default 0.")] = None,
    job_class: Annotated[
        JobClass | None,
        typer.Option("--class", help="A higher one goes first and preempts; urgent needs scope admin. Default normal."),
    ] = None,
    max_attempts: Annotated[int | None, typer.Option(help="It fails after so many lost in a row; default 5.")] = None,
    deadline_s: Annotated[int | None, typer.Option(help="Seconds from now until it is failed; default none.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key gives the same job; default a new one.")
    ] = None,
    profile: Annotated[int | None, typer.Option(help="Trace so many training steps; default none.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show its progress until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Queue a job from a file."""
    request = _read_spec(file)
    if profile is not None:
        spec = request.get("spec")
        (spec if isinstance(spec, dict) else request)["profile_steps"] = profile
    handle = client_of(ctx).submit(
        request,
        name=name,
        priority=priority,
        job_class=job_class,
        max_attempts=max_attempts,
        deadline_s=deadline_s,
        idempotency_key=idempotency_key,
    )
    if wait:
        if not as_json:
            show_note(handle.id)
        _wait(handle)
    if as_json:
        show_json(handle.job)
    elif wait:
        show_job(handle.job)
    else:
        show_line(handle.id)


@app.command(
    epilog="Of every mesh that the cluster holds, dp replicas x features shards: memory a rank, speed, hours, cost; "
    "* is the one that it would run on. OFF BY falls as jobs finish here. Example: `gnomon plan train.json`"
)
def plan(
    ctx: typer.Context,
    file: Annotated[typer.FileText, typer.Argument(help="A spec or a whole request as JSON; - reads standard input.")],
    as_json: AsJson = False,
) -> None:
    """Show what a job would take, of disk, memory, time and money; queues nothing."""
    found = client_of(ctx).plan(_read_spec(file))
    show_json(found) if as_json else show_plan(found)


@app.command(epilog="Example: `gnomon jobs --state running`")
def jobs(
    ctx: typer.Context,
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    kind: Annotated[JobKind | None, typer.Option(help="Only jobs of this kind.")] = None,
    limit: Limit = 50,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    found = client_of(ctx).jobs(state=state, kind=kind, limit=limit)
    if as_json:
        show_json(found)
    else:
        show_table(
            ("ID", "KIND", "STATE", "CREATED", "PROGRESS", "NAME"),
            ((j.id, j.kind, j.state, moment(j.created_at), progress_text(j), job_name(j)) for j in found),
        )


@app.command()
def job(ctx: typer.Context, job_id: JobArgument, as_json: AsJson = False) -> None:
    """Show one job."""
    found = client_of(ctx).job(job_id).job
    show_json(found) if as_json else show_job(found)


@app.command(epilog="Ctrl-C ends the watching, never the job: `gnomon cancel JOB` does.")
def watch(ctx: typer.Context, job_id: JobArgument, as_json: AsJson = False) -> None:
    """Show a job's progress until it ends; exit code 1 if it fails."""
    handle = client_of(ctx).job(job_id)
    _wait(handle)
    show_json(handle.job) if as_json else show_job(handle.job)


@app.command(epilog="Example: `gnomon logs JOB --follow`")
def logs(
    ctx: typer.Context,
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events with a greater id.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Print progress, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what happened to a job, one line each."""
    for event in client_of(ctx).events(job_id, after=after, follow=follow):
        if as_json:
            sys.stdout.write(event.model_dump_json() + "\n")
            sys.stdout.flush()
        elif everything or event.kind != "progress":
            show_line(event_text(event))


@app.command()
def cancel(ctx: typer.Context, job_id: JobArgument, as_json: AsJson = False) -> None:
    """Ask a job to stop."""
    found = client_of(ctx).cancel(job_id)
    if as_json:
        show_json(found)
    elif found.state in TERMINAL_STATES:
        show_line(f"{found.id} has ended: {found.state}")
    else:
        show_line(f"{found.id} is asked to stop")


@app.command(epilog="It goes on from its last checkpoint or segment, on the same batches. Example: `gnomon resume JOB`")
def resume(ctx: typer.Context, job_id: JobArgument, as_json: AsJson = False) -> None:
    """Queue a job again that failed or was cancelled."""
    found = client_of(ctx).resume(job_id)
    show_json(found) if as_json else show_line(f"{found.id} is {found.state}")


@app.command()
def activations(ctx: typer.Context, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List activation stores, newest first."""
    found = client_of(ctx).activations(limit=limit)
    if as_json:
        show_json(found)
    else:
        show_table(
            ("ID", "STATE", "CREATED", "ROWS", "GB", "HOOKS"),
            (
                (
                    store.id,
                    store.state,
                    moment(store.created_at),
                    "" if store.n_rows is None else f"{store.n_rows:,}",
                    "" if store.n_bytes is None else f"{store.n_bytes / 1e9:.2f}",
                    ", ".join(f"{hook} ({d_in})" for hook, d_in in store.hooks.items()),
                )
                for store in found
            ),
        )


@app.command()
def dictionaries(ctx: typer.Context, limit: Limit = 50, as_json: AsJson = False) -> None:
    """List published dictionaries, newest first."""
    found = client_of(ctx).dictionaries(limit=limit)
    if as_json:
        show_json(found)
    else:
        show_table(
            ("ID", "STATE", "CREATED", "HOOK", "D_SAE", "ACTIVATION", "ALIGNMENT", "FVU", "NAME"),
            (
                (
                    d.id,
                    d.state,
                    moment(d.created_at),
                    d.hook_name,
                    d.d_sae,
                    d.activation,
                    d.alignment,
                    number(d.metrics.fvu),
                    d.name,
                )
                for d in found
            ),
        )


@app.command(epilog='Then, in Python: `gnomon.load("PATH")`')
def download(
    ctx: typer.Context,
    dictionary_id: Annotated[str, typer.Argument(metavar="DICTIONARY", help="Id of a dictionary.")],
    path: Annotated[Path | None, typer.Argument(help="Folder to write; default: one named by the id.")] = None,
) -> None:
    """Fetch a dictionary, in the layout that SAELens reads."""
    show_line(str(client_of(ctx).dictionary(dictionary_id).download(path)))


@app.command()
def cluster(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Show what the service can run on."""
    found = client_of(ctx).cluster()
    if as_json:
        show_json(found)
    else:
        show_cluster(found)


@app.command(epilog='Example: `eval "$(gnomon env)"`')
def env(ctx: typer.Context) -> None:
    """Print the service's URL and key as shell exports, for curl and scripts."""
    settings = resolve_settings(ctx.obj)
    sys.stdout.write(f"export GNOMON_URL={shlex.quote(settings.url)}\n")
    if settings.key is not None:
        sys.stdout.write(f"export GNOMON_API_KEY={shlex.quote(settings.key)}\n")


@keys_app.command("list")
def list_keys(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the API keys of this project, without their secrets."""
    found = client_of(ctx).keys()
    show_json(found) if as_json else show_keys(found)


@keys_app.command("issue", epilog="Example: `gnomon keys issue laptop --scope read --scope write`")
def issue_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Scopes = None,
    expires_in_s: Annotated[int | None, typer.Option(min=1, max=10**9, help="Seconds until it expires.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key over REST, with a key of scope admin, and print it: the only time it is shown."""
    options: dict[str, Any] = {"scopes": tuple(scope)} if scope else {}
    made = client_of(ctx).create_key(name, expires_in_s=expires_in_s, **options)
    show_json(made) if as_json else show_line(made.key)


@keys_app.command("revoke")
def revoke_key(ctx: typer.Context, key_id: Annotated[str, typer.Argument(metavar="KEY", help="Id of a key.")]) -> None:
    """Revoke an API key; it is refused from then on."""
    client_of(ctx).revoke_key(key_id)
    show_line(f"{key_id} is revoked")


def _wait(handle: JobHandle[Any]) -> None:
    try:
        handle.wait(progress=True)
    except KeyboardInterrupt:
        show_note(f"detached; job {handle.id} goes on: `gnomon watch {handle.id}`, `gnomon cancel {handle.id}`")
        raise typer.Exit(130) from None


def _read_spec(file: typer.FileText) -> dict[str, Any]:
    try:
        content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{file.name} is not JSON: {error}", code="bad_file") from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{file.name} is not a JSON object; wanted a spec", code="bad_file")
    return content


def _missing_extra(error: ModuleNotFoundError) -> GnomonError:
    return GnomonError(
        f"this command runs the service, which is not installed here (no module {error.name!r}): "
        f"{how_to_install('all')}",
        code="missing_extra",
    )
