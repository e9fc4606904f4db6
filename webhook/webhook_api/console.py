"""What operators see of the inbox: filters, lists in a stable order, one delivery in full, and the export.

Lists are paged by key (the row's id), never by offset: a page costs the same wherever it stands, and rows that arrive
meanwhile move nothing. Bodies are read only when they are asked for, one at a time.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import errors

from webhook_api.db import Connection

COLUMNS: Final = (
    "id", "source", "request_id", "status", "state", "first_seen_at", "last_seen_at", "attempts", "tries", "crashes",
    "next_attempt_at", "done_at", "aside", "discarded_at", "replayed_at", "last_error", "probe", "account_id",
    "gateway_request_id", "training_type_hint", "edge_request_id", "dedup_key", "body_sha256", "pruned",
)  # fmt: skip
"""What a list says of a delivery, in this order; ``body_bytes`` comes after them."""
WAITING: Final = ("pending", "leased", "retry", "parked")
STATES: Final = (*WAITING, "done", "dead")
PAGE: Final = 500
"""Rows that an export reads at once. No transaction stays open between two pages."""
IDS: Final = 50_000
"""Numbers of deliveries that an export holds at once."""
RECENT: Final = timedelta(days=2)
"""A time that a range index answers by few pages."""
COUNTED_MAX: Final = 100_000
"""A count stops here."""

_SELECT: Final = (
    "select " + ", ".join(f"d.{name}" for name in COLUMNS) + ", octet_length(d.body) as body_bytes"
)
_EFFECTS: Final = """
select name, state, tries, detail, last_error, updated_at from webhook.effects
where delivery_id = %s order by updated_at, name
"""
_VARIANTS: Final = """
select body_sha256, octet_length(body) as body_bytes, seen_at from webhook.delivery_variants
where delivery_id = %s order by seen_at
"""
# `@>` and not `any`: an index answers it.
_AUDIT: Final = """
select id, at, operation, who, instance, action, filter, affected, delivery_ids, detail from webhook.audit
where (%(delivery)s::bigint is null or delivery_ids @> array[%(delivery)s::bigint])
  and (%(after)s::bigint is null or id < %(after)s)
  and (%(action)s::text is null or action = %(action)s)
  and (%(who)s::text is null or who = %(who)s)
order by {key} desc limit %(limit)s
"""
# No cast of the column: its key would answer nothing then.
_REQUESTS_OF_AVATAR: Final = """
select fal_request_id from public.avatars where id = %s and fal_request_id is not null
"""
_REQUESTS_BY_EFFECT: Final = """
select distinct d.request_id from webhook.effects e join webhook.deliveries d on d.id = e.delivery_id
where e.name = 'avatar' and e.detail ->> 'avatar_id' = %s
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which deliveries. Conditions are joined by "and"; an empty filter takes all."""

    ids: tuple[int, ...] = ()
    since: datetime | None = None
    """First seen at this time or later."""
    until: datetime | None = None
    """First seen before this time."""
    source: str | None = None
    status: str | None = None
    states: tuple[str, ...] = ()
    request_ids: tuple[str, ...] = ()
    avatar_id: str | None = None
    """Resolved into request ids by :func:`resolved`."""
    avatar_recorded: str | None = None
    """Of this avatar by what its effect has recorded: no index answers it (:func:`resolved`)."""
    reason: str | None = None
    """A reason in the last error or of an effect, or why it was kept aside. Letters, digits and ``_`` only."""
    text: str | None = None
    """Stands in the last error or in the body, byte for byte or as JSON escapes it."""
    aside: str | None = None
    """Why it was kept aside, or ``any``."""
    probe: bool | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not self.said()

    def said(self) -> dict[str, Any]:
        """What was asked for, as the audit records it."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value.isoformat() if hasattr(value, "isoformat") else value
            for name, value in values.items()
            if value not in (None, ())
        }  # fmt: skip

    @property
    def narrow(self) -> bool:
        """Whether an index finds few rows, so that following the primary key would read far too many."""
        if self.ids or self.request_ids or self.aside or (self.states and "done" not in self.states):
            return True
        if self.since is None:
            return False
        if self.until is not None:
            return True
        # Of a recent time alone the newest rows are the answer; with another condition they may all be in vain.
        asked = (self.source, self.status, self.states, self.reason, self.text, self.probe)
        recent = datetime.now(UTC) - self.since.astimezone(UTC) <= RECENT
        return recent and any(value not in (None, ()) for value in asked)

    def where(self) -> str:
        """Return the SQL condition on ``d``. Its values are :meth:`parameters`; none stands in the text."""
        parts = [sql for name, sql in _CONDITIONS.items() if getattr(self, name) not in (None, ())]
        return " and ".join(f"({part})" for part in parts) or "true"

    def parameters(self) -> dict[str, Any]:
        """Return the values for :meth:`where`."""
        text = self.text or ""
        return {
            "ids": list(self.ids),
            "since": self.since,
            "until": self.until,
            "source": self.source,
            "status": self.status,
            "states": list(self.states),
            "request_ids": list(self.request_ids),
            "reason": self.reason,
            "reason_pattern": f"(^|[ ;]){self.reason}:",
            "text": text,
            "text_bytes": text.encode("utf-8", "surrogatepass"),
            "text_json": json.dumps(text)[1:-1].encode(),
            "avatar_recorded": self.avatar_recorded,
            "aside": self.aside,
            "probe": self.probe,
        }


