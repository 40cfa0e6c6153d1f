"""What the modules of commands share: arguments that many take, and the client that they speak through."""

from __future__ import annotations

from typing import Annotated

import typer

from gnomon.client import Client

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job.")]


def client_of(ctx: typer.Context) -> Client:
    """The client of a command, closed when the command is over."""
    client = Client(ctx.obj)
    ctx.call_on_close(client.close)
    return client
