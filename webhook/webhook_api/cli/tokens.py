"""``tokens``: programs that may use the console's API."""

from __future__ import annotations

import click

from webhook_api.cli.accounts import ROLES, as_option, recorded, show, tell
from webhook_api.cli.common import json_option


@click.group("tokens")
def command() -> None:
    """Programs that may use the console's API: add, list, revoke."""


@command.command("add")
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="viewer", show_default=True,
              help="Viewers see no bodies and change nothing.")  # fmt: skip
@as_option
@json_option
def add(name: str, role: str, who: str | None, as_json: bool) -> None:
    """Make a token and print it, this once: only its digest is kept."""
    from webhook_api.web import accounts

    with recorded("tokens.add", who, name=name) as (connection, operation):
        token = accounts.add_token(connection, name, role, operation)
    tell({"name": name, "role": role, "token": token}, token, as_json)


@command.command("revoke")
@click.argument("name")
@as_option
@json_option
def revoke(name: str, who: str | None, as_json: bool) -> None:
    """End a token, at once."""
    from webhook_api.web import accounts

    with recorded("tokens.revoke", who, name=name) as (connection, operation):
        accounts.revoke_token(connection, name, operation)
    tell({"name": name, "revoked": True}, f"token {name} is revoked", as_json)


@command.command("list")
@json_option
def list_tokens(as_json: bool) -> None:
    """List tokens, without what proves them."""
    from webhook_api.web import accounts

    with recorded("tokens.list", None) as (connection, _):
        show(accounts.tokens(connection), ("name", "role", "created_at", "created_by", "revoked_at"), as_json)
