"""``deployments``: what was deployed where, when and by whom."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any

import click

from webhook_api.cli.common import echo_json, echo_lines, echo_table, fail, json_option, printable, settings
from webhook_api.cli.filters import Moment

KINDS = ("deploy", "rollback", "restore")
RESULTS = ("done", "unchanged", "failed", "rolled_back", "interrupted")


@click.group("deployments")
def command() -> None:
    """What was deployed where, when and by whom. The hosts' records are imported after each deployment."""


@command.command("import")
@click.argument("source", type=click.File("rb"), default="-", metavar="[FILE]")
@json_option
def import_records(source: IO[bytes], as_json: bool) -> None:
    """Import a host's deployments.jsonl, from FILE or standard input. What is there already stays as it is.

    Lines that are no record are left out and named; then the exit code is 1.
    """
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.deployments import bring_in

    with connected(settings(NEEDS_MIGRATE)) as connection:
        done = bring_in(connection, _lines(source))
    if as_json:
        echo_json({"new": done.new, "known": done.known, "invalid": list(done.invalid)})
    else:
        click.echo(f"{done.new} new, {done.known} known already")
    if done.invalid:
        fail("\n".join([f"{len(done.invalid)} line(s) are no record and were left out:", *done.invalid[:10]]))


def _lines(source: IO[bytes]) -> Iterator[str]:
    from webhook_api.deployments import LONGEST_LINE

    while line := source.readline(4 * LONGEST_LINE):
        yield line.decode("utf-8", "replace").rstrip("\n")


@command.command("list")
@click.option("--host", help="On this host.")
@click.option("--kind", type=click.Choice(KINDS), help="Of this kind.")
@click.option("--result", type=click.Choice(RESULTS), help="With this result.")
@click.option("--since", type=Moment(), help="Started at this time or later: 2h, 7d, 2026-11-23, RFC 3339.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_deployments(
    host: str | None, kind: str | None, result: str | None, since: datetime | None, limit: int, as_json: bool
) -> None:
    """List runs, the latest first, one line a host. With --json each is the record as its host has it."""
    found = _found(host=host, kind=kind, result=result, since=since, limit=limit)
    if as_json:
        echo_lines(row["record"] for row in found)
    elif not found:
        click.echo("none")
    else:
        echo_table(
            ("id", "started", "seconds", "host", "kind", "result", "from", "to", "who", "reason"),
            (
                (row["id"], row["started_at"], row["record"].get("seconds"), row["host"], row["kind"],
                 row["result"], row["from_release"], row["to_release"], row["who"], row["record"].get("reason"))
                for row in found
            ),
        )  # fmt: skip


@command.command("show")
@click.argument("identifier", metavar="ID")
@click.option("--host", help="On this host alone.")
@json_option
def show_deployment(identifier: str, host: str | None, as_json: bool) -> None:
    """Show one run in full, on each of its hosts. ID may be `last`."""
    if identifier == "last":
        newest = _found(host=host, limit=1)
        identifier = newest[0]["id"] if newest else identifier
    found = _found(host=host, identifier=identifier, limit=10_000)
    if not found:
        fail(f"no run {identifier} is recorded here: webhook-api deployments list")
    for row in found:
        if as_json:
            echo_json(row["record"])
        else:
            _show(row["record"])


def _found(**wanted: Any) -> list[dict[str, Any]]:
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.deployments import listed

    with connected(settings(NEEDS_MIGRATE)) as connection:
        return listed(connection, **wanted)


def _show(record: dict[str, Any]) -> None:
    click.echo(printable(f"{record['id']} on {record['host']}: {record['kind']}, {record['result']}"))
    for name in (
        "reason",
        "failed_at",
        "started",
        "ended",
        "seconds",
        "who",
        "controller",
        "version",
        "from",
        "to",
    ):
        if record.get(name) not in (None, ""):
            click.echo(printable(f"  {name}: {record[name]}"))
    if isinstance(record.get("images"), dict):
        for name, digest in sorted(record["images"].items()):
            click.echo(printable(f"  image {name}: {digest}"))
    if record.get("changed"):
        click.echo(printable(f"  changed: {', '.join(map(str, record['changed']))}"))
    for step in record.get("steps") or []:
        if isinstance(step, dict):
            parts = [str(step[key]) for key in ("step", "service") if step.get(key)]
            click.echo(printable(f"  {' '.join(parts)}: {step.get('seconds', '?')} s"))
