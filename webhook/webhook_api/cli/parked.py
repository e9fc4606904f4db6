"""``parked``: what came before the bot's row and waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from webhook_api.cli.bulk import bulk_options, run
from webhook_api.cli.filters import filters
from webhook_api.cli.listing import list_command

if TYPE_CHECKING:
    from webhook_api.console import Filter


@click.group("parked")
def command() -> None:
    """Deliveries whose avatar is not there yet: list, look for it now, discard."""


@command.command("list")
@list_command("d.state = 'parked'", states=False)
def list_parked() -> None:
    """List parked deliveries, the newest first."""


@command.command("retry")
@filters(states=False)
@bulk_options
def retry(wanted: Filter, **bulk: Any) -> None:
    """Look for their avatars now instead of when they are due."""
    from webhook_api import actions

    run(wanted, actions.retry(), **bulk)


@command.command("discard")
@filters(states=False)
@click.option("--why", help="Why, for the record.")
@bulk_options
def discard(wanted: Filter, why: str | None, **bulk: Any) -> None:
    """Close parked deliveries without processing them. Nothing is deleted: `events replay ID` brings one back."""
    from webhook_api import actions

    run(wanted, actions.discard("parked.discard", "d.state = 'parked'", why), **bulk)
