"""``events``: every delivery, whatever became of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from webhook_api.cli.bulk import bulk_options, run
from webhook_api.cli.common import echo_json, fail, json_option, line, printable, settings
from webhook_api.cli.filters import filters
from webhook_api.cli.listing import echo_delivery, list_command

if TYPE_CHECKING:
    from webhook_api.console import Filter


@click.group("events")
def command() -> None:
    """Every delivery: list, look, have it processed again, export."""


@command.command("list")
@list_command("true")
def list_events() -> None:
    """List deliveries, the newest first."""


@command.command("show")
@click.argument("which", metavar="ID|REQUEST_ID")
@click.option("--body", is_flag=True, help="Show the kept headers and the body too.")
@json_option
def show(which: str, body: bool, as_json: bool) -> None:
    """Show a delivery by its number, or all deliveries of a request: rows, effects, what operators did.

    Asks PostgreSQL alone; `trace` asks Redis and the object store as well. Exits 1 when there is none.
    """
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.console import found_by

    with connected(settings(NEEDS_MIGRATE)) as connection:
        found = found_by(connection, which, body=body)
    if not found:
        fail(f"there is no delivery {which}, and none of a request with this id")
    if as_json:
        echo_json(found)
        return
    for delivery in found:
        echo_delivery(delivery)
        if body:
            _echo_body(delivery)


def _echo_body(delivery: dict[str, Any]) -> None:
    import base64

    for name, value in sorted((delivery.get("headers") or {}).items()):
        click.echo(f"  header {printable(name)}: {printable(str(value))}")
    raw = base64.b64decode(delivery.get("body_base64") or "")
    for text in raw.decode("utf-8", "backslashreplace").split("\n"):
        click.echo(f"  | {printable(text)}")


@command.command("replay")
@filters()
@click.option("--effects", metavar="NAMES", help="Do these again, although they are done: avatar,stream,…")
@bulk_options
def replay(wanted: Filter, effects: str | None, **bulk: Any) -> None:
    """Have deliveries processed again.

    Without --effects: those that are dead, waiting for another try, or parked; only what failed or never ran is done.
    With --effects also those that are done: the named effects are done AGAIN, and nothing else of them is.
    What was kept aside is replayed only with --aside or by its id, and then under its own identity.
    """
    from webhook_api import actions

    names = effect_names(effects)
    states = "'dead', 'retry', 'parked', 'done'" if names else "'dead', 'retry', 'parked'"
    discarded = "true" if wanted.ids else "d.discarded_at is null"
    eligible, left_out = actions.without_asides(f"d.state in ({states}) and {discarded}", wanted)
    run(wanted, actions.replay("events.replay", eligible, names, known_effects(), left_out), **bulk)


def known_effects() -> list[str]:
    """Names of all effects, in their order."""
    from webhook_api.effects import ORDER

    return [effect.name for effect in ORDER]


def effect_names(given: str | None) -> list[str]:
    """Read a comma-separated list of effects. Raises a usage error that names the known ones."""
    if given is None:
        return []
    names, known = [name.strip() for name in given.split(",")], known_effects()
    unknown = [name for name in names if name not in known]
    if unknown:
        said = printable(", ".join(unknown)) or "nothing"
        raise click.BadParameter(f"{said}: the effects are {', '.join(known)}", param_hint="--effects")
    return names


@command.command("export")
@filters()
@click.option("--body", is_flag=True, help="With the kept headers and the body (base64).")
@click.option("--limit", type=click.IntRange(1, 2**63 - 1), help="At most so many.  [default: all]")
@click.option("--after", type=click.IntRange(1, 2**63 - 1), metavar="ID", help="Go on after this delivery.")
@json_option
def export(wanted: Filter, body: bool, limit: int | None, after: int | None, as_json: bool) -> None:  # noqa: ARG001
    """Write deliveries to standard output, one JSON object a line, the oldest first. Always JSON.

    Neither the whole result nor more than one body stands in memory, and no transaction stays open.
    """
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.console import exported, resolved

    with connected(settings(NEEDS_MIGRATE)) as connection:
        for delivery in exported(
            connection, resolved(connection, wanted), limit=limit, after=after, body=body
        ):
            sys.stdout.write(line(delivery) + "\n")
    sys.stdout.flush()
