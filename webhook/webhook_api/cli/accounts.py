"""``accounts``: who may use the console. Passwords are read from the terminal or standard input, never from arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from webhook_api.cli.common import echo_json, echo_lines, echo_table, fail, json_option, settings

if TYPE_CHECKING:
    from webhook_api.audit import Operation
    from webhook_api.db import Connection

ROLES = ("viewer", "operator")
as_option = click.option("--as", "who", metavar="NAME", help="Who does it, for the audit.")


@click.group("accounts")
def command() -> None:
    """People who may use the console: add, list, give another password, disable."""


@contextmanager
def recorded(action: str, who: str | None, **said: str) -> Iterator[tuple[Connection, Operation]]:
    """A connection and the operation that is recorded with the change; faults end the command."""
    from webhook_api.audit import Operation, whoami
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.web.accounts import AccountError

    loaded = settings(NEEDS_MIGRATE)
    try:
        with connected(loaded) as connection:
            yield connection, Operation(whoami(who), loaded.instance_id, action, said)
    except AccountError as error:
        fail(str(error))


def tell(document: dict[str, Any], sentence: str, as_json: bool) -> None:
    """Say what was done, to a program or to a person."""
    echo_json(document) if as_json else click.echo(sentence)


def _password() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    line = sys.stdin.readline(5000)
    return line.removesuffix("\n").removesuffix("\r")


@command.command("add")
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="viewer", show_default=True,
              help="Viewers see no bodies and change nothing.")  # fmt: skip
@as_option
@json_option
def add(name: str, role: str, who: str | None, as_json: bool) -> None:
    """Make an account. Its password is prompted for, or is the first line of standard input."""
    from webhook_api.web import accounts

    with recorded("accounts.add", who, name=name) as (connection, operation):
        accounts.check_name(name)
        accounts.add(connection, name, role, _password(), operation)
    tell({"account": name, "role": role}, f"account {name} ({role}) was made", as_json)


@command.command("password")
@click.argument("name")
@as_option
@json_option
def password(name: str, who: str | None, as_json: bool) -> None:
    """Give an account another password. That enables it again and ends its sessions."""
    from webhook_api.web import accounts

    with recorded("accounts.password", who, name=name) as (connection, operation):
        ended = accounts.set_password(connection, name, _password(), operation)
    done = {"account": name, "sessions_ended": ended}
    tell(done, f"account {name} has another password; {ended} session(s) ended", as_json)


@command.command("disable")
@click.argument("name")
@as_option
@json_option
def disable(name: str, who: str | None, as_json: bool) -> None:
    """Close an account and end its sessions. `accounts password` opens it again."""
    from webhook_api.web import accounts

    with recorded("accounts.disable", who, name=name) as (connection, operation):
        ended = accounts.disable(connection, name, operation)
    done = {"account": name, "sessions_ended": ended}
    tell(done, f"account {name} is disabled; {ended} session(s) ended", as_json)


@command.command("list")
@json_option
def list_accounts(as_json: bool) -> None:
    """List accounts."""
    from webhook_api.web import accounts

    with recorded("accounts.list", None) as (connection, _):
        show(
            accounts.listed(connection),
            ("name", "role", "created_at", "password_at", "seen_at", "disabled_at"),
            as_json,
        )


def show(found: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Print rows for people or for programs."""
    if as_json:
        echo_lines(found)
    elif not found:
        click.echo("none")
    else:
        echo_table(
            [name.replace("_", " ") for name in columns], ([row[name] for name in columns] for row in found)
        )