_CONDITIONS: Final = {
    "ids": "d.id = any(%(ids)s)",
    "since": "d.first_seen_at >= %(since)s",
    "until": "d.first_seen_at < %(until)s",
    "source": "d.source = %(source)s",
    "status": "d.status = %(status)s",
    "states": "d.state = any(%(states)s)",
    "request_ids": "d.request_id = any(%(request_ids)s)",
    "reason": "d.last_error ~ %(reason_pattern)s or d.aside = %(reason)s or exists (select from webhook.effects e "
    "where e.delivery_id = d.id and e.detail ->> 'reason' = %(reason)s)",
    "text": "position(%(text)s in d.last_error) > 0 or position(%(text_bytes)b in d.body) > 0 "
    "or (%(text_json)b <> %(text_bytes)b and position(%(text_json)b in d.body) > 0)",
    "avatar_recorded": "exists (select from webhook.effects e where e.delivery_id = d.id and e.name = 'avatar' "
    "and e.detail ->> 'avatar_id' = %(avatar_recorded)s)",
    "aside": "d.aside is not null and (%(aside)s = 'any' or d.aside = %(aside)s)",
    "probe": "d.probe = %(probe)s",
}


def resolved(connection: Connection, wanted: Filter, *, deep: bool = True) -> Filter:
    """Replace an avatar's id by the requests that belong to it: the bot's row first, else what the effects recorded.

    The effects have no index for that. Not ``deep``: they become a condition instead, for who looks at few deliveries.
    """
    if wanted.avatar_id is None:
        return wanted
    found: list[tuple[Any, ...]] = []
    # Where the bot's table is not there, or not ours to read, or has another kind of ids: the effects know the avatars
    # as well.
    with contextlib.suppress(
        errors.UndefinedTable, errors.UndefinedColumn, errors.InsufficientPrivilege, errors.DataError
    ):
        found = connection.execute(_REQUESTS_OF_AVATAR, (wanted.avatar_id,)).fetchall()
    if not found and not deep:
        return replace(wanted, avatar_recorded=wanted.avatar_id)
    found = found or connection.execute(_REQUESTS_BY_EFFECT, (wanted.avatar_id,)).fetchall()
    requests = {str(row[0]) for row in found}
    if wanted.request_ids:
        requests &= set(wanted.request_ids)
    # No request has the id "": an avatar without requests has no deliveries.
    return replace(wanted, request_ids=tuple(sorted(requests)) or ("",))


def listed(
    connection: Connection,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    oldest_first: bool = False,
    extra: str = "true",
) -> list[dict[str, Any]]:
    """One page, the newest first unless told otherwise. ``after`` is the id at which the last page ended.

    ``extra`` is a further condition, written by this program.
    """
    direction, beyond = ("asc", ">") if oldest_first else ("desc", "<")
    key = order_key(wanted, extra)
    place = "true" if after is None else f"{key} {beyond} %(after)s"
    return selected(
        connection,
        f"{wanted.where()} and {extra} and {place} order by {key} {direction} limit %(limit)s",
        {**wanted.parameters(), "after": after, "limit": limit},
    )


