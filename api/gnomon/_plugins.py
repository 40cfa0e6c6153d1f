"""Commands that other packages add to the CLI through the entry point group `gnomon.commands`.

They are imported only when one of them is called, or listed: `gnomon jobs` stays quick, and works where the
service's own requirements are not installed.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

GROUP = "gnomon.commands"
SERVICE_COMMANDS = frozenset({"api", "db", "demo", "dispatcher", "up"})
"""Commands that run the service: known by name, to tell a missing requirement from a typing error."""


class CommandGroup(TyperGroup):
    """The SDK's own commands, and behind them those of plugins; groups of the same name are merged."""

    _missing: ModuleNotFoundError | None = None
    _is_complete = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Own commands, then those of plugins that can be imported here."""
        self._complete()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; raises ModuleNotFoundError for one that is known but cannot be imported here."""
        if not isinstance(self.commands.get(cmd_name), TyperCommand):
            self._complete()
        if cmd_name not in self.commands and cmd_name in SERVICE_COMMANDS and self._missing is not None:
            raise self._missing
        return super().get_command(ctx, cmd_name)

    def _complete(self) -> None:
        if self._is_complete:
            return
        self._is_complete = True
        for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
            try:
                self._merge(entry.load())
            except ModuleNotFoundError as error:
                self._missing = error

    def _merge(self, plugin: typer.Typer) -> None:
        for name, command in get_group(plugin).commands.items():
            own = self.commands.get(name)
            if isinstance(own, TyperGroup) and isinstance(command, TyperGroup):
                own.commands = {**command.commands, **own.commands}
            elif own is None:
                self.commands[name] = command
