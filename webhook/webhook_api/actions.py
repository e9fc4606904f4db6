"""What operators do to many deliveries at once: replay, retry, discard. Each batch is one transaction with its audit row.

The rules (docs/decisions/0460): nothing is done twice unless its effect is named. A replay runs what failed or never
ran; an effect that is done is run again only when it is asked for by name, and says so (``replay`` in its record and in
its stream entry). Rows that a worker or another operator holds just now are left out and counted. Discarding deletes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from webhook_api import audit
from webhook_api.console import Filter, order_key
from webhook_api.db import Connection

BATCH: Final = 200
"""Deliveries changed in one transaction. Short enough that a duplicate which arrives meanwhile need not wait for long."""
DEAD_LETTERS: Final = "d.state = 'dead' and d.discarded_at is null"
"""What waits for an operator."""
WAITING_REPLAY: Final = "d.state = 'retry' and d.replayed_at is not null and d.tries = 0"
"""A replay that no worker has begun yet: another one would be counted, and do nothing."""
CHANNEL: Final = "webhook_deliveries"

Apply = Callable[[Connection, list[int]], dict[str, int]]


@dataclass(frozen=True, slots=True)
class Action:
    """A change: to which rows it may be done, and how. ``apply`` runs inside a transaction that holds the rows."""

    name: str
    """As the audit records it."""
    eligible: str
    """SQL condition on ``d``."""
    apply: Apply
    detail: dict[str, Any] = field(default_factory=dict)
    left_out: str | None = None
    """SQL condition of rows kept aside that the action could be done to, and is not unless they are asked for."""


def without_asides(condition: str, wanted: Filter) -> tuple[str, str | None]:
    """What was kept aside is authentic and unprocessed: it is taken only by ``--aside`` or by its id.

    Returns the narrowed condition, and that of the rows which it leaves out.
    """
    if wanted.aside or wanted.ids:
        return condition, None
    return f"{condition} and d.aside is null", f"{condition} and d.aside is not null"


@dataclass(slots=True)
class Done:
    """What came of an operation."""

    operation: str
    changed: int = 0
    ids: list[int] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    """How many came to what end; they add up to ``changed``."""
    records: list[int] = field(default_factory=list)
    """Rows of the audit, one for each transaction."""


def perform(
    connection: Connection,
    action: Action,
    wanted: Filter,
    limit: int,
    operation: audit.Operation,
    done: Done | None = None,
) -> Done:
    """Do it to at most ``limit`` deliveries, the oldest first.

    What was committed before a fault stays done, and stands in ``done`` when the caller gave one.
    """
    done, after = done or Done(str(operation.id)), 0
    while done.changed < limit:
        size = min(BATCH, limit - done.changed)
        with connection.transaction():
            ids = _take(connection, action, wanted, size, after)
            if not ids:
                break
            outcomes = action.apply(connection, ids)
            record = audit.record(
                connection, operation, len(ids), ids, {**action.detail, "outcomes": outcomes}
            )
            connection.execute("select pg_notify(%s, '')", (CHANNEL,))
        done.changed += len(ids)
        done.ids += ids
        done.records.append(record)
        for name, number in outcomes.items():
            done.outcomes[name] = done.outcomes.get(name, 0) + number
        after = ids[-1]
    return done


def _take(connection: Connection, action: Action, wanted: Filter, size: int, after: int) -> list[int]:
    key = order_key(wanted, action.eligible)
    found = connection.execute(
        f"select d.id from webhook.deliveries d where {wanted.where()} and ({action.eligible}) "  # noqa: S608
        f"and d.id > %(after)s order by {key} limit %(limit)s for update of d skip locked",
        {**wanted.parameters(), "after": after, "limit": size},
    ).fetchall()
    return [int(row[0]) for row in found]


# Nothing of what was reached is forgotten (an archive goes on where it stopped), only that it was given up.
_FAILED_AGAIN: Final = """
update webhook.effects e
set tries = 0, detail = e.detail - '{final,since,not_before,kind,reason,message}'::text[], updated_at = now()
where e.delivery_id = any(%(ids)s) and e.state = 'failed'
"""
# What was left out only because another effect had been given up is open again with it.
_SKIPPED_AGAIN: Final = """
delete from webhook.effects e
where e.delivery_id = any(%(ids)s) and e.state = 'skipped' and e.detail ->> 'why' = 'the avatar was given up'
"""
_NAMED_AGAIN: Final = """
update webhook.effects e
set state = 'failed', tries = 0, last_error = null, updated_at = now(),
    detail = jsonb_build_object('replay', coalesce((e.detail ->> 'replay')::integer, 0) + 1,
                                'before', e.detail - 'before')
