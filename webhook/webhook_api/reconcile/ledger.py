"""What is known of the requests that fal is asked for, and what all workers share. SQL beside its function.

All times are the database's. One run at a time works here, by an advisory lock that ends with its connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import errors, sql

from webhook_api.bodies import BodyError, parse
from webhook_api.config_upkeep import ReconcileSettings
from webhook_api.db import Connection
from webhook_api.effects import avatar_table
from webhook_api.effects.avatar_table import Column, read_columns
from webhook_api.states import EffectError

LOCK_KEY: Final = 0x41495348_52454331
"""The advisory lock that all reconcilers share (an arbitrary, fixed number)."""
FOUND_AT_ONCE: Final = 1000
SCANNED_AT_ONCE: Final = 50_000
"""Ids that one run looks through."""
READ_AT_ONCE: Final = 2000
"""Bodies that one run reads, of at most 16 KiB each."""
LOOK_BACK: Final = 10_000
"""Deliveries before the newest that are looked through when the reconciler is switched on."""
HORIZON_SECONDS: Final = 90
"""Longer than any transaction that inserts a delivery: its statements have 1.5 s, and idle ones end after 60 s."""

# A payload that is null is "null" somewhere in the bytes, and one that is not there at all is short. What is large
# is not read (a body's length is known without it).
_SCAN: Final = """
select id, request_id, training_type_hint, body from webhook.deliveries
where id > %(after)s and id <= %(until)s and source = 'fal' and status = 'completed' and aside is null and not probe
  and pruned = 0 and octet_length(body) <= 16384
  and (position('null'::bytea in body) > 0 or position('"payload"'::bytea in body) = 0)
order by id limit %(limit)s
"""
_POSITION: Final = """
select scanned_id, horizon_id, coalesce(extract(epoch from now() - horizon_at), 0)::float8,
    (select coalesce(max(id), 0) from webhook.deliveries)
from webhook.reconcile_state
"""
_MOVE: Final = "update webhook.reconcile_state set scanned_id = %s, horizon_id = %s, horizon_at = now()"
_ADD: Final = """
insert into webhook.reconciliations as r (request_id, reason, training_type)
select request_id, %(reason)s, training_type
from unnest(%(request_ids)s::text[], %(types)s::text[]) as given (request_id, training_type)
on conflict (request_id) do update
    set reason = excluded.reason, next_at = now(), training_type = coalesce(excluded.training_type, r.training_type),
        state = 'waiting', closed_at = null, found_at = now(), failures = 0
    where (excluded.reason = 'no_payload' and r.reason = 'overdue' and r.state in ('waiting', 'settled', 'gone', 'given_up'))
       or excluded.reason = 'asked'
returning request_id
"""
_DUE: Final = """
select request_id, reason, training_type, tries, failures, coalesce(result, ''),
    extract(epoch from now() - found_at)::float8
from webhook.reconciliations
where state = 'waiting' and (next_at <= now() or %(all)s)
  and (%(only)s::text is null or request_id = %(only)s) and request_id <> all(%(seen)s)
order by next_at limit 1
"""
_FINALS: Final = """
select id, source, status, pruned, body from webhook.deliveries
where request_id = %s and status in ('completed', 'failed', 'cancelled') and aside is null and not probe
order by id
"""
_AGAIN: Final = """
update webhook.reconciliations
set next_at = now() + make_interval(secs => %(delay)s), asked_at = now(), tries = tries + %(counted)s,
    failures = %(failures)s, result = %(result)s, detail = %(detail)s
where request_id = %(request_id)s and state = 'waiting'
"""
_CLOSE: Final = """
update webhook.reconciliations
set state = %(state)s, closed_at = now(), asked_at = case when %(asked)s then now() else asked_at end,
    tries = tries + %(asked)s::int, result = coalesce(%(result)s, result), detail = %(detail)s,
    delivery_id = coalesce(%(delivery_id)s, delivery_id)
where request_id = %(request_id)s and state = 'waiting'
"""
_PACE: Final = """
with before as (select greatest(next_request_at, now()) as turn from webhook.reconcile_state)
update webhook.reconcile_state set next_request_at = least(before.turn, now() + interval '5 min')
    + make_interval(secs => %s) from before
