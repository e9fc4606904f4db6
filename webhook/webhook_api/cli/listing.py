"""Lists of deliveries, and one delivery in full, for people and for programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from webhook_api.cli.common import echo_lines, echo_table, json_option, printable, settings

if TYPE_CHECKING:
    from webhook_api.console import Filter

Command = Callable[..., Any]
_HEAD: Final = ("id", "first seen", "source", "request", "status", "state", "arrived", "tries", "error")


def page_options(command: Command) -> Command:
    """Add ``--limit``, ``--after``, ``--oldest-first`` and ``--json``."""
    for option in (
        json_option,
        click.option("--oldest-first", is_flag=True, help="In the order of arrival."),
        click.option(
            "--after", type=click.IntRange(1, 2**63 - 1), metavar="ID", help="The page after this delivery."
        ),
        click.option(
            "--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Rows of a page."
        ),
    ):
        command = option(command)
    return command


def echo_page(
    wanted: Filter, extra: str, *, limit: int, after: int | None, oldest_first: bool, as_json: bool
) -> None:
    """Print one page. Where there may be more, how to get it goes to standard error."""
    from webhook_api.cli.database import connected
    from webhook_api.config import NEEDS_MIGRATE
    from webhook_api.console import listed, resolved

    with connected(settings(NEEDS_MIGRATE)) as connection:
        found = listed(
            connection,
            resolved(connection, wanted),
            limit=limit,
            after=after,
            oldest_first=oldest_first,
            extra=extra,
        )
    if as_json:
        echo_lines(found)
    else:
        echo_deliveries(found)
    if len(found) == limit:
        click.echo(f"There may be more: --after {found[-1]['id']}", err=True)


def echo_deliveries(found: Sequence[dict[str, Any]]) -> None:
    """Print deliveries as a table, or that there are none."""
    if not found:
        click.echo("none")
        return
    echo_table(_HEAD, (_row(delivery) for delivery in found))


def _row(delivery: dict[str, Any]) -> tuple[Any, ...]:
    return (
        delivery["id"],
        delivery["first_seen_at"],
        delivery["source"],
        delivery["request_id"],
        delivery["status"],
        state(delivery),
        delivery["attempts"],
        delivery["tries"],
        delivery["last_error"],
    )


def state(delivery: dict[str, Any]) -> str:
    """The state with what an operator must know about it."""
    marks = [delivery["aside"], "discarded" if delivery["discarded_at"] else None]
    said = ", ".join(mark for mark in marks if mark)
    return f"{delivery['state']} ({said})" if said else str(delivery["state"])


def list_command(extra: str, **which: bool) -> Callable[[Command], Command]:
    """Make a command's body out of its docstring: a page of what matches ``extra`` and the filter."""
    from webhook_api.cli.filters import filters

    def decorate(described: Command) -> Command:
        @filters(ids=False, **which)
        @page_options
        @functools.wraps(described)
        def call(wanted: Filter, **page: Any) -> None:
            echo_page(wanted, extra, **page)

        return call

    return decorate


def echo_delivery(delivery: dict[str, Any]) -> None:
    """Print one delivery in full."""
    click.echo(
        f"delivery {delivery['id']}: {delivery['source']} {delivery['status']}, state {state(delivery)}"
    )
    for name in ("request_id", "gateway_request_id", "account_id", "edge_request_id", "training_type_hint", "dedup_key",
                 "body_sha256", "body_bytes"):  # fmt: skip
        _field(name, delivery[name])
    _field("arrived", f"{delivery['attempts']} time(s), first {_when(delivery['first_seen_at'])}, "
                      f"last {_when(delivery['last_seen_at'])}")  # fmt: skip
    _field("tried", f"{delivery['tries']} time(s), lost its worker {delivery['crashes']} time(s)")
    for name in ("next_attempt_at", "done_at", "discarded_at", "replayed_at"):
        if delivery["state"] not in ("done", "dead") or name != "next_attempt_at":
            _field(name, _when(delivery[name]))
    if delivery["pruned"]:
        _field("pruned", "its body and headers stand in the archive only")
    _field("last_error", delivery["last_error"])
    for effect in delivery["effects"]:
        said = effect["last_error"] or effect["detail"].get("why") or ""
        click.echo(
            f"  effect {effect['name']}: {effect['state']}" + (f" ({printable(said)})" if said else "")
        )
    for variant in delivery["variants"]:
        click.echo(
            f"  another body, {variant['body_bytes']} bytes, seen {_when(variant['seen_at'])}: {variant['body_sha256']}"
        )
    for deed in delivery["audit"]:
        click.echo(f"  {_when(deed['at'])}: {deed['action']} by {printable(deed['who'])}")


def _field(name: str, value: Any) -> None:
    if value not in (None, ""):
        click.echo(f"  {name}: {printable(str(value))}")


def _when(value: Any) -> str:
    return value.astimezone().isoformat(sep=" ", timespec="seconds") if value is not None else ""
