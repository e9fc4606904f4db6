"""One delivery at a time: the statement that decides what an arrival is.

The batch (:mod:`webhook_api.inbox.batch`) is the fast way to the same result; whatever it cannot decide comes here.
"""

from __future__ import annotations

from typing import Any, Final

from psycopg.types.json import Jsonb

from webhook_api.bodies import FINAL_STATUSES
from webhook_api.db import INTAKE_DEADLINE, Connection, DatabaseUnavailable
from webhook_api.inbox.allowance import extra, is_large
from webhook_api.inbox.model import Delivery, Stored

MAX_VARIANTS: Final = 8
"""Other bodies kept for one delivery. More would let one sender fill the disk under a single identity."""

ALONE_LOCK_MILLISECONDS: Final = 600
"""How long a delivery that is stored alone waits for its row."""

ANOTHER: Final = """exists (
        select from webhook.deliveries o
        where o.source = {0}.source and o.request_id = {0}.request_id and o.aside is null
          and o.status in ('completed', 'failed', 'cancelled'))"""
"""Whether the request had ended before. A statement does not see its own rows."""

# xmax is 0 in a row that this statement has inserted. An attempt whose answer got lost is made again: when the row that
# is found is the one that it had made, it is not counted as another arrival.
_STORE: Final = f"""
with stored as (
    insert into webhook.deliveries as d (
        source, request_id, dedup_key, status, gateway_request_id, training_type_hint, account_id,
        body, body_sha256, headers, edge_request_id, probe, state, last_error, aside)
    values (
        %(source)s, %(request_id)s, %(dedup_key)s, %(status)s, %(gateway_request_id)s, %(training_type_hint)s,
        %(account_id)s, %(body)b, %(body_sha256)s, %(headers)s, %(edge_request_id)s, %(probe)s, %(state)s,
        %(last_error)s, %(aside)s)
    on conflict on constraint deliveries_identity do update
        set attempts = d.attempts + case when %(again)s and d.attempts = 1 and d.body_sha256 = excluded.body_sha256
                and d.edge_request_id = excluded.edge_request_id then 0 else 1 end,
            last_seen_at = greatest(d.last_seen_at, now())
    returning d.id, d.source, d.request_id, d.xmax = 0 as inserted, d.attempts, d.body_sha256
)
select id, inserted or (%(again)s and attempts = 1), attempts, body_sha256 <> %(body_sha256)s,
    inserted and %(final)s and {ANOTHER.format("stored")}
from stored
"""  # noqa: S608  (constants of this module)
_PATIENCE: Final = f"set local lock_timeout = {ALONE_LOCK_MILLISECONDS}"
# After the row was written, and so locked: this statement sees every variant. Two arrivals at once could otherwise both
# be the last one.
_VARIANT: Final = f"""
insert into webhook.delivery_variants (delivery_id, body_sha256, body, headers)
select %(id)s, %(body_sha256)s, %(body)b, %(headers)s
where (select count(*) from webhook.delivery_variants v where v.delivery_id = %(id)s) < {MAX_VARIANTS}
on conflict do nothing
"""  # noqa: S608  (constants of this module)


def ends_request(delivery: Delivery) -> bool:
    """Whether the delivery reports how its request ended, and is to be processed."""
    return delivery.aside is None and delivery.status in FINAL_STATUSES


def store_one(connection: Connection, delivery: Delivery, *, again: bool = False) -> Stored:
    """Store one delivery on an autocommitting connection. It is committed when this returns.

    ``again``: an earlier attempt at this very arrival may have been committed without our hearing of it.
    """
    values = _values(delivery) | {"again": again}
    with connection.transaction():
        connection.execute(_PATIENCE)
        if is_large(len(delivery.body)):
            milliseconds = round(1000 * (INTAKE_DEADLINE + extra(len(delivery.body))))
            connection.execute(f"set local statement_timeout = {milliseconds}", prepare=False)
        row = connection.execute(_STORE, values, prepare=True).fetchone()
        if row is None:
            raise DatabaseUnavailable("connection_lost", "the database gave no answer")
        stored = Stored(*row)
        if stored.variant:
            keep_variant(connection, stored.id, delivery)
    return stored


def keep_variant(connection: Connection, delivery_id: int | None, delivery: Delivery) -> None:
    """Keep another body of a known delivery, within the bound. In the transaction that has written its row."""
    connection.execute(_VARIANT, _values(delivery) | {"id": delivery_id})


def _values(delivery: Delivery) -> dict[str, Any]:
    return {
        "source": delivery.source,
        "request_id": delivery.request_id,
        "dedup_key": delivery.dedup_key,
        "status": delivery.status,
        "gateway_request_id": delivery.gateway_request_id,
        "training_type_hint": delivery.training_type_hint,
        "account_id": delivery.account_id,
        "body": delivery.body,
        "body_sha256": delivery.body_sha256,
        "headers": Jsonb(dict(delivery.headers)),
        "edge_request_id": delivery.edge_request_id,
        "probe": delivery.probe,
        "state": delivery.state,
        "last_error": delivery.last_error,
        "aside": delivery.aside,
        "final": ends_request(delivery),
    }