returning extract(epoch from least(before.turn, now() + interval '5 min') - now())::float8
"""
_PAUSED: Final = """
select pause_reason, extract(epoch from paused_until - now())::float8, pauses from webhook.reconcile_state
"""
_PAUSE: Final = """
update webhook.reconcile_state
set paused_until = now() + make_interval(secs => %s), pause_reason = %s, pauses = pauses + 1
"""
_RESUME: Final = """
update webhook.reconcile_state set paused_until = null, pause_reason = null, pauses = 0 where pauses > 0
"""
_SUMMARY: Final = """
select (select count(*) from webhook.reconciliations where state = 'waiting'),
    (select coalesce(extract(epoch from now() - min(found_at)), 0)::float8 from webhook.reconciliations
     where state = 'waiting'),
    greatest(0, coalesce(extract(epoch from paused_until - now()), 0))::float8, pause_reason, run_at
from webhook.reconcile_state
"""
_LISTED: Final = """
select request_id, reason, training_type, state, tries, failures, found_at, next_at, asked_at, closed_at, result, detail,
    delivery_id
from webhook.reconciliations
where (state = 'waiting' or closed_at > now() - interval '7 days') and (%(only)s::text is null or request_id = %(only)s)
order by (state = 'waiting') desc, coalesce(closed_at, next_at) desc limit %(limit)s
"""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is waiting to be asked for."""

    request_id: str
    reason: str
    training_type: str | None
    tries: int
    failures: int
    result: str
    age: float
    """Seconds since it was found."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What metrics and the console show."""

    waiting: int
    oldest: float
    paused_for: float
    pause_reason: str | None
    run_at: Any


def overdue(
    connection: Connection, settings: ReconcileSettings, only: str | None = None
) -> list[tuple[str, str | None]]:
    """Requests (and training types) of avatars that have been in training for longer than expected.

    ``only``: this one, however long. Empty when the bot's table is not there, or not ours to read.
    """
    try:
        columns = read_columns(connection)
        query, values = _avatars(columns, settings, only)
        rows = connection.execute(query, values).fetchall()
    except (EffectError, errors.InsufficientPrivilege, errors.UndefinedTable):
        return []
    return [(str(request_id), kind) for request_id, kind in rows]


def _avatars(
    columns: Mapping[str, Column], settings: ReconcileSettings, only: str | None
) -> tuple[sql.Composed, dict[str, Any]]:
    started = [_moment(name, columns[name]) for name in ("training_started_at", "created_at", "updated_at")
               if name in columns]  # fmt: skip
    since = sql.SQL("coalesce({})").format(
        sql.SQL(", ").join([*started, sql.SQL("'-infinity'::timestamptz")])
    )
    kind = sql.SQL("lower(training_type::text)" if "training_type" in columns else "null::text")
    after = sql.SQL("case {kind} {cases} else %(longest)s end").format(
        kind=kind,
        cases=sql.SQL(" ").join(
            sql.SQL("when {} then {}").format(sql.Literal(name), sql.Literal(seconds))
            for name, seconds in settings.after.items()
        ),
    )
    longest = max(settings.after.values())
    # Two questions, not one with a choice in it: each is answered by an index, and no plan is made that suits neither.
    wanted = sql.SQL(
        "{training} and {since} < now() - make_interval(secs => {after}) and not exists "
        "(select from webhook.reconciliations r where r.request_id = fal_request_id::text)"
        if only is None
        else "fal_request_id::text = %(only)s"
    ).format(training=avatar_table.in_training(columns["status"]), since=since, after=after)
    query = sql.SQL(
        "select fal_request_id::text, {kind} from public.avatars where coalesce(fal_request_id::text, '') <> '' "
        "and {wanted} order by {since} limit %(limit)s"
    ).format(kind=kind, wanted=wanted, since=since)
    return query, {"only": only, "longest": longest, "limit": FOUND_AT_ONCE}


def _moment(name: str, column: Column) -> sql.Composed:
    text = "({}::timestamp at time zone 'utc')" if "without" in column.type else "{}::timestamptz"
    return sql.SQL(text).format(sql.Identifier(name))


def in_training(connection: Connection, request_id: str) -> bool | None:
    """Whether the avatar of a request is still in training; None when there is none to be read."""
    try:
        row = connection.execute(
            "select lower(status::text) = 'training' from public.avatars where fal_request_id = %s limit 1",
            (request_id,),
        ).fetchone()
    except (errors.UndefinedTable, errors.UndefinedColumn, errors.InsufficientPrivilege):
        return None
    return bool(row[0]) if row else None


