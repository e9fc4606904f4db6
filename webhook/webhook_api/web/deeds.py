"""What operators do from the console: the same actions as the command line's, in the same audit, by their account."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Final

from webhook_api import actions, audit
from webhook_api.actions import DEAD_LETTERS, Action, Done
from webhook_api.console import Filter, counted, listed, resolved, rows
from webhook_api.db import Connection
from webhook_api.web.accounts import Who

NAMES: Final = (
    "dead-letters.replay",
    "dead-letters.discard",
    "parked.retry",
    "parked.discard",
    "events.replay",
)
MOST: Final = 1000
"""Deliveries that one click changes."""
COUNTED: Final = 10_000
"""A preview's count ends here: an action changes fewer."""
LOOKED: Final = 2000
"""Deliveries that a preview looks through for what no index answers."""
PREVIEW: Final = 10
WHY_MOST: Final = 200
RECORDS: Final = 10_000
"""Rows of the audit between the first and the last of one operation: it takes a moment, others write meanwhile."""

_DONE: Final = """
select at, operation, who, affected, detail -> 'outcomes' as outcomes from webhook.audit
where id between %(first)s and %(last)s
  and operation = (select operation from webhook.audit where id = %(first)s and action = %(name)s)
order by id
"""


class DeedUnknown(ValueError):
    """There is no such action."""


def action(name: str, wanted: Filter, why: str | None = None) -> Action:
    """The action of a name. Raises DeedUnknown."""
    if name in ("dead-letters.replay", "dead-letters.discard"):
        eligible, left_out = actions.without_asides(DEAD_LETTERS, wanted)
        if name.endswith("discard"):
            return actions.discard(name, eligible, why, left_out)
        return actions.replay(name, eligible, (), _effects(), left_out)
    if name == "parked.retry":
        return actions.retry()
    if name == "parked.discard":
        return actions.discard(name, "d.state = 'parked'", why)
    if name == "events.replay":
        eligible, left_out = actions.without_asides("d.state in ('dead', 'retry', 'parked')", wanted)
        return actions.replay(name, eligible, (), _effects(), left_out)
    raise DeedUnknown(name)


def _effects() -> list[str]:
    from webhook_api.effects import ORDER

    return [effect.name for effect in ORDER]


def preview(connection: Connection, deed: Action, wanted: Filter) -> dict[str, Any]:
    """How many it would be done to, the first of them, and how many that were kept aside are left out."""
    wanted = resolved(connection, wanted, deep=False)
    eligible, partial = _oldest(connection, deed.eligible, wanted)
    states = counted(connection, wanted, eligible, COUNTED)
    left_out = counted(connection, wanted, f"({deed.left_out})", COUNTED) if deed.left_out else {}
    matched = sum(states.values())
    return {
        "action": deed.name,
        "matched": min(matched, COUNTED),
        "more": matched > COUNTED,
        "states": states,
        "left_out": sum(left_out.values()),
        "limit": MOST,
        "preview": listed(connection, wanted, limit=PREVIEW, oldest_first=True, extra=eligible)
        if matched
        else [],
        "partial": partial,
        "looked": LOOKED,
    }


def _oldest(connection: Connection, eligible: str, wanted: Filter) -> tuple[str, bool]:
    """Where no index answers a part of the filter: the oldest ``LOOKED`` alone, and whether there are others."""
    if not (wanted.text or wanted.reason or wanted.avatar_recorded):
        return f"({eligible})", False
    known = replace(wanted, text=None, reason=None, avatar_id=None, avatar_recorded=None)
    row = connection.execute(
        f"select d.id from webhook.deliveries d where {known.where()} and ({eligible}) "  # noqa: S608  (see Filter.where)
        "order by d.id + 0 offset %(looked)s limit 1",
        {**known.parameters(), "looked": LOOKED},
    ).fetchone()
    return (f"({eligible}) and d.id + 0 < {int(row[0])}", True) if row else (f"({eligible})", False)


def do(connection: Connection, deed: Action, wanted: Filter, limit: int, who: Who, instance: str) -> Done:
    """Do it to the oldest ``limit`` that match, and record who did."""
    operation = audit.Operation(who.name, instance, deed.name, {**wanted.said(), "by": "console"})
    return actions.perform(
        connection, deed, resolved(connection, wanted, deep=False), min(limit, MOST), operation
    )


def recorded(connection: Connection, name: str, first: int, last: int) -> dict[str, Any] | None:
    """What came of the operation that wrote the audit's rows from ``first`` to ``last``; None: there is no such one."""
    if not first <= last < min(2**63, first + RECORDS):
        return None
    found = rows(connection.execute(_DONE, {"name": name, "first": first, "last": last}))
    if not found:
        return None
    outcomes: Counter[str] = Counter()
    for row in found:
        outcomes.update(row["outcomes"] or {})
    return {
        "operation": found[0]["operation"], "who": found[0]["who"], "at": found[-1]["at"],
        "changed": sum(row["affected"] for row in found), "outcomes": dict(outcomes),
    }  # fmt: skip


def fetched(connection: Connection, who: Who, instance: str, identifier: int, key: str, size: int) -> None:
    """Record that a file of a delivery was given to somebody."""
    operation = audit.Operation(who.name, instance, "archive.download", {"by": "console"})
    with connection.transaction():
        audit.record(connection, operation, 0, [identifier], {"key": key, "bytes": size})


def note(connection: Connection, name: str, who: str, instance: str, **detail: Any) -> None:
    """Record a deed that changes no delivery, such as a login that failed."""
    with connection.transaction():
        audit.record(connection, audit.Operation(who, instance, name), 0, (), detail)
