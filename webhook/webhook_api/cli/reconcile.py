"""``reconcile``: ask fal's queue now for what no webhook brought, or show what is being asked for."""

from __future__ import annotations

import threading
from typing import Any

import click

from webhook_api.cli.common import (
    EX_LATER,
    EX_UNAVAILABLE,
    echo_json,
    echo_table,
    fail,
    json_option,
    settings,
)

_COLUMNS = ("request_id", "reason", "state", "tries", "result", "next_at", "closed_at", "detail")


@click.command("reconcile")
@click.option("--request-id", help="Ask for this request alone, whether it is due or not.")
@click.option(
    "--training-type", type=click.Choice(["portrait", "style"]), help="Its type, where no avatar says it."
)
@click.option("--dry-run", is_flag=True, help="Show what would be asked for, and ask nothing.")
@click.option("--list", "listing", is_flag=True, help="Show what waits and what was closed within a week.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=200, show_default=True, help="Rows of --list."
)
@click.option(
    "--as", "who", metavar="NAME", help="Who does it, for the audit.  [default: this process's user]"
)
@json_option
def command(
    request_id: str | None,
    training_type: str | None,
    dry_run: bool,
    listing: bool,
    limit: int,
    who: str | None,
    as_json: bool,
) -> None:
    """Ask fal's queue for results that never came, as the worker does every minute.

    A result becomes a delivery of source "reconcile", and goes the way of every delivery. Exits 1 when the request
    asked for was not delivered, 69 when fal could not be asked, 75 when another process is asking just now.
    """
    from webhook_api.config import NEEDS_MIGRATE

    loaded = settings(NEEDS_MIGRATE)
    if listing:
        _list(loaded, request_id, limit, as_json)
        return
    if dry_run:
        _dry(loaded, request_id, as_json)
        return
    if loaded.reconcile.key is None:
        fail("FAL_API_KEY is not set (nor FAL_API_KEY_FILE): fal's queue is not asked", 78)
    _run(loaded, request_id, training_type, who, as_json)


def _connect(loaded: Any) -> Any:
    from webhook_api.db import connect

    return connect(loaded.database_url, "webhook-cli reconcile", statement_timeout=10.0)


def _list(loaded: Any, request_id: str | None, limit: int, as_json: bool) -> None:
    from webhook_api.reconcile import ledger

    with _connect(loaded) as connection:
        found = ledger.listed(connection, limit, request_id)
        now = ledger.summary(connection)
    if as_json:
        echo_json({"enabled": loaded.reconcile.key is not None, "waiting": now.waiting,
                   "oldest_seconds": round(now.oldest, 1), "paused_seconds": round(now.paused_for, 1),
                   "pause_reason": now.pause_reason, "run_at": now.run_at, "requests": found})  # fmt: skip
        return
    click.echo(f"asking: {'on' if loaded.reconcile.key else 'off (FAL_API_KEY is not set)'}"
               + (f"; paused for {now.paused_for:.0f} s: {now.pause_reason}" if now.paused_for else "")
               + f"; waiting: {now.waiting}")  # fmt: skip
    echo_table(_COLUMNS, [[row[name] for name in _COLUMNS] for row in found])


def _dry(loaded: Any, request_id: str | None, as_json: bool) -> None:
    from webhook_api.reconcile import ledger

    # What a run would find is found in a transaction that is rolled back.
    with _connect(loaded) as connection, connection.transaction(force_rollback=True):
        if request_id is None:
            ledger.add(connection, "no_payload", ledger.without_payload(connection))
            ledger.add(connection, "overdue", ledger.overdue(connection, loaded.reconcile))
        else:
            known = ledger.overdue(connection, loaded.reconcile, request_id)
            ledger.add(connection, "asked", known or [(request_id, None)])
        plan = _plan(connection, loaded, request_id)
    if as_json:
        echo_json({"dry_run": True, "enabled": loaded.reconcile.key is not None, "requests": plan})
    else:
        if loaded.reconcile.key is None:
            click.echo("asking is off (FAL_API_KEY is not set): with a key, this would be asked")
        echo_table(("request_id", "reason", "training_type", "what"), [list(row.values()) for row in plan])


def _plan(connection: Any, loaded: Any, only: str | None) -> list[dict[str, Any]]:
    from webhook_api.reconcile import ledger
    from webhook_api.reconcile.runner import models_of

    plan: list[dict[str, Any]] = []
    seen: list[str] = []
    while request := ledger.due(connection, only=only, everything=only is not None, seen=seen):
        seen.append(request.request_id)
        settled = ledger.reported(connection, request.request_id)
        models = ", ".join(models_of(loaded.reconcile, request.training_type))
        plan.append(
            {"request_id": request.request_id, "reason": request.reason, "training_type": request.training_type,
             "what": f"not asked: {settled}" if settled else f"asked under {models}"}
        )  # fmt: skip
    return plan


def _run(
    loaded: Any, request_id: str | None, training_type: str | None, who: str | None, as_json: bool
) -> None:
    from webhook_api.reconcile import Runner, ledger

    if request_id is not None:
        with _connect(loaded) as connection:
            known = ledger.overdue(connection, loaded.reconcile, request_id)
            kind = training_type or (known[0][1] if known else None)
            ledger.add(connection, "asked", [(request_id, kind)])
    runner = Runner(loaded, threading.Event())
    try:
        report = runner.run(only=request_id)
    finally:
        runner.close()
    _audit(loaded, request_id, who, report)
    if as_json:
        echo_json(report.document())
    else:
        click.echo(f"{report.outcome} {report.detail}".strip())
        echo_table(
            ("request_id", "reason", "answer", "became", "detail"),
            [list(row.values()) for row in report.asked],
        )
    if report.outcome == "busy":
        fail("another process is asking just now: try again", EX_LATER)
    if report.outcome == "paused":
        fail(f"fal is not asked at the moment: {report.detail or 'see --list'}", EX_UNAVAILABLE)
    if request_id is not None and not any(row["became"] == "delivered" for row in report.asked):
        fail(f"{request_id} was not delivered: see above, and --list --request-id {request_id}")


def _audit(loaded: Any, request_id: str | None, who: str | None, report: Any) -> None:
    """Record what was asked. The deliveries that came of it have committed before, each by itself."""
    from webhook_api import audit

    operation = audit.Operation(
        audit.whoami(who),
        loaded.instance_id,
        "reconcile.ask",
        {"request_id": request_id} if request_id else {},
    )
    delivered = [row for row in report.asked if row["became"] == "delivered"]
    with _connect(loaded) as connection, connection.transaction():
        audit.record(connection, operation, len(delivered), (), report.document())