def without_payload(connection: Connection) -> list[tuple[str, str | None]]:
    """Requests that fal reported as OK without a payload, among the deliveries that are not surely looked through.

    Ids are not committed in their order. So what is new is looked through in every run, until no transaction can be
    open any more that took an id among them.
    """
    row = connection.execute(_POSITION).fetchone()
    if row is None:
        return []
    scanned, horizon, age, newest = row
    if scanned is None:
        scanned = horizon = max(0, newest - LOOK_BACK)
        connection.execute(_MOVE, (scanned, newest))
    until = min(newest, scanned + SCANNED_AT_ONCE)
    rows = connection.execute(
        _SCAN, {"after": scanned, "until": until, "limit": READ_AT_ONCE}, binary=True
    ).fetchall()
    if len(rows) == READ_AT_ONCE:
        until = int(rows[-1][0])
    if age > HORIZON_SECONDS:
        connection.execute(_MOVE, (min(horizon, until), newest))
    return [(str(name), kind) for _, name, kind, body in rows if has_payload(bytes(body)) is False]


def has_payload(body: bytes) -> bool | None:
    """Whether a body reports a result; None when it cannot be read."""
    try:
        event = parse(body)
    except BodyError:
        return None
    return event.payload is not None


def add(connection: Connection, reason: str, found: Sequence[tuple[str, str | None]]) -> list[str]:
    """Note requests to be asked for; returns those that were not known as such."""
    unique = dict(found)
    rows = connection.execute(
        _ADD,
        {"reason": reason, "request_ids": list(unique), "types": [unique[name] for name in unique]},
    ).fetchall()
    return [str(row[0]) for row in rows]


def due(
    connection: Connection, *, only: str | None = None, everything: bool = False, seen: Sequence[str] = ()
) -> Request | None:
    """The request that is due for the longest time. ``everything``: also those that are not due yet."""
    row = connection.execute(_DUE, {"all": everything, "only": only, "seen": list(seen)}).fetchone()
    return Request(*row) if row else None


def reported(connection: Connection, request_id: str) -> str | None:
    """What reports the request's end already, with a result or a failure; None when fal has to be asked.

    A body that was pruned has been done for long: what it could not tell, fal cannot either.
    """
    for identifier, source, status, pruned, body in connection.execute(_FINALS, (request_id,)).fetchall():
        if status != "completed" or pruned or has_payload(bytes(body)):
            return f"delivery {identifier} of {source} reports {status}"
    return None


def again(
    connection: Connection, request: Request, *, delay: float, result: str, detail: str, failures: int
) -> None:
    """Note an answer after which the request is asked for again, in ``delay`` seconds."""
    connection.execute(
        _AGAIN,
        {"request_id": request.request_id, "delay": delay, "counted": 1, "failures": failures, "result": result,
         "detail": detail or None},
    )  # fmt: skip


def close(
    connection: Connection,
    request: Request,
    state: str,
    *,
    detail: str,
    result: str | None = None,
    delivery_id: int | None = None,
) -> None:
    """End it. ``result``: what fal answered, when it was asked."""
    connection.execute(
        _CLOSE,
        {"request_id": request.request_id, "state": state, "asked": result is not None, "result": result,
         "detail": detail or None, "delivery_id": delivery_id},
    )  # fmt: skip


def turn(connection: Connection, interval: float) -> float:
    """Take the next turn of a request to fal: seconds until it comes. Turns are ``interval`` seconds apart."""
    row = connection.execute(_PACE, (interval,)).fetchone()
    return max(0.0, float(row[0])) if row else 0.0


def paused(connection: Connection) -> tuple[str | None, float, int]:
    """Why and for how many seconds nobody asks, and how many pauses there were in a row."""
    row = connection.execute(_PAUSED).fetchone()
    if row is None or row[1] is None or row[1] <= 0:
        return None, 0.0, int(row[2]) if row else 0
    return str(row[0]), float(row[1]), int(row[2])


def pause(connection: Connection, seconds: float, reason: str) -> None:
    """Keep everyone from asking for a while."""
    connection.execute(_PAUSE, (seconds, reason))


def resume(connection: Connection) -> None:
    """Forget former pauses: fal has answered."""
    connection.execute(_RESUME)


def ran(connection: Connection) -> None:
    """Note the end of a run."""
    connection.execute("update webhook.reconcile_state set run_at = now()")


def summary(connection: Connection) -> Summary:
    """What metrics and the console show."""
    row = connection.execute(_SUMMARY).fetchone()
    return Summary(*row) if row else Summary(0, 0.0, 0.0, None, None)


def listed(connection: Connection, limit: int, only: str | None = None) -> list[dict[str, Any]]:
    """What waits, and what was closed within a week."""
    cursor = connection.execute(_LISTED, {"limit": limit, "only": only})
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
