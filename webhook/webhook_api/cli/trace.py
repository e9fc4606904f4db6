"""``trace``: one request through all backends."""

from __future__ import annotations

import json
from typing import Any

import click

from webhook_api.cli.common import EX_FAILED, EX_UNAVAILABLE, fail, first_line, settings


@click.command("trace")
@click.argument("request_id")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--remove", "removing", is_flag=True, help="Remove everything of a probe (only of probes).")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait this long for it to be done or dead everywhere; --remove then removes in either case.",
)
def command(request_id: str, as_json: bool, removing: bool, wait: float | None) -> None:
    """Follow REQUEST_ID through all backends: rows, effects, stream entry, objects.

    Exits 1 when nothing of it has arrived; with --wait and without --remove also when time was up too early.
    """
    from webhook_api import tracing
    from webhook_api.config import NEEDS_BACKENDS

    loaded = settings(NEEDS_BACKENDS)
    tracing.keep_out(loaded)

    from webhook_api.trace import TraceError, settled, trace_and_remove
    from webhook_api.trace import trace as follow

    try:
        found = (trace_and_remove if removing else follow)(loaded, request_id, wait or 0.0)
    except TraceError as error:
        if error.found is not None and wait is not None:
            # Who waited for it learns what came of it, also when it could not be removed.
            _show_trace(error.found, as_json)
        unreachable = error.reason in {"database_unavailable", "backend_unavailable"}
        fail(first_line(error), EX_UNAVAILABLE if unreachable else EX_FAILED)
    _show_trace(found, as_json)
    if not found["found"] and not removing:
        fail(f"no delivery with the request id {request_id} has arrived")
    if wait is not None and not removing and not settled(found):
        fail(f"{request_id} was not done everywhere after {wait:g} s")


def _show_trace(found: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(found, default=str, indent=2) if as_json else _readable(found))


def _readable(found: dict[str, Any]) -> str:
    lines = [f"request {found['request_id']}"]
    for row in found["deliveries"]:
        lines.append(
            f"  delivery {row['id']}: {row['source']} {row['status']}, state {row['state']}, arrived "
            f"{row['attempts']} time(s), first {row['first_seen_at']}, tried {row['tries']} time(s)"
        )
        if row["last_error"]:
            lines.append(f"    last error: {row['last_error']}")
        for effect in row["effects"]:
            lines.append(f"    effect {effect['name']}: {effect['state']}" + _suffix(effect["last_error"]))
        entry = row["stream_entry"]
        if entry:
            lines.append(f"    stream {entry['stream']}: {entry['id']}" + _suffix(entry.get("error")))
        for item in row["objects"]:
            size = f"{item['size']} bytes" if item["exists"] else "missing"
            lines.append(f"    object {item['key']}: " + item.get("error", size))
    if "removed" in found:
        lines.append("  removed: " + ", ".join(f"{count} {what}" for what, count in found["removed"].items()))
    return "\n".join(lines)


def _suffix(error: str | None) -> str:
    return f" ({error})" if error else ""
