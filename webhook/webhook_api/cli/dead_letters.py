"""``dead-letters``: what was given up and waits for an operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from webhook_api.cli.bulk import bulk_options, run
from webhook_api.cli.events import effect_names, known_effects
from webhook_api.cli.filters import filters
from webhook_api.cli.listing import echo_page, page_options

if TYPE_CHECKING:
    from webhook_api.console import Filter


@click.group("dead-letters")
def command() -> None:
    """Deliveries that were given up, or kept aside: list, replay, discard."""


@command.command("list")
@filters(ids=False, states=False)
@click.option("--discarded", is_flag=True, help="Those that were discarded instead.")
@page_options
def list_dead(wanted: Filter, discarded: bool, **page: Any) -> None:
    """List dead letters, the newest first."""
    echo_page(wanted, f"d.state = 'dead' and d.discarded_at is {'not ' if discarded else ''}null", **page)


@command.command("replay")
@filters(states=False)
@click.option(
    "--effects", metavar="NAMES", help="Do these again besides, although they are done: avatar,stream,…"
)
@bulk_options
def replay(wanted: Filter, effects: str | None, **bulk: Any) -> None:
    """Have dead letters processed again: what failed or never ran; what is done stays done.

    What was kept aside is replayed only with --aside or by its id: it gets its own identity back and is processed, or
    is closed as a duplicate where the same event has arrived afresh.
    """
    from webhook_api import actions

    eligible, left_out = actions.without_asides(actions.DEAD_LETTERS, wanted)
    names = effect_names(effects)
    run(wanted, actions.replay("dead-letters.replay", eligible, names, known_effects(), left_out), **bulk)


@command.command("discard")
@filters(states=False)
@click.option("--why", help="Why, for the record.")
@bulk_options
def discard(wanted: Filter, why: str | None, **bulk: Any) -> None:
    """Close dead letters without processing them. Nothing is deleted: `events replay ID` brings one back.

    What was kept aside is authentic, and discarded only with --aside or by its id.
    """
    from webhook_api import actions

    eligible, left_out = actions.without_asides(actions.DEAD_LETTERS, wanted)
    run(wanted, actions.discard("dead-letters.discard", eligible, why, left_out), **bulk)
