"""From the spool into the inbox: in order, in batches, each row exactly once.

A batch and the number up to which the file is drained are committed in one transaction. A process that dies before the
rows are deleted from the file finds that number and repeats nothing.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import errors
from psycopg.types.json import Jsonb

from webhook_api.db import Connection
from webhook_api.inbox.allowance import drain_seconds
from webhook_api.inbox.batch import BOOL, BYTEA, COLUMNS, FLOAT8, JSON, TEXTS, Packed, integers, texts
from webhook_api.inbox.model import Delivery
from webhook_api.inbox.spoolfile import Row, SpoolFile
from webhook_api.inbox.statement import ANOTHER, ends_request, keep_variant

BATCH_ROWS: Final = 200
BATCH_BYTES: Final = 1024 * 1024
STATEMENT_SHARE: Final = 0.8
"""Of a batch's time what one statement gets: the server gives it up, and says so, before we do."""
HELD_AT_ONCE: Final = 4
"""So many requests held up by locks, and none taken: the table is locked, and the batch is left for later."""

_TIMES: Final = "first_seen_at, last_seen_at"
_INSERT: Final = f"""
with given as (
    select * from unnest({", ".join(f"%({name})b::text[]" for name in TEXTS)},
        %(body)b::bytea[], %(headers)b::json[], %(probe)b::bool[], %(attempts)b::int4[], %(received)b::float8[],
        %(last)b::float8[]) as g ({COLUMNS}, received, last)
), created as (
    insert into webhook.deliveries ({COLUMNS}, {_TIMES})
    select {COLUMNS}, least(now(), to_timestamp(received)), least(now(), to_timestamp(last)) from given
    on conflict on constraint deliveries_identity do nothing
    returning id, source, request_id, dedup_key
)
select id, source, request_id, dedup_key, {ANOTHER.format("created")} from created
"""  # noqa: S608  (constants of this module)
# An arrival that the database had stored without our hearing of it is not counted again. first_seen_at stays: it is part
# of what stream entries and forwards are recognised by, and a worker may have sent one already.
_UPSERT: Final = f"""
with stored as (
    insert into webhook.deliveries as d ({COLUMNS}, {_TIMES})
    values ({", ".join(f"%({name})s" for name in TEXTS)}, %(body)b, %(headers)s, %(probe)s, %(attempts)s,
        least(now(), to_timestamp(%(received)s)), least(now(), to_timestamp(%(last)s)))
    on conflict on constraint deliveries_identity do update
        set attempts = d.attempts + excluded.attempts - case when %(unsure)s
                and d.body_sha256 = excluded.body_sha256 and d.edge_request_id = excluded.edge_request_id
                then 1 else 0 end,
            last_seen_at = greatest(d.last_seen_at, excluded.last_seen_at)
    returning d.id, d.source, d.request_id, d.xmax = 0 as inserted, d.body_sha256
)
select id, inserted, body_sha256 <> %(body_sha256)s, inserted and %(final)s and {ANOTHER.format("stored")} from stored
"""  # noqa: S608  (constants of this module)
_DRAINED: Final = "select drained from webhook.spools where id = %s for update"
_MARK: Final = """
insert into webhook.spools as s (id, drained) values (%s, %s)
on conflict (id) do update set drained = greatest(s.drained, excluded.drained), updated_at = now()
"""
_FORGET: Final = "delete from webhook.spools where id = %s or updated_at < now() - make_interval(days => 90)"


@dataclass(slots=True)
class Drained:
    """What became of a batch of rows."""

    taken: list[tuple[Row, int, str]] = field(default_factory=list)
    """Row, its id in the inbox, outcome."""
    repeated: int = 0
    """Rows that an earlier batch had taken, whose end nobody had heard of."""
    rejected: list[tuple[int, str]] = field(default_factory=list)
    """Rows that cannot be stored: sequence number, why."""
    held: set[str] = field(default_factory=set)
    """Requests of which somebody holds a row: they come later, in their order."""


def time_for(rows: Sequence[Row], failures: int = 0) -> float:
    """Seconds that a batch may take; more when it had too few before."""
    return drain_seconds(sum(len(row.delivery.body) for row in rows), failures)