where e.delivery_id = any(%(ids)s) and e.name = any(%(effects)s) and e.state in ('done', 'skipped')
"""
# An effect that a done delivery never had (it was not configured then) must not happen by the way.
_OTHERS_NOT: Final = """
insert into webhook.effects (delivery_id, name, state, tries, detail)
select d.id, o.name, 'skipped', 0, '{"why": "not asked for by the replay"}'::jsonb
from webhook.deliveries d cross join unnest(%(others)s::text[]) as o(name)
where d.id = any(%(ids)s) and d.state = 'done'
on conflict (delivery_id, name) do nothing
"""
_AGAIN: Final = """
update webhook.deliveries d
set state = 'retry', tries = 0, crashes = 0, next_attempt_at = now(), replayed_at = now(), discarded_at = null,
    done_at = null, lease_owner = null, lease_until = null,
    last_error = case when d.state = 'done' then null else d.last_error end
where d.id = any(%(ids)s) and d.aside is null
"""
_ASIDE: Final = (
    "select d.id from webhook.deliveries d where d.id = any(%s) and d.aside is not null order by d.id"
)
# The key without `aside:<reason>:` is the one under which a fresh copy of the same event stands.
_ADMIT: Final = """
update webhook.deliveries d
set dedup_key = regexp_replace(d.dedup_key, '^aside:[a-z_]+:', ''), aside = null, state = 'pending', tries = 0,
    next_attempt_at = now(), replayed_at = now(), discarded_at = null, last_error = null
where d.id = %s
"""
_TWIN: Final = """
select o.id from webhook.deliveries d join webhook.deliveries o
    on o.source = d.source and o.request_id = d.request_id
    and o.dedup_key = regexp_replace(d.dedup_key, '^aside:[a-z_]+:', '') and o.id <> d.id
where d.id = %s
"""
_CLOSE: Final = """
update webhook.deliveries set discarded_at = coalesce(discarded_at, now()), last_error = %s where id = %s
"""
_RETRY: Final = "update webhook.deliveries set next_attempt_at = now() where id = any(%(ids)s)"
_DISCARD: Final = """
update webhook.deliveries
set state = 'dead', discarded_at = now(), lease_owner = null, lease_until = null,
    last_error = case when %(why)s::text is null then last_error
                      else concat_ws('; ', 'discarded: ' || %(why)s, last_error) end
where id = any(%(ids)s)
"""


def replay(
    name: str, eligible: str, effects: Sequence[str], known: Sequence[str], left_out: str | None = None
) -> Action:
    """Have deliveries processed again: what failed or never ran, and besides it the named ``effects``.

    ``known`` are the names of all effects. Deliveries that are done are taken only when effects are named.
    """
    # What retention has taken the body from cannot be processed: it stands in the archive only.
    eligible = f"({eligible}) and d.pruned = 0 and not ({WAITING_REPLAY})"
    if effects:
        eligible += " and d.aside is null"

    def apply(connection: Connection, ids: list[int]) -> dict[str, int]:
        others = [known_name for known_name in known if known_name not in effects] if effects else []
        values = {"ids": ids, "effects": list(effects), "others": others}
        connection.execute(_OTHERS_NOT, values)
        for statement in (_FAILED_AGAIN, _SKIPPED_AGAIN, _NAMED_AGAIN):
            connection.execute(statement, values)
        replayed = connection.execute(_AGAIN, values).rowcount
        aside = [_admit(connection, int(row[0])) for row in connection.execute(_ASIDE, (ids,)).fetchall()]
        counts = {
            "replayed": replayed,
            "admitted": aside.count(None),
            "duplicates": len(aside) - aside.count(None),
        }
        return {outcome: number for outcome, number in counts.items() if number}

    return Action(name, eligible, apply, {"effects": list(effects)} if effects else {}, left_out)


def _admit(connection: Connection, identifier: int) -> int | None:
    """Give a delivery that was kept aside its own identity; returns the delivery that has it already, if any."""
    for _ in range(2):
        twin = connection.execute(_TWIN, (identifier,)).fetchone()
        if twin is not None:
            connection.execute(_CLOSE, (f"duplicate of delivery {twin[0]}", identifier))
            return int(twin[0])
        try:
            with connection.transaction():
                connection.execute(_ADMIT, (identifier,))
            return None
        except psycopg.errors.UniqueViolation:
            continue  # the fresh copy came in this moment: look again
    raise RuntimeError(f"delivery {identifier} can be neither admitted nor closed")


def retry() -> Action:
    """Have parked deliveries looked at now instead of when they are due."""

    def apply(connection: Connection, ids: list[int]) -> dict[str, int]:
        return {"due_now": connection.execute(_RETRY, {"ids": ids}).rowcount}

    return Action("parked.retry", "d.state = 'parked'", apply)


def discard(name: str, eligible: str, why: str | None, left_out: str | None = None) -> Action:
    """Close deliveries without processing them. They stay, with all that is known of them, until they are pruned."""

    def apply(connection: Connection, ids: list[int]) -> dict[str, int]:
        return {"discarded": connection.execute(_DISCARD, {"ids": ids, "why": why}).rowcount}

    return Action(name, eligible, apply, {"why": why} if why else {}, left_out)
