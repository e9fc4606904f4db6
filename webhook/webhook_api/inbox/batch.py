"""Many deliveries in one statement and one commit, with the same result for each as if it had come alone.

Copies of one event are merged before (pure, :func:`merge`). One INSERT takes all events; those that the table knew
already are counted by a second statement, which steps over rows that somebody holds. What neither decides (a held row,
another body, a row that appeared in between) is left for the single statement.

Arrays go in PostgreSQL's binary format, packed here: a third of the processor time of the driver's own adaptation
(docs/decisions/0410).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

from webhook_api.db import Connection
from webhook_api.inbox.model import Delivery, Stored
from webhook_api.inbox.statement import ANOTHER, ends_request

LOCK_MILLISECONDS: Final = 150
"""How long a batch waits: only for the table, or for a row that somebody is just making."""
# PostgreSQL's numbers of its types, and of the arrays of them.
BOOL, BYTEA, INT4, TEXT, JSON, FLOAT8 = 16, 17, 23, 25, 114, 701
_ARRAY_OF: Final = {BOOL: 1000, BYTEA: 1001, INT4: 1007, TEXT: 1009, JSON: 199, FLOAT8: 1022}
TEXTS: Final = (
    "source", "request_id", "dedup_key", "status", "gateway_request_id", "training_type_hint", "account_id",
    "body_sha256", "edge_request_id", "state", "last_error", "aside",
)  # fmt: skip
COLUMNS: Final = ", ".join((*TEXTS, "body", "headers", "probe", "attempts"))

_INSERT: Final = f"""
with given as (
    select * from unnest({", ".join(f"%({name})b::text[]" for name in TEXTS)},
        %(body)b::bytea[], %(headers)b::json[], %(probe)b::bool[], %(attempts)b::int4[]) as g ({COLUMNS})
), created as (
    insert into webhook.deliveries ({COLUMNS}) select {COLUMNS} from given
    on conflict on constraint deliveries_identity do nothing
    returning id, source, request_id, dedup_key
)
select id, source, request_id, dedup_key, {ANOTHER.format("created")} from created
"""  # noqa: S608  (constants of this module)
# For a delivery that finds nobody to share with: half the work of planning and unpacking arrays.
_INSERT_ONE: Final = f"""
with created as (
    insert into webhook.deliveries ({COLUMNS})
    values ({", ".join(f"%({name})b::text" for name in TEXTS)}, %(body)b, %(headers)s, %(probe)s, %(attempts)s)
    on conflict on constraint deliveries_identity do nothing
    returning id, source, request_id, dedup_key
)
select id, source, request_id, dedup_key, {ANOTHER.format("created")} from created
"""  # noqa: S608  (constants of this module)
# Rows that somebody holds are stepped over: one of them must not keep the others waiting.
_COUNT: Final = """
with given as (
    select * from unnest(%(n)b::int4[], %(source)b::text[], %(request_id)b::text[], %(dedup_key)b::text[],
        %(body_sha256)b::text[], %(edge_request_id)b::text[], %(attempts)b::int4[])
        as g (n, source, request_id, dedup_key, body_sha256, edge_request_id, attempts)
), known as (
    select d.id, g.n, g.attempts,
        %(again)s and d.attempts = g.attempts and d.edge_request_id = g.edge_request_id as ours
    from given g join webhook.deliveries d using (source, request_id, dedup_key, body_sha256)
    for update of d skip locked
)
update webhook.deliveries d
set attempts = d.attempts + case when known.ours then 0 else known.attempts end,
    last_seen_at = greatest(d.last_seen_at, now())
from known where known.id = d.id
returning known.n, d.id, d.attempts, known.ours
"""


class Packed:
    """An array parameter in PostgreSQL's binary format."""

    __slots__ = ("data", "oid")

    def __init__(self, element: int, items: Sequence[bytes | None]) -> None:
        self.oid = _ARRAY_OF[element]
        parts = [struct.pack("!iiIii", 1, 1, element, len(items), 1)]
        for item in items:
            if item is None:
                parts.append(b"\xff\xff\xff\xff")
            else:
                parts += (struct.pack("!i", len(item)), item)
        self.data = b"".join(parts)


class _PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Packed) -> Buffer:
        return obj.data

    def get_key(self, obj: Packed, format: Any) -> Any:  # noqa: ARG002  (psycopg's signature)
        return (Packed, obj.oid)

    def upgrade(self, obj: Packed, format: Any) -> Dumper:  # noqa: ARG002  (psycopg's signature)
        made = _PackedDumper(Packed)
        made.oid = obj.oid
        return made


@dataclass(slots=True)
class Event:
    """Arrivals of a batch that are one event with one body."""

    delivery: Delivery
    members: list[int] = field(default_factory=list)
    """Positions in the batch, in the order of arrival."""


