"""Incidents: dead letters or stuck deliveries, from when they appear until they are gone. The pure part: no clock, no I/O.

    (none) --the state is seen--> open --not seen for `settle` seconds--> closed

Of each incident every channel is told twice: that it was opened, and that it was closed. One that is over before it could be
told is not told. `worker.notices` keeps the rows and sends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api.gauges import Inbox

DEAD_LETTERS: Final = "dead_letters"
STUCK: Final = "stuck"
KINDS: Final = (DEAD_LETTERS, STUCK)
OPENED: Final = "opened"
CLOSED: Final = "closed"
UNFINISHED: Final = ("pending", "leased", "retry")
"""States of a delivery that somebody waits for. What is parked waits for the bot, and has its own patience."""
_TITLES: Final = {
    (DEAD_LETTERS, OPENED): "🚨 Deliveries were given up",
    (DEAD_LETTERS, CLOSED): "✅ No dead letters any more",
    (STUCK, OPENED): "🚨 Deliveries are stuck",
    (STUCK, CLOSED): "✅ No delivery is stuck any more",
}
_REMEDY: Final = {DEAD_LETTERS: "webhook-api dead-letters list", STUCK: "webhook-api doctor"}


@dataclass(frozen=True, slots=True)
class Sighting:
    """What is wrong at this moment: how many deliveries, and the age in seconds of the oldest."""

    deliveries: int
    oldest_seconds: float


@dataclass(frozen=True, slots=True)
class Incident:
    """A row of `webhook.incidents`. `told`: by channel, the last notice that arrived there."""

    id: int
    kind: str
    opened_at: datetime
    closed_at: datetime | None
    quiet_seconds: float
    """For how long its state has not been seen."""
    deliveries: int
    oldest_seconds: float
    told: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Changes:
    """What a look comes to: kinds to open, ids that were seen again, ids to close."""

    opened: Mapping[str, Sighting]
    seen: tuple[int, ...]
    closed: tuple[int, ...]


def sightings(inbox: Inbox, stuck_seconds: float) -> dict[str, Sighting]:
    """What of the inbox needs a person, by kind."""
    found = {}
    if inbox.count.get("dead", 0):
        found[DEAD_LETTERS] = Sighting(inbox.count["dead"], inbox.oldest.get("dead", 0.0))
    late = [state for state in UNFINISHED if inbox.oldest.get(state, 0.0) > stuck_seconds]
    if late:
        # How many of a state are late is not counted: at ten million rows that is no cheap question.
        found[STUCK] = Sighting(
            sum(inbox.count[state] for state in late), max(inbox.oldest[state] for state in late)
        )
    return found


def changes(seen: Mapping[str, Sighting], incidents: Iterable[Incident], settle_seconds: float) -> Changes:
    """What becomes of the incidents that are open, and which begin. `settle_seconds`: so that nothing flaps."""
    open_ones = {incident.kind: incident for incident in incidents if incident.closed_at is None}
    return Changes(
        opened={kind: sighting for kind, sighting in seen.items() if kind not in open_ones},
        seen=tuple(incident.id for kind, incident in open_ones.items() if kind in seen),
        closed=tuple(
            incident.id
            for kind, incident in open_ones.items()
            if kind not in seen and incident.quiet_seconds >= settle_seconds
        ),
    )


def due(incident: Incident, channel: str) -> str | None:
    """Which notice of an incident a channel has to get now: `opened`, `closed`, or None."""
    told = incident.told.get(channel)
    if incident.closed_at is None:
        return OPENED if told is None else None
    return CLOSED if told == OPENED else None


def message_id(incident: Incident, notice: str) -> str:
    """The same for every attempt. The time is part of it: a database that was made anew gives old numbers again."""
    identity = ("incident", incident.id, incident.opened_at.timestamp(), notice)
    return f"msg_{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}"


def document(incident: Incident, notice: str) -> dict[str, Any]:
    """What a webhook gets (Standard Webhooks: type, timestamp, data)."""
    data: dict[str, Any] = {
        "incident": incident.id,
        "kind": incident.kind,
        "count": incident.deliveries,
        "oldest_seconds": round(incident.oldest_seconds),
        "since": _moment(incident.opened_at),
    }
    at = incident.opened_at
    if notice == CLOSED and incident.closed_at is not None:
        at = incident.closed_at
        data["until"] = _moment(at)
    return {"type": f"incident.{notice}", "timestamp": _moment(at), "data": data}


def title(incident: Incident, notice: str) -> str:
    """The first line of a message to people."""
    return _TITLES[incident.kind, notice]


def lines(incident: Incident, notice: str) -> list[tuple[str, str]]:
    """The other lines, by name."""
    found = [("Since", _moment(incident.opened_at))]
    if notice == CLOSED and incident.closed_at is not None:
        return [*found, ("Until", _moment(incident.closed_at)), ("Incident", str(incident.id))]
    return [
        ("Deliveries", str(incident.deliveries)),
        ("Oldest", f"{incident.oldest_seconds:.0f} s"),
        *found,
        ("Look", _REMEDY[incident.kind]),
        ("Incident", str(incident.id)),
    ]


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
