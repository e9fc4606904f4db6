"""What pages and API show: filters read from a query, pages by key, one delivery, avatars, and how it all is."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

import click
from psycopg import errors, sql

from webhook_api import console, deployments
from webhook_api.actions import DEAD_LETTERS
from webhook_api.cli import filters
from webhook_api.console import Filter, rows
from webhook_api.db import Connection
from webhook_api.effects.avatar_table import in_training, read_columns
from webhook_api.states import EffectError
from webhook_api.web import look

PAGE: Final = 50
MOST: Final = 200
LONGEST: Final = 300
"""Characters of one value of a filter."""
BODY_MOST: Final = 256 * 1024
"""Bytes of a body that are shown."""
TEXT_WITHIN: Final = timedelta(hours=1)
"""How far back a text is looked for, unless the filter says how far."""
QUEUES: Final = {"dead-letters": DEAD_LETTERS, "parked": "d.state = 'parked'"}
_WITHHELD: Final = ("secret", "authorization", "cookie", "token", "password", "api-key", "apikey")

_ROLLUPS: Final = """
select starts_at, deliveries, failed, done, dead, latency_p50, latency_p95 from webhook.rollups
where starts_at > now() - interval '24 hours' order by starts_at
"""
_NEWEST: Final = "select id, last_seen_at from webhook.deliveries order by id desc limit 1"
_AVATARS: Final = """
select a.id::text as id, a.name::text as name, lower(a.training_type::text) as training_type, a.training_progress,
       a.training_started_at, a.fal_request_id::text as request_id, d.id as delivery_id, d.state, d.status,
       d.next_attempt_at, r.state as asked_state, r.next_at as asked_at
from (select * from public.avatars where {training} order by training_started_at limit 200) a
left join lateral (select id, state, status, next_attempt_at from webhook.deliveries
                   where request_id = a.fal_request_id::text order by id desc limit 1) d on true
left join webhook.reconciliations r on r.request_id = a.fal_request_id::text
order by a.training_started_at
"""


class FilterInvalid(ValueError):
    """A value of a filter cannot be used. ``field`` is its name."""

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(f"{field}: this value cannot be used")


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list. ``older`` and ``newer`` are the keys to go on with; None: there is nothing.

    ``reached``: arrival of the delivery up to which it was looked, where that gave less than a page and more lies behind;
    ``looked`` at so many.
    """

    rows: list[dict[str, Any]]
    older: int | None
    newer: int | None
    reached: datetime | None = None
    looked: int = 0


FIELDS: Final = (
    "since",
    "until",
    "source",
    "status",
    "state",
    "request_id",
    "avatar_id",
    "text",
    "reason",
    "aside",
)


def values_of(given: Mapping[str, str]) -> dict[str, str]:
    """The filter's fields as they were given, without empty ones. Raises FilterInvalid."""
    found = {name: given.get(name, "").strip() for name in FIELDS}
    for name, value in found.items():
        if len(value) > LONGEST or "\x00" in value or not _encodes(value):
            raise FilterInvalid(name)
    return {name: value for name, value in found.items() if value}


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_filter(values: Mapping[str, str], zone: ZoneInfo, *, bodies: bool) -> Filter:
    """The filter of some fields. ``bodies``: whether the reader may look for text, which bodies hold. FilterInvalid."""
    for name, known in (("status", filters.STATUSES), ("state", filters.STATES)):
        if values.get(name) and values[name] not in known:
            raise FilterInvalid(name)
    for name in ("reason", "aside"):
        if values.get(name) and not (values[name].replace("_", "").isalnum() and values[name].isascii()):
            raise FilterInvalid(name)
    if values.get("text") and not bodies:
        raise FilterInvalid("text")
    since = _moment("since", values, zone)
    if values.get("text") and since is None and not values.get("request_id"):
        since = datetime.now(UTC) - TEXT_WITHIN
    return Filter(
        since=since,
        until=_moment("until", values, zone),
        source=values.get("source"),
        status=values.get("status"),
        states=(values["state"],) if values.get("state") else (),
        request_ids=(values["request_id"],) if values.get("request_id") else (),
        avatar_id=values.get("avatar_id"),
        text=values.get("text"),
        reason=values.get("reason"),
        aside=values.get("aside"),
    )