def selected(connection: Connection, how: str, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Deliveries as lists show them. ``how`` is what follows ``where``, written by this program."""
    return rows(connection.execute(f"{_SELECT} from webhook.deliveries d where {how}", values))


def order_key(wanted: Filter, extra: str) -> str:
    """What to order by. An expression keeps the planner from following the primary key for a handful of rows."""
    return "d.id + 0" if wanted.narrow or (extra != "true" and "done" not in extra) else "d.id"


def counted(
    connection: Connection, wanted: Filter, extra: str = "true", most: int = COUNTED_MAX
) -> dict[str, int]:
    """How many match, by state; the count ends at ``most`` + 1."""
    found = connection.execute(
        f"select state, count(*) from (select d.state from webhook.deliveries d where {wanted.where()} and {extra} "  # noqa: S608
        f"limit {int(most) + 1}) counted group by state",
        wanted.parameters(),
    ).fetchall()
    return {str(state): int(number) for state, number in found}


def exported(connection: Connection, wanted: Filter, *, limit: int | None, after: int | None, body: bool,
             extra: str = "true") -> Iterator[dict[str, Any]]:  # fmt: skip
    """Every match, the oldest first, in memory one page at a time (and one body at a time)."""
    left = limit
    while left is None or left > 0:
        size = IDS if left is None else min(IDS, left)
        ids = _ids(connection, wanted, size, after, extra)
        for start in range(0, len(ids), PAGE):
            page = replace(wanted, ids=tuple(ids[start : start + PAGE]))
            for delivery in listed(connection, page, limit=PAGE, oldest_first=True, extra=extra):
                if body:
                    delivery |= with_body(connection, delivery["id"])
                yield delivery
        if len(ids) < size:
            return
        after = ids[-1]
        left = None if left is None else left - len(ids)


def _ids(connection: Connection, wanted: Filter, size: int, after: int | None, extra: str) -> list[int]:
    """Many numbers at once: a filter without an index for its order is not asked again for every page."""
    found = connection.execute(
        f"select d.id from webhook.deliveries d where {wanted.where()} and {extra} "  # noqa: S608  (see Filter.where)
        f"and (%(after)s::bigint is null or d.id > %(after)s) order by {order_key(wanted, extra)} limit %(limit)s",
        {**wanted.parameters(), "after": after, "limit": size},
    ).fetchall()
    return [int(row[0]) for row in found]


def with_body(connection: Connection, identifier: int) -> dict[str, Any]:
    """A delivery's kept headers and its body in base64.

    Null where retention has left them to the archive; nothing where the delivery is gone.
    """
    row = connection.execute(
        "select headers, body, pruned from webhook.deliveries where id = %s", (identifier,)
    ).fetchone()
    if row is None:
        return {}
    if row[2]:
        return {"headers": None, "body_base64": None}
    return {"headers": row[0], "body_base64": base64.b64encode(row[1]).decode("ascii")}


def shown(
    connection: Connection, wanted: Filter, *, limit: int = 100, body: bool = False
) -> list[dict[str, Any]]:
    """Deliveries in full: the row, its effects, other bodies under its identity, and what operators did to it."""
    found = listed(connection, wanted, limit=limit, oldest_first=True)
    for delivery in found:
        identifier = delivery["id"]
        delivery["effects"] = rows(connection.execute(_EFFECTS, (identifier,)))
        delivery["variants"] = rows(connection.execute(_VARIANTS, (identifier,)))
        delivery["audit"] = audited(connection, delivery=identifier)
        if body:
            delivery |= with_body(connection, identifier)
    return found


def found_by(connection: Connection, which: str, *, body: bool = False) -> list[dict[str, Any]]:
    """Deliveries in full, by a number, or by a request id where no delivery has this number."""
    number = int(which) if which.isascii() and which.isdigit() and len(which) < 19 else 0
    found = shown(connection, Filter(ids=(number,)), body=body) if number else []
    if found or "\x00" in which:
        return found
    return shown(connection, Filter(request_ids=(which,)), body=body)


def audited(
    connection: Connection,
    *,
    delivery: int | None = None,
    action: str | None = None,
    who: str | None = None,
    after: int | None = None,
    limit: int = 50,
) -> list[dict[str, Any]]:
    """What operators did, the latest first."""
    asked = {"delivery": delivery, "action": action, "who": who, "after": after, "limit": limit}
    # Of one delivery there are few: they are found by their index, and not by the table's key.
    query = _AUDIT.format(key="id" if delivery is None else "id + 0")
    return rows(connection.execute(query.encode(), asked))


def rows(cursor: psycopg.Cursor[Any]) -> list[dict[str, Any]]:
    """A cursor's rows by column name."""
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
