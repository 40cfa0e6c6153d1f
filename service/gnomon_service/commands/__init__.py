"""Commands for the host that runs the service; the `gnomon` command finds them by their entry point."""

from __future__ import annotations

import sys

import typer

from gnomon.errors import GnomonError
from gnomon_service.commands.host import db_app, keys_app
from gnomon_service.commands.serving import app

__all__ = ["app", "main"]

app.add_typer(keys_app, name="keys")
app.add_typer(db_app, name="db")


def main() -> None:
    """Run a command; an error of ours is one line, not a traceback."""
    try:
        app()
    except GnomonError as error:
        _print_error(error)
        sys.exit(1)


def _print_error(error: GnomonError) -> None:
    typer.echo(f"error: {error.message} ({error.code})", err=True)
