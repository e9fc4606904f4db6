"""The command ``webhook-api``: one file a command or group, imported only when it is called.

A command's file is ``cli/<name>.py`` (with ``_`` for ``-``) and its object is called ``command``. A file that imports
nothing but click and ``cli.common`` at its top keeps the others fast: the container's health check runs every few
seconds. To add a command: write its file and put its name into :data:`COMMANDS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final

import click

from webhook_api import __version__
from webhook_api.cli.common import Failed, explain

COMMANDS: Final = {
    "serve": "run",
    "worker": "run",
    "console": "run",
    "migrate": "migrate",
    "config": "config",
    "health": "health",
    "doctor": "doctor",
    "send": "send",
    "trace": "trace",
    "events": "events",
    "dead-letters": "dead_letters",
    "parked": "parked",
    "spool": "spool",
    "keys": "keys",
    "verify": "verify",
    "reconcile": "reconcile",
    "prune": "prune",
    "audit": "audit",
    "deployments": "deployments",
    "accounts": "accounts",
    "tokens": "tokens",
    "backup": "backup",
}
"""Each command and the file that holds it. A name whose file is not there is not offered."""


class Commands(click.Group):
    """Imports a command when it is asked for, and turns every fault into a message and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's interface)
        """Return the commands that are there, in the order of :data:`COMMANDS`."""
        there = {path.stem for path in Path(__file__).parent.glob("*.py")}
        return [name for name, file in COMMANDS.items() if file in there]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None when there is none of this name."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name]}")
        found: Any = getattr(module, cmd_name, None) or module.command
        assert isinstance(found, click.Command)  # noqa: S101  (a defect of this package, found by its tests)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run, without a traceback ever: what no command has expected is explained here."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Failed:
            raise
        except Exception as error:
            failed = explain(error)
            if failed is None:
                raise
            raise failed from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="webhook-api")
def main() -> None:
    """Durable intake and processing of fal.ai's training results.

    Exit codes: 0 as wanted, 1 not as wanted, 2 usage, 69 unreachable, 70 a defect, 75 try again later,
    78 configuration.
    """


__all__ = ["COMMANDS", "main"]