def drain(
    connection: Connection, file: SpoolFile, rows: Sequence[Row], seconds: float | None = None
) -> Drained:
    """Commit ``rows``, the head of ``file``, and delete them from it.

    The connection is autocommitting. Raises psycopg.Error with nothing stored, or SpoolBroken: then the rows may be
    stored and still stand in the file, and the next call repeats none of them.
    """
    last = rows[-1].seq
    milliseconds = round(1000 * STATEMENT_SHARE * (time_for(rows) if seconds is None else seconds))
    with connection.transaction():
        connection.execute(f"set local statement_timeout = {milliseconds}", prepare=False)
        mark = connection.execute(_DRAINED, (file.id,)).fetchone()
        fresh = [row for row in rows if mark is None or row.seq > mark[0]]
        try:
            with connection.transaction():
                # One alone needs no array, which would be a large body once more.
                done = _together(connection, fresh) if len(fresh) > 1 else _one_by_one(connection, fresh)
        except (errors.DataError, errors.IntegrityError, errors.LockNotAvailable, ValueError):
            done = _one_by_one(connection, fresh)
        done.repeated = len(rows) - len(fresh)
        # Before the mark is committed: afterwards they would count as taken.
        if done.rejected:
            file.reject(done.rejected)
        if done.held:
            file.postpone(done.held)
        connection.execute(_MARK, (file.id, last))
    file.delete(last)
    return done


def forget(connection: Connection, file_id: uuid.UUID) -> None:
    """Forget the mark of a file that is gone for ever, and those of files not seen for 90 days."""
    connection.execute(_FORGET, (file_id,))


def _together(connection: Connection, rows: Sequence[Row]) -> Drained:
    """All new events with one statement, and whatever else there is behind them."""
    done = Drained()
    first: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        first.setdefault(row.delivery.identity, row)
    # By request, against deadlocks; within a request by arrival, which the worker's order follows.
    events = sorted(first.values(), key=lambda row: (row.delivery.source, row.delivery.request_id, row.seq))
    created = {}
    if events:
        found = connection.execute(_INSERT, _arrays(events)).fetchall()
        created = {
            (source, request_id, key): (id_, another) for id_, source, request_id, key, another in found
        }
    ended: set[tuple[str, str]] = set()
    for row in rows:
        identity = row.delivery.identity
        if identity not in created or first[identity] is not row:
            done.taken.append(_one(connection, row))
            continue
        id_, another = created[identity]
        final = ends_request(row.delivery)
        outcome = "another_result" if final and (another or identity[:2] in ended) else "stored"
        if final:
            ended.add(identity[:2])
        done.taken.append((row, id_, outcome))
    return done


def _one_by_one(connection: Connection, rows: Sequence[Row]) -> Drained:
    """Each row for itself, so that one that cannot be stored stops nobody."""
    done = Drained()
    for row in rows:
        if row.delivery.request_id in done.held:
            continue
        try:
            with connection.transaction():
                done.taken.append(_one(connection, row))
        except errors.LockNotAvailable:
            done.held.add(row.delivery.request_id)
            if len(done.held) >= HELD_AT_ONCE and not done.taken:
                raise
        except (errors.DataError, errors.IntegrityError, ValueError) as error:
            done.rejected.append((row.seq, f"{type(error).__name__}: {error}"))
    return done


def _one(connection: Connection, row: Row) -> tuple[Row, int, str]:
    found = connection.execute(_UPSERT, _values(row)).fetchone()
    if found is None:
        raise psycopg.OperationalError("no answer")
    id_, inserted, variant, another = found
    if variant:
        keep_variant(connection, id_, row.delivery)
        return row, id_, "variant"
    return row, id_, "another_result" if another else "stored" if inserted else "duplicate"


def _values(row: Row) -> dict[str, Any]:
    delivery = row.delivery
    return {name: getattr(delivery, name) for name in TEXTS} | {
        "body": delivery.body, "headers": Jsonb(dict(delivery.headers)), "probe": delivery.probe,
        "attempts": row.arrivals, "received": row.received_at, "last": row.last_at, "unsure": row.unsure,
        "final": ends_request(delivery),
    }  # fmt: skip


def _arrays(rows: Sequence[Row]) -> dict[str, Packed]:
    deliveries: list[Delivery] = [row.delivery for row in rows]
    return {name: texts(deliveries, name) for name in TEXTS} | {
        "body": Packed(BYTEA, [delivery.body for delivery in deliveries]),
        "headers": Packed(JSON, [json.dumps(dict(delivery.headers)).encode() for delivery in deliveries]),
        "probe": Packed(BOOL, [b"\1" if delivery.probe else b"\0" for delivery in deliveries]),
        "attempts": integers(row.arrivals for row in rows),
        "received": Packed(FLOAT8, [struct.pack("!d", row.received_at) for row in rows]),
        "last": Packed(FLOAT8, [struct.pack("!d", row.last_at) for row in rows]),
    }