def merge(deliveries: Sequence[Delivery]) -> tuple[list[Event], list[int]]:
    """Return the events of a batch, ordered by key, and the positions that have to be stored alone.

    Copies are one event. Another body under the same identity is decided alone, after its event stands.
    """
    events: dict[tuple[str, str, str], Event] = {}
    alone = []
    for position, delivery in enumerate(deliveries):
        event = events.setdefault(delivery.identity, Event(delivery))
        if event.delivery.body_sha256 == delivery.body_sha256:
            event.members.append(position)
        else:
            alone.append(position)
    # Two batches that hold the same keys take them in the same order, so neither waits for the other in a circle.
    return [events[key] for key in sorted(events)], alone


def store_batch(
    connection: Connection, deliveries: Sequence[Delivery], *, again: bool = False
) -> list[Stored | None]:
    """Store a batch on an autocommitting connection. ``None`` stands for what has to be stored alone.

    A fault of the first statement raises and leaves nothing behind. ``again``: an earlier attempt at this very batch
    may have been committed without our hearing of it.
    """
    results: list[Stored | None] = [None] * len(deliveries)
    events, _ = merge(deliveries)
    if len(events) == 1:
        rows = connection.execute(_INSERT_ONE, _one_values(events[0]), prepare=True).fetchall()
    else:
        rows = connection.execute(_INSERT, _insert_values(events), prepare=True).fetchall()
    created = {(source, request_id, key): (id_, another) for id_, source, request_id, key, another in rows}
    ended = _ended_twice([event for event in events if event.delivery.identity in created])
    for event in events:
        made = created.get(event.delivery.identity)
        if made is not None:
            id_, another = made
            another = ends_request(event.delivery) and (another or event.delivery.identity in ended)
            _tell(event, results, id_, before=0, another=another)
    known = [event for event in events if event.delivery.identity not in created]
    if known:
        _count(connection, known, results, again)
    return results


def _ended_twice(created: list[Event]) -> set[tuple[str, str, str]]:
    """Of the events that end the same request in this batch, all but the first to arrive."""
    first: dict[tuple[str, str], Event] = {}
    later = set()
    for event in sorted(created, key=lambda event: event.members[0]):
        if not ends_request(event.delivery):
            continue
        if first.setdefault(event.delivery.identity[:2], event) is not event:
            later.add(event.delivery.identity)
    return later


def _count(connection: Connection, known: list[Event], results: list[Stored | None], again: bool) -> None:
    values: dict[str, Any] = {
        name: texts((event.delivery for event in known), name)
        for name in ("source", "request_id", "dedup_key", "body_sha256", "edge_request_id")
    }
    values |= {
        "n": integers(range(len(known))),
        "attempts": integers(len(event.members) for event in known),
        "again": again,
    }
    for n, id_, attempts, ours in connection.execute(_COUNT, values, prepare=True).fetchall():
        _tell(known[n], results, id_, before=attempts - len(known[n].members), created=ours)


def _tell(
    event: Event,
    results: list[Stored | None],
    id_: int,
    *,
    before: int,
    another: bool = False,
    created: bool | None = None,
) -> None:
    """Give each copy the answer that it would have had alone, one after the other."""
    created = before == 0 if created is None else created
    for nth, position in enumerate(event.members, start=1):
        first = created and nth == 1
        results[position] = Stored(id_, first, before + nth, variant=False, another_result=first and another)


def _insert_values(events: list[Event]) -> dict[str, Packed]:
    deliveries = [event.delivery for event in events]
    return {name: texts(deliveries, name) for name in TEXTS} | {
        "body": Packed(BYTEA, [delivery.body for delivery in deliveries]),
        "headers": Packed(JSON, [json.dumps(dict(delivery.headers)).encode() for delivery in deliveries]),
        "probe": Packed(BOOL, [b"\1" if delivery.probe else b"\0" for delivery in deliveries]),
        "attempts": integers(len(event.members) for event in events),
    }


def _one_values(event: Event) -> dict[str, Any]:
    delivery = event.delivery
    return {name: getattr(delivery, name) for name in TEXTS} | {
        "body": delivery.body,
        "headers": json.dumps(dict(delivery.headers)),
        "probe": delivery.probe,
        "attempts": len(event.members),
    }


def texts(deliveries: Iterable[Delivery], name: str) -> Packed:
    """One text column of deliveries."""
    column = (getattr(delivery, name) for delivery in deliveries)
    return Packed(TEXT, [None if value is None else value.encode() for value in column])


def integers(values: Iterable[int]) -> Packed:
    """Whole numbers of 32 bits."""
    return Packed(INT4, [struct.pack("!i", value) for value in values])


def prepare(connection: Connection) -> None:
    """Make a new connection one of the inbox's.

    It learns the packed arrays. Its plans keep to the index whatever the statistics say: one that is made while the table
    is new and empty would otherwise read the whole table later on. And a batch waits for a lock only so long that each
    of its deliveries can still wait alone before the sender's deadline.
    """
    connection.adapters.register_dumper(Packed, _PackedDumper)
    connection.execute(
        "set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off; "
        f"set lock_timeout = {LOCK_MILLISECONDS}"
    )
