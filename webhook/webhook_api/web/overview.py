"""Is it well? One sentence, and the numbers behind it. Counts come from the gauges and the rollups alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api.console import rows
from webhook_api.db import Connection
from webhook_api.gauges import CAP, Inbox
from webhook_api.web import lists
from webhook_api.web.monitor import Seen
from webhook_api.web.services import Services

LATE_SECONDS: Final = 120.0
"""A delivery that was never tried for so long says that the worker does not keep up."""
CERTIFICATE_DAYS: Final = 21

_RUNNING: Final = """
select id, host, kind, result, to_release, started_at, ended_at from webhook.deployments
where result in ('done', 'unchanged') order by started_at desc limit 1
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. ``key`` names its message; ``level`` is bad or warn."""

    level: str
    key: str
    values: dict[str, Any]


def gather(services: Services, connection: Connection) -> dict[str, Any]:
    """All that the Overview shows."""
    inbox, seen = services.inbox(connection), services.monitor.seen
    counted = lists.rollups(connection)
    _, last = lists.newest(connection)
    running = rows(connection.execute(_RUNNING))
    found = findings(inbox, seen)
    return {
        "level": "bad" if any(item.level == "bad" for item in found) else "warn" if found else "ok",
        "findings": found,
        "inbox": inbox,
        "cap": CAP,
        "oldest": max(
            (inbox.oldest.get(state, 0.0) for state in ("pending", "leased", "retry")), default=0.0
        ),
        "hours": lists.by_hour(counted, datetime.now(UTC)),
        "recent": _recent(counted),
        "last": last,
        "running": running[0] if running else None,
        "instances": seen.instances,
        "keys_age": _worst(seen, "keys", "age_seconds"),
        "spool": _worst(seen, "spool", "rows"),
        "certificate": seen.certificate_ends,
    }


def _recent(counted: list[dict[str, Any]]) -> dict[str, Any]:
    hour = counted[-12:]
    return {
        "day": sum(row["deliveries"] for row in counted),
        "failed": sum(row["failed"] for row in counted),
        "p50": max((row["latency_p50"] for row in hour if row["latency_p50"] is not None), default=None),
        "p95": max((row["latency_p95"] for row in hour if row["latency_p95"] is not None), default=None),
    }


def _worst(seen: Seen, check: str, name: str) -> float | None:
    found = [instance.check(check).get(name) for instance in seen.instances]
    return max((float(value) for value in found if isinstance(value, int | float)), default=None)


def findings(inbox: Inbox, seen: Seen) -> list[Finding]:
    """What is not as it should be, the worst first."""
    found = []
    if inbox.count.get("dead"):
        found.append(Finding("bad", "finding.dead", {"n": inbox.count["dead"]}))
    late = inbox.oldest.get("pending", 0.0)
    if late > LATE_SECONDS:
        found.append(Finding("bad", "finding.late", {"seconds": late}))
    for instance in seen.instances:
        if instance.status in ("away", "unhealthy"):
            found.append(Finding("bad", "finding.away", {"name": instance.name}))
        elif instance.status == "degraded":
            found.append(Finding("warn", "finding.degraded", {"name": instance.name}))
    if seen.certificate_ends is not None:
        days = (seen.certificate_ends - datetime.now(UTC)).days
        if days < CERTIFICATE_DAYS:
            found.append(Finding("bad" if days < 3 else "warn", "finding.certificate", {"n": days}))
    for state in ("aside", "parked"):
        if inbox.count.get(state):
            found.append(Finding("warn", f"finding.{state}", {"n": inbox.count[state]}))
    return sorted(found, key=lambda item: item.level)