def _moment(name: str, values: Mapping[str, str], zone: ZoneInfo) -> datetime | None:
    text = values.get(name)
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
        found = found if found.tzinfo else found.replace(tzinfo=zone)
        found.astimezone(UTC)
        return found
    except OverflowError:
        raise FilterInvalid(name) from None
    except ValueError:
        pass
    try:
        return filters.Moment().convert(text, None, None)
    except click.BadParameter:
        raise FilterInvalid(name) from None


def key_of(text: str | None) -> int | None:
    """A delivery's number out of a query. Raises FilterInvalid."""
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise FilterInvalid("after")
    return int(text)


def page(connection: Connection, wanted: Filter, *, after: int | None = None, before: int | None = None,
         extra: str = look.EVERYTHING, limit: int = PAGE) -> Page:  # fmt: skip
    """A page of deliveries, the newest first: what is older than ``after``, or newer than ``before``."""
    wanted = console.resolved(connection, wanted, deep=False)
    backwards = before is not None
    seen = look.through(
        connection, wanted, limit=limit + 1, after=before if backwards else after, oldest_first=backwards, extra=extra
    )  # fmt: skip
    more, found = len(seen.rows) > limit, seen.rows[:limit]
    stopped, reached = seen.last or (None, None)
    if backwards:
        found.reverse()
    if not found:
        return Page([], None if backwards else stopped, stopped if backwards else None, reached, seen.looked)
    older = found[-1]["id"] if (more or backwards) else stopped
    newer = found[0]["id"] if (after is not None or (backwards and more)) else None
    return Page(found, older, stopped or newer if backwards else newer, reached, seen.looked)


def queue(connection: Connection, name: str, wanted: Filter, **where: Any) -> Page:
    """A page of what waits for an operator (dead-letters), or for the bot's row (parked)."""
    return page(connection, wanted, extra=QUEUES[name], **where)


def delivery(connection: Connection, identifier: int, *, bodies: bool) -> dict[str, Any] | None:
    """One delivery with all that is known of it; headers and body only for who may see them."""
    found = console.shown(connection, Filter(ids=(identifier,)), body=bodies)
    return found[0] if found else None


def kept_headers(row: Mapping[str, Any]) -> dict[str, str]:
    """Headers as they arrived; what could be a secret is withheld."""
    given = row.get("headers") or {}
    return {
        str(name): "***" if any(part in str(name).lower() for part in _WITHHELD) else str(value)
        for name, value in sorted(given.items())
    }


def body_of(row: Mapping[str, Any]) -> bytes | None:
    """The body; None where only the archive has it."""
    kept = row.get("body_base64")
    return None if kept is None else base64.b64decode(kept)


def pretty(body: bytes) -> str | None:
    """JSON with its parts on lines of their own; None for what is no JSON, or too much of it."""
    if len(body) > BODY_MOST:
        return None
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def curl(row: Mapping[str, Any], body: bytes) -> str:
    """A command that sends the delivery again as it came. Withheld headers are left out."""
    path = (
        "/api/v1/avatar/status_update"
        if row["source"] in ("fal", "manual")
        else f"/api/v1/sources/{row['source']}"
    )
    parts = ["curl", "-sS", "-X", "POST", f"http://localhost{path}", "-H", "Content-Type: application/json"]
    for name, value in kept_headers(row).items():
        if value != "***" and name.lower() not in ("content-type", "content-length", "host"):
            parts += ["-H", f"{name}: {value}"]
    text = body.decode("utf-8", "replace")
    if text.encode() == body and text.isprintable():
        return shlex.join([*parts, "--data-binary", text])
    sent = base64.b64encode(body).decode("ascii")
    return f"echo {sent} | base64 -d | {shlex.join([*parts, '--data-binary', '@-'])}"


