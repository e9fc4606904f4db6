"""``audit``: what operators did."""

from __future__ import annotations

import click

from webhook_api.cli.common import echo_lines, echo_table, json_option, settings


@click.group("audit")
def command() -> None:
    """What operators changed from the command line."""


@command.command("list")
@click.option(
    "--delivery", type=click.IntRange(1, 2**63 - 1), metavar="ID", help="What was done to this delivery."
)
@click.option("--action", help="Such as dead-letters.replay.")
@click.option("--who", help="By this operator.")
@click.option("--after", type=click.IntRange(1, 2**63 - 1), metavar="ID", help="The page after this entry.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_audit(
    delivery: int | None, action: str | None, who: str | None, after: int | None, limit: int, as_json: bool
) -> None:
    """List the entries, the latest first. A big operation has one for each of its transactions."""
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.console import audited

    with connected(settings(NEEDS_MIGRATE)) as connection:
        found = audited(connection, delivery=delivery, action=action, who=who, after=after, limit=limit)
    if as_json:
        echo_lines(found)
    elif not found:
        click.echo("none")
    else:
        echo_table(
            ("id", "at", "who", "instance", "action", "changed", "filter", "detail"),
            (
                (row["id"], row["at"], row["who"], row["instance"], row["action"], row["affected"],
                 row["filter"], row["detail"])
                for row in found
            ),
        )  # fmt: skip
    if len(found) == limit:
        click.echo(f"There may be more: --after {found[-1]['id']}", err=True)
