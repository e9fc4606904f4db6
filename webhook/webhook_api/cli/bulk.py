"""Bulk actions: what a filter matches is shown, confirmed, changed in batches, and recorded in the audit table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from webhook_api.cli.common import EX_FAILED, echo_json, fail, json_option, printable, settings

if TYPE_CHECKING:
    from webhook_api.actions import Action, Done
    from webhook_api.console import Filter
    from webhook_api.db import Connection

Command = Callable[..., Any]
PREVIEW: Final = 10
"""Deliveries that a dry run shows."""


def bulk_options(command: Command) -> Command:
    """Add ``--dry-run``, ``--limit``, ``--yes``, ``--all``, ``--as`` and ``--json``."""
    for option in (
        json_option,
        click.option("--as", "who", metavar="NAME", help="Who does it, for the audit.  [default: this process's user]"),
        click.option("--all", "everything", is_flag=True, help="Do it to all, when no filter is given."),
        click.option("--yes", is_flag=True, help="Do not ask. Needed where nobody can answer, and with --json."),
        click.option("--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True,
                     help="Change at most so many, the oldest first."),
        click.option("--dry-run", is_flag=True, help="Only show how many match, and the first of them."),
    ):  # fmt: skip
        command = option(command)
    return command


def run(wanted: Filter, action: Action, *, dry_run: bool, limit: int, yes: bool, everything: bool, who: str | None,
        as_json: bool) -> None:  # fmt: skip
    """Show, ask, do, report. Exits 1 when a delivery that was named by its id could not be changed."""
    if wanted.empty and not everything:
        raise click.UsageError("give a filter or ids; --all takes everything")
    from webhook_api import actions, audit
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.console import resolved

    loaded = settings(NEEDS_MIGRATE)
    operation = audit.Operation(audit.whoami(who), loaded.instance_id, action.name, wanted.said())
    with connected(loaded) as connection:
        wanted = resolved(connection, wanted)
        report = _preview(connection, action, wanted, limit, dry_run)
        if not dry_run and report["matched"]:
            _ask(report, yes, as_json)
            done = actions.Done(str(operation.id))
            try:
                actions.perform(connection, action, wanted, limit, operation, done)
            except Exception:
                click.echo(f"{done.changed} were changed before this (operation {done.operation}):", err=True)
                raise
            _add(report, done, operation.who)
        report["not_changed"] = _left(connection, wanted, report) if wanted.ids else []
    echo_json(report) if as_json else _tell(report)
    if report["not_changed"]:
        sys.exit(EX_FAILED)


def _preview(
    connection: Connection, action: Action, wanted: Filter, limit: int, dry_run: bool
) -> dict[str, Any]:
    from webhook_api.console import COUNTED_MAX, counted, listed

    states = counted(connection, wanted, f"({action.eligible})")
    found = listed(connection, wanted, limit=PREVIEW, oldest_first=True, extra=f"({action.eligible})")
    matched = sum(states.values())
    return {
        "action": action.name,
        "filter": wanted.said(),
        "dry_run": dry_run,
        "matched": matched,
        "more_than_counted": matched > COUNTED_MAX,
        "states": states,
        "limit": limit,
        "preview": found,
        "changed": 0,
        "left_out": _left_out(connection, action, wanted),
    }


def _left_out(connection: Connection, action: Action, wanted: Filter) -> int:
    from webhook_api.console import counted

    return sum(counted(connection, wanted, f"({action.left_out})").values()) if action.left_out else 0


def _ask(report: dict[str, Any], yes: bool, as_json: bool) -> None:
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise click.UsageError(f"{_matched(report)} match: look with --dry-run, then give --yes")
    _echo_preview(report)
    number = min(report["matched"], report["limit"])
    if not click.confirm(f"{report['action']}: change {number} deliveries?", err=True):
        fail("nothing was changed")


def _add(report: dict[str, Any], done: Done, who: str) -> None:
    report |= {
        "changed": done.changed,
        "outcomes": done.outcomes,
        "delivery_ids": done.ids,
        # A record is written with each change: where nothing was changed there is none.
        "operation": done.operation if done.changed else None,
        "who": who,
    }


def _left(connection: Connection, wanted: Filter, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The deliveries that were named and are not among those that match or were changed, with their state."""
    from webhook_api.console import listed

    touched = set(report.get("delivery_ids", ()))
    if report["dry_run"]:
        touched = {delivery["id"] for delivery in report["preview"]}
    missing = tuple(identifier for identifier in wanted.ids if identifier not in touched)
    if report["dry_run"] and report["matched"] > len(report["preview"]):
        return []
    only = replace(wanted, ids=missing)
    states = {row["id"]: _why(row) for row in listed(connection, only, limit=10_000)} if missing else {}
    return [{"id": identifier, "state": states.get(identifier)} for identifier in missing]


def _why(row: dict[str, Any]) -> str:
    waiting = row["state"] == "retry" and row["replayed_at"] and not row["tries"]
    marks = ["a replay of it waits for the worker already"] if waiting else []
    marks += [f"its body was cleared: prune --restore {row['id']}"] if row["pruned"] else []
    marks += ["discarded"] if row["discarded_at"] else []
    return ", ".join([str(row["state"]), *marks])


def _matched(report: dict[str, Any]) -> str:
    return f"more than {report['matched'] - 1}" if report["more_than_counted"] else str(report["matched"])


def _echo_preview(report: dict[str, Any]) -> None:
    from webhook_api.cli.listing import echo_deliveries

    echo_deliveries(report["preview"])
    states = ", ".join(f"{number} {state}" for state, number in sorted(report["states"].items()))
    click.echo(f"{report['action']}: {_matched(report)} match" + (f" ({states})" if states else ""))
    _tell_left_out(report)
    if report["matched"] > report["limit"]:
        click.echo(f"Only the oldest {report['limit']} are changed at once (--limit).")


def _tell_left_out(report: dict[str, Any]) -> None:
    if report["left_out"]:
        click.echo(
            f"{report['left_out']} that were kept aside are left out: --aside any takes them, or their ids"
        )


def _tell(report: dict[str, Any]) -> None:
    if report["dry_run"]:
        _echo_preview(report)
        click.echo("Nothing was changed (--dry-run).")
    elif not report["matched"]:
        click.echo("nothing matches")
        _tell_left_out(report)
    elif not report["changed"]:
        click.echo(f"{report['action']}: nothing was changed and nothing recorded: a worker or another command has them "
                   "just now")  # fmt: skip
    else:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(report["outcomes"].items()))
        click.echo(f"{report['action']}: {report['changed']} of {_matched(report)} changed ({outcomes or 'none'}), "
                   f"recorded for {printable(report['who'])} as operation {report['operation']}")  # fmt: skip
    for item in report["not_changed"]:
        state = item["state"] or "not there, or not among what the filter takes"
        click.echo(f"delivery {item['id']} was not changed: {state}", err=True)
