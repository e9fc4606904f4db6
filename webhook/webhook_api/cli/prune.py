"""``prune``: clear away now what is old, show the sizes of the tables, or bring a cleared delivery back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from webhook_api.cli.common import EX_LATER, echo_json, echo_table, fail, json_option, settings

if TYPE_CHECKING:
    from webhook_api.config import Settings
    from webhook_api.retention import Report

STEPS = ("bodies", "variants", "effects", "deliveries", "dead_letters", "discarded", "aside", "samples", "audit",
         "reconciliations")  # fmt: skip


@click.command("prune")
@click.option("--dry-run", is_flag=True, help="Only count what is old enough.")
@click.option("--limit", type=click.IntRange(1, 100_000_000), help="Stop after so many rows.")
@click.option(
    "--only", type=click.Choice(STEPS), multiple=True, help="This step alone; may be given more than once."
)
@click.option(
    "--sizes", "showing", is_flag=True, help="Show the tables with their sizes, and change nothing."
)
@click.option(
    "--restore",
    type=click.IntRange(min=1),
    metavar="ID",
    help="Bring a delivery's body back from the archive.",
)
@click.option(
    "--as", "who", metavar="NAME", help="Who does it, for the audit.  [default: this process's user]"
)
@json_option
def command(dry_run: bool, limit: int | None, only: tuple[str, ...], showing: bool, restore: int | None,
            who: str | None, as_json: bool) -> None:  # fmt: skip
    """Clear away what is older than the settings RETENTION_…_DAYS say, as the worker does every hour.

    Exits 1 when a step could not go on, 75 when a worker is at it just now.
    """
    from webhook_api.config import NEEDS_MIGRATE, Need

    if showing or dry_run:
        loaded = settings(NEEDS_MIGRATE)
        (_sizes if showing else _dry)(loaded, only, as_json)
        return
    loaded = settings(NEEDS_MIGRATE | {Need.OBJECT_STORE})
    if restore is not None:
        _restore(loaded, restore, who, as_json)
    else:
        _run(loaded, limit, only, who, as_json)


def _sizes(loaded: Settings, _only: tuple[str, ...], as_json: bool) -> None:
    from webhook_api import retention

    with retention.session(loaded, "webhook-cli") as connection:
        tables = retention.sizes(connection)
    if as_json:
        echo_json({"tables": tables})
    elif tables:
        echo_table(list(tables[0]), [[_shown(value) for value in table.values()] for table in tables])


def _shown(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _dry(loaded: Settings, only: tuple[str, ...], as_json: bool) -> None:
    from webhook_api import retention

    with retention.session(loaded, "webhook-cli") as connection:
        pruner = retention.Pruner(loaded.retention, retention.object_store(loaded))
        report = pruner.matching(connection, only)
    if as_json:
        echo_json({"dry_run": True, **report.document()})
        return
    echo_table(
        ("step", "older than", "rows"),
        [
            (name, f"{each.days} d", f"more than {retention.COUNTED_MAX:,}" if each.rows > retention.COUNTED_MAX
             else f"{each.rows:,}")
            for name, each in report.steps.items()
        ],
    )  # fmt: skip
    click.echo("Nothing was changed (--dry-run).")


def _run(loaded: Settings, limit: int | None, only: tuple[str, ...], who: str | None, as_json: bool) -> None:
    from webhook_api import retention

    with retention.session(loaded, "webhook-cli") as connection:
        pruner = retention.Pruner(loaded.retention, retention.object_store(loaded))
        report = pruner.run(connection, limit=limit, only=only)
        if report.rows:
            asked = {"limit": limit, "only": list(only)}
            _audit(connection, loaded, who, "prune.run", asked, report.rows, report.document())
    _tell(report, as_json)
    if report.outcome == "busy":
        fail("a worker, or somebody else, prunes just now: try again", EX_LATER)
    if report.outcome == "failed":
        fail("a step could not go on: " + "; ".join(e for each in report.steps.values() for e in each.errors))


def _tell(report: Report, as_json: bool) -> None:
    if as_json:
        echo_json(report.document())
        return
    echo_table(
        ("step", "older than", "rows", "batches", "seconds"),
        [(name, f"{each.days} d", f"{each.rows:,}", each.batches, f"{each.seconds:.2f}")
         for name, each in report.steps.items()],
    )  # fmt: skip
    click.echo(f"{report.outcome}: {report.rows:,} rows")


def _restore(loaded: Settings, identifier: int, who: str | None, as_json: bool) -> None:
    from webhook_api import retention

    with retention.session(loaded, "webhook-cli") as connection, connection.transaction():
        try:
            key = retention.restore(connection, retention.object_store(loaded), identifier)
        except retention.RetentionError as error:
            fail(str(error))
        if key is not None:
            _audit(
                connection, loaded, who, "prune.restore", {"ids": [identifier]}, 1, {"key": key}, [identifier]
            )
    if as_json:
        echo_json({"id": identifier, "restored_from": key})
    elif key is None:
        click.echo(f"delivery {identifier} has its body: nothing was cleared, and nothing restored")
    else:
        click.echo(
            f"delivery {identifier} has its body again, from {key}; retention takes it again when it is time"
        )


def _audit(connection: Any, loaded: Settings, who: str | None, action: str, asked: dict[str, Any], affected: int,
           detail: dict[str, Any], ids: list[int] | None = None) -> None:  # fmt: skip
    from webhook_api import audit

    operation = audit.Operation(audit.whoami(who), loaded.instance_id, action, asked)
    with connection.transaction():
        audit.record(connection, operation, affected, ids or [], detail)