def timeline(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What happened to a delivery, in the order of time: ``{"at", "what", "name", "state", "detail"}``."""
    found = [_step(row["first_seen_at"], "arrived")]
    if row["attempts"] > 1:
        found.append(_step(row["last_seen_at"], "again", str(row["attempts"])))
    found += [_step(item["seen_at"], "variant", "", "", item["body_sha256"]) for item in row["variants"]]
    found += [
        _step(
            item["updated_at"],
            "effect",
            item["name"],
            item["state"],
            item["last_error"] or item["detail"].get("why"),
        )
        for item in row["effects"]
    ]
    found += [_step(deed["at"], "deed", deed["action"], "", deed["who"]) for deed in row["audit"]]
    for name, what in (("done_at", "done"), ("discarded_at", "discarded"), ("replayed_at", "replayed")):
        if row[name] is not None:
            found.append(_step(row[name], what))
    if row["state"] in ("retry", "parked", "pending"):
        found.append(_step(row["next_attempt_at"], "next"))
    return sorted(found, key=lambda step: step["at"])


def _step(
    at: datetime, what: str, name: str = "", state: str = "", detail: str | None = None
) -> dict[str, Any]:
    return {"at": at, "what": what, "name": name, "state": state, "detail": detail}


def avatar_id(row: Mapping[str, Any]) -> str | None:
    """The avatar that a delivery belongs to, as its effect has recorded it."""
    found = [item["detail"].get("avatar_id") for item in row["effects"] if item["name"] == "avatar"]
    return str(found[0]) if found and found[0] else None


def avatars(connection: Connection) -> list[dict[str, Any]] | None:
    """Avatars in training, the oldest first, and what each waits for; None where the bot's table cannot be read."""
    try:
        status = read_columns(connection)["status"]
        found = rows(connection.execute(sql.SQL(_AVATARS).format(training=in_training(status))))
    except (EffectError, errors.UndefinedTable, errors.UndefinedColumn, errors.InsufficientPrivilege):
        return None
    for row in found:
        row["waits_for"] = _waits_for(row)
    return found


def _waits_for(row: Mapping[str, Any]) -> str:
    if not row["request_id"]:
        return "submission"
    if row["state"] == "dead":
        return "operator"
    if row["state"] in console.WAITING:
        return "worker"
    if row["asked_state"] == "given_up":
        return "nobody"
    return "fal"


@dataclass(frozen=True, slots=True)
class Runs:
    """A page of deployment records. ``after`` and ``host`` name the last of it, where there are older ones."""

    rows: list[dict[str, Any]]
    after: str | None = None
    host: str | None = None


def runs(
    connection: Connection, after: str | None = None, host: str | None = None, limit: int = PAGE
) -> Runs:
    """Deployment records, the newest first; those older than the record of a run on a host."""
    for value in (after, host):
        if value is not None and (len(value) > LONGEST or "\x00" in value or not _encodes(value)):
            raise FilterInvalid("after")
    found = deployments.listed(connection, limit=limit + 1, beyond=(after, host) if after and host else None)
    rows = found[:limit]
    return Runs(rows, rows[-1]["id"], rows[-1]["host"]) if len(found) > limit else Runs(rows)


def rollups(connection: Connection) -> list[dict[str, Any]]:
    """Counts of each five minutes of the last 24 hours; 288 rows at most."""
    return rows(connection.execute(_ROLLUPS))


def by_hour(found: list[dict[str, Any]], now: datetime) -> list[dict[str, Any]]:
    """The same by the hour, an entry for every one of the last 24. Latencies are the worst of the hour's parts."""
    first = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=23)
    hours = [
        {
            "starts_at": first + timedelta(hours=index),
            "deliveries": 0,
            "failed": 0,
            "dead": 0,
            "p50": None,
            "p95": None,
        }
        for index in range(24)
    ]
    for row in found:
        index = int((row["starts_at"] - first).total_seconds() // 3600)
        if 0 <= index < 24:
            _add(hours[index], row)
    return hours


def _add(hour: dict[str, Any], row: Mapping[str, Any]) -> None:
    for name in ("deliveries", "failed", "dead"):
        hour[name] += row[name]
    for short, name in (("p50", "latency_p50"), ("p95", "latency_p95")):
        if row[name] is not None:
            hour[short] = max(hour[short] or 0.0, float(row[name]))


def newest(connection: Connection) -> tuple[int, datetime | None]:
    """Number and time of the delivery that came last."""
    row = connection.execute(_NEWEST).fetchone()
    return (int(row[0]), row[1]) if row else (0, None)


def fixed(wanted: Filter, values: Mapping[str, str]) -> dict[str, str]:
    """Fields of a filter whose times no longer move, for a form that is sent later."""
    given = dict(values)
    if wanted.since is not None:
        given["since"] = wanted.since.isoformat()
    if wanted.until is not None:
        given["until"] = wanted.until.isoformat()
    return given


def only(identifier: int) -> Filter:
    """A filter for one delivery."""
    return replace(Filter(), ids=(identifier,))
