"""Pages of a filter: deliveries are looked through in the order of an index, at most ``AT_ONCE`` of them for one page.

What an index cannot answer (a text, a reason, a second condition) is looked for in what it gives. So a page costs the
same whatever is asked, and however few deliveries match: where it has found nothing yet, it says how far it has looked,
and the next page goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api.console import Filter, listed, selected
from webhook_api.db import Connection

AT_ONCE: Final = 4000
"""Deliveries that one page looks through."""
PROBED: Final = 2000
"""The same where each is asked for what its effects have recorded."""
BYTES: Final = 8 * 1024**2
"""Bytes of bodies that one page looks through for a text."""
EVERYTHING: Final = "true"


@dataclass(frozen=True, slots=True)
class Look:
    """What was found. ``last``: number and arrival of the delivery at which it stopped, with more behind it.

    ``looked``: how many it looked at then.
    """

    rows: list[dict[str, Any]]
    last: tuple[int, datetime] | None = None
    looked: int = 0


@dataclass(frozen=True, slots=True)
class _Way:
    """An order, and the conditions that its index answers."""

    given: Filter
    rest: Filter
    by_time: bool

    def order(self, direction: str) -> str:
        """What to order by."""
        return f"d.first_seen_at {direction}, d.id {direction}" if self.by_time else f"d.id + 0 {direction}"

    def beyond(self, sign: str, name: str) -> str:
        """What comes after (``<``, ``>``) the delivery of some parameters, or with it (``<=``, ``>=``)."""
        if not self.by_time:
            return f"d.id + 0 {sign} %({name}_id)s"
        # The first part is what an index on times takes.
        return f"d.first_seen_at {sign[0]}= %({name}_at)s and (d.first_seen_at, d.id) {sign} (%({name}_at)s, %({name}_id)s)"


def through(
    connection: Connection,
    wanted: Filter,
    *,
    limit: int,
    after: int | None = None,
    oldest_first: bool = False,
    extra: str = EVERYTHING,
    most: int | None = None,
) -> Look:
    """Look for ``limit`` deliveries, the newest first unless told otherwise, beyond the one with the number ``after``.

    ``extra`` is a further condition, written by this program, that an index answers. ``most``: instead of AT_ONCE.
    """
    way = _way(wanted, extra)
    if way is None or (not way.by_time and way.rest.empty):
        found = listed(connection, wanted, limit=limit, after=after, oldest_first=oldest_first, extra=extra)
        return Look(found)
    direction, ahead, back = ("asc", ">", "<=") if oldest_first else ("desc", "<", ">=")
    values = {
        **wanted.parameters(),
        "limit": limit,
        "most": most or (PROBED if wanted.avatar_recorded or wanted.reason else AT_ONCE),
    }
    parts = [way.given.where(), f"({extra})"]
    if after is not None:
        values |= _place(connection, after)
        parts.append(way.beyond(ahead, "after"))
    last, looked = None, 0
    if not way.rest.empty:
        last, looked = _stop(connection, way, direction, parts, values)
        if last is not None:
            values |= {"last_id": last[0], "last_at": last[1]}
            parts.append(way.beyond(back, "last"))
        parts.append(way.rest.where())
    found = selected(
        connection, f"{' and '.join(parts)} order by {way.order(direction)} limit %(limit)s", values
    )
    return Look(found, last, looked) if last and len(found) < limit else Look(found)


def _stop(
    connection: Connection, way: _Way, direction: str, parts: list[str], values: dict[str, Any]
) -> tuple[tuple[int, datetime] | None, int]:
    """The delivery up to which one page looks, and how many that are; None: to the end."""
    query = f"from webhook.deliveries d where {' and '.join(parts)} order by {way.order(direction)}"
    if way.rest.text is None:
        row = connection.execute(
            f"select d.id, d.first_seen_at {query} offset %(most)s - 1 limit 1", values
        ).fetchone()
        return ((int(row[0]), row[1]) if row else None), values["most"]
    seen, size = 0, 0
    rows = connection.execute(
        f"select d.id, d.first_seen_at, octet_length(d.body) {query} limit %(most)s", values
    ).fetchall()
    for seen, row in enumerate(rows):
        size += row[2]
        if size > BYTES and seen > 0:
            return (int(rows[seen - 1][0]), rows[seen - 1][1]), seen
    return ((int(rows[-1][0]), rows[-1][1]) if len(rows) == values["most"] else None), len(rows)


def _way(wanted: Filter, extra: str) -> _Way | None:
    """In what order to look; ``None``: few match, or all do."""
    if wanted.empty or wanted.ids or wanted.request_ids:
        return None
    if extra != EVERYTHING:
        return _Way(Filter(), wanted, by_time=False)
    if wanted.aside or (wanted.states and "done" not in wanted.states):
        return _split(wanted, ("aside", "states"), by_time=False)
    if wanted.status not in (None, "completed"):
        return _split(wanted, ("status", "since", "until"), by_time=True)
    if wanted.source not in (None, "fal"):
        return _split(wanted, ("source", "since", "until"), by_time=True)
    return _split(wanted, ("since", "until"), by_time=True)


def _split(wanted: Filter, given: tuple[str, ...], *, by_time: bool) -> _Way:
    unset: dict[str, Any] = {item.name: item.default for item in fields(Filter)}
    others = {name: value for name, value in unset.items() if name not in given}
    return _Way(
        replace(wanted, **others), replace(wanted, **{name: unset[name] for name in given}), by_time=by_time
    )


def _place(connection: Connection, after: int) -> dict[str, Any]:
    """Where a page begins. A delivery that is gone leaves its place to the one before it."""
    row = connection.execute(
        "select first_seen_at from webhook.deliveries where id <= %s order by id desc limit 1", (after,)
    ).fetchone()
    return {"after_id": after, "after_at": row[0] if row else datetime.min.replace(tzinfo=UTC)}
