"""Commands that delete what is in the store, and show what is deleted by itself."""

from __future__ import annotations

from typing import Annotated

import typer

from gnomon._command_parts import AsJson, client_of
from gnomon._plan_text import size
from gnomon._screen import moment, show_json, show_line, show_table

DictionaryArgument = Annotated[str, typer.Argument(metavar="DICTIONARY", help="Id of a dictionary.")]


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    app.command(epilog="Example: `gnomon delete-activations act_0123...`")(delete_activations)
    app.command(epilog="`gnomon restore-dictionary` undoes it for some days.")(delete_dictionary)
    app.command(epilog="Example: `gnomon restore-dictionary dict_0123...`")(restore_dictionary)
    app.command(epilog="What a job still needs is never deleted. Example: `gnomon collection`")(collection)


def delete_activations(
    ctx: typer.Context, store_id: Annotated[str, typer.Argument(metavar="STORE", help="Id of an activation store.")]
) -> None:
    """Delete an activation store that no job uses; the same harvest then makes it anew."""
    client_of(ctx).delete_activations(store_id)
    show_line(f"{store_id} is being deleted")


def delete_dictionary(ctx: typer.Context, dictionary_id: DictionaryArgument, as_json: AsJson = False) -> None:
    """Delete a dictionary; its files are kept for some days."""
    found = client_of(ctx).delete_dictionary(dictionary_id)
    if as_json:
        show_json(found)
    else:
        until = "" if found.purge_at is None else f" until {moment(found.purge_at)}"
        show_line(f"{found.id} is deleted; `gnomon restore-dictionary {found.id}` undoes that{until}")


def restore_dictionary(ctx: typer.Context, dictionary_id: DictionaryArgument, as_json: AsJson = False) -> None:
    """Undo the deletion of a dictionary, as long as its files are there."""
    found = client_of(ctx).restore_dictionary(dictionary_id)
    show_json(found) if as_json else show_line(f"{found.id} is {found.state}")


def collection(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Show what of this project's bytes is deleted by itself, when and why, and what was deleted last."""
    found = client_of(ctx).collection()
    if as_json:
        show_json(found)
        return
    rows = [("deleted", each) for each in reversed(found.removed)] + [("from then on", each) for each in found.upcoming]
    show_table(
        ("", "WHEN", "WHAT", "ID", "BYTES", "WHY"),
        (
            (
                what,
                moment(each.at),
                each.kind,
                each.id,
                size(each.n_bytes) or "",
                each.why,
            )
            for what, each in rows
        ),
    )
