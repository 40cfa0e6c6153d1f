"""Commands that steer jobs, the project and the cluster."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gnomon._command_parts import AsJson, JobArgument, client_of
from gnomon._screen import show_json, show_line, show_pairs, show_table
from gnomon.errors import InvalidRequest
from gnomon.resources import ClusterState, ProjectState
from gnomon.specs.request import JobClass

Off = Annotated[bool, typer.Option("--off", help="End it.")]


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command(epilog="It waits until `gnomon resume JOB`, and loses nothing. Example: `gnomon pause JOB`")(pause)
    app.command(epilog="Example: `gnomon change JOB --class spare --priority 10`")(change)
    app.command(epilog="Example: `gnomon clone JOB --set activation.k=64 --set seed=2`")(clone)
    app.command(epilog="What runs goes on; `gnomon hold --off` ends it.")(hold)
    app.command(epilog="`gnomon drain --off` ends it. Example: `gnomon drain --node NODE`")(drain)


def pause(ctx: typer.Context, job_id: JobArgument, as_json: AsJson = False) -> None:
    """Let a job wait; one that runs saves what it has first, which costs it no attempt."""
    found = client_of(ctx).pause(job_id)
    if as_json:
        show_json(found)
    elif found.state == "queued":
        show_line(f"{found.id} is paused; `gnomon resume {found.id}` lets it go on")
    else:
        show_line(f"{found.id} saves what it has, and is then paused; `gnomon resume {found.id}` lets it go on")


def change(
    ctx: typer.Context,
    job_id: JobArgument,
    job_class: Annotated[
        JobClass | None,
        typer.Option("--class", help="A higher one goes first and preempts; urgent needs scope admin."),
    ] = None,
    priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="Within its class and project, the higher goes first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Give a job another class or priority."""
    if job_class is None and priority is None:
        raise InvalidRequest("nothing to change; give --class or --priority")
    found = client_of(ctx).change(job_id, job_class=job_class, priority=priority)
    if as_json:
        show_json(found)
    else:
        show_line(f"{found.id} is of class {found.job_class} and priority {found.priority}")


def clone(
    ctx: typer.Context,
    job_id: JobArgument,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the spec, dots within; value as JSON."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A label for people.")] = None,
    as_json: AsJson = False,
) -> None:
    """Queue another job with a job's spec, but for some fields, or for none."""
    changes: dict[str, Any] = {}
    for setting in settings or ():
        _put(changes, setting)
    handle = client_of(ctx).clone(job_id, changes, name=name)
    show_json(handle.job) if as_json else show_line(handle.id)


def hold(ctx: typer.Context, off: Off = False, as_json: AsJson = False) -> None:
    """Start nothing of this project any more."""
    found = client_of(ctx).hold(is_held=not off)
    show_json(found) if as_json else _show_project(found)


def drain(
    ctx: typer.Context,
    node: Annotated[str | None, typer.Option(help="Id or name of a node: what runs there leaves it.")] = None,
    off: Off = False,
    as_json: AsJson = False,
) -> None:
    """Start nothing on the cluster any more; what runs is finished."""
    client = client_of(ctx)
    node_id = None if node is None else _node_id(client.cluster(), node)
    found = client.drain(node_id, is_drained=not off)
    show_json(found) if as_json else show_cluster(found)


def show_cluster(found: ClusterState) -> None:
    """The cluster, and its nodes."""
    pairs = [("cores", f"{found.n_cpus:g}"), ("GPUs", f"{found.n_gpus:g}"), ("nodes", str(found.n_nodes))]
    pairs += [("drained by", found.drained_by)] if found.drained_by else []
    pairs += [("seen", "never: no dispatcher has reached it")] if found.seen_at is None else []
    show_pairs(pairs)
    if found.nodes:
        show_table(
            ("NODE", "NAME", "CORES", "GPUS", "MEMORY", "DRAINED BY"),
            (
                (
                    node.id,
                    node.name,
                    f"{node.n_cpus:g}",
                    f"{node.n_gpus:g}",
                    "" if node.memory_bytes is None else f"{node.memory_bytes / 2**30:.0f} GiB",
                    node.drained_by or "",
                )
                for node in found.nodes
            ),
        )


def _show_project(found: ProjectState) -> None:
    held = f"held by {found.held_by}: nothing of it is started" if found.held_by else "not held"
    show_line(f"project {found.name} is {held}")


def _node_id(cluster: ClusterState, name: str) -> str:
    """The id of a node that is named by it, or by its host's name where that is one's only."""
    found = [node.id for node in cluster.nodes if name in (node.id, node.name)]
    if len(found) != 1:
        known = ", ".join(f"{node.id} ({node.name})" for node in cluster.nodes) or "none"
        raise InvalidRequest(f"{len(found)} nodes are named {name!r}; the cluster has {known}", code="node_not_found")
    return found[0]


def _put(changes: dict[str, Any], setting: str) -> None:
    """Note one FIELD=VALUE; a value that is no JSON is taken as text."""
    path, equals, text = setting.partition("=")
    if not equals or not all(path.split(".")):
        raise InvalidRequest(f"--set {setting!r} is not FIELD=VALUE, as in activation.k=64")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *parents, last = path.split(".")
    here = changes
    for parent in parents:
        here = here.setdefault(parent, {})
    here[last] = value
