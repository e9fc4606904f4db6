"""The inbox as a queue: claims by lease, renewal, and what becomes of a delivery. SQL beside its function.

All times are the database's. A lease has an owner that is never used twice, so a worker that was taken for dead can do
no harm when it wakes up: every write names the owner.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from webhook_api.bodies import clean_text
from webhook_api.db import Connection
from webhook_api.effects.base import Delivery, Entry, Record, fence, record_many
from webhook_api.states import Verdict

CHANNEL: Final = "webhook_deliveries"
MAX_CRASHES: Final = 1
"""A delivery that was there when more workers than this died is handled alone: it may be what kills them."""
_CLAIM_LOCK: Final = 0x41495348_434C4149
"""The advisory lock of whoever claims (an arbitrary, fixed number)."""

# An older delivery of the same request goes first until its avatar is settled, unless it is parked or dead: then it may
# never come. (The stream keeps its own order, so an outage of Redis or the object store holds up no avatar.)
_DUE: Final = """
    select d.id, d.next_attempt_at, octet_length(d.body) as size, d.crashes > {crashes} as suspect
    from webhook.deliveries d
    where d.state {states} and d.next_attempt_at <= now()
      and not exists (
        select from webhook.deliveries o
        where o.request_id = d.request_id and o.id < d.id and o.state in ('pending', 'leased', 'retry')
          and not exists (
            select from webhook.effects e
            where e.delivery_id = o.id and e.name = 'avatar'
              and (e.state in ('done', 'skipped') or e.detail ->> 'final' = 'true'))
        -- Asked for each request by itself. As a join, planned while nothing waited, it reads the whole backlog for each.
        offset 0)
    order by d.next_attempt_at
    limit %(limit)s
    for update of d skip locked
"""
# However large the bodies are, what is claimed at once fits into memory; one is always taken. What may be killing its
# workers is taken one by one: all that is leased when a worker dies is charged with it.
_CLAIM: Final = """
with due as materialized ({due}),
fitting as materialized (
    select id from (
        select id, sum(size) over (order by next_attempt_at, id) as total,
            row_number() over (order by next_attempt_at, id) as number
        from (select *, row_number() over (partition by suspect order by next_attempt_at, id) as nth from due) as told
        where not suspect or nth <= %(suspects)s) as counted
    where total <= %(bytes)s or number = 1
)
update webhook.deliveries d
set state = 'leased', lease_owner = %(owner)s || ':' || d.id || ':' || d.tries,
    lease_until = now() + make_interval(secs => %(lease)s), tries = d.tries + 1
from fitting where fitting.id = d.id
returning d.id, d.source, d.request_id, d.dedup_key, d.status, d.gateway_request_id, d.training_type_hint, d.account_id,
    d.body, d.body_sha256, d.headers, d.edge_request_id, d.probe, d.first_seen_at, d.tries,
    greatest(0, extract(epoch from now() - coalesce(d.replayed_at, d.first_seen_at)))::float8, d.lease_owner, d.crashes
"""
# What is new and what is tried again are two queues: a crowd in one cannot keep the other waiting.
_CLAIM_FRESH: Final = _CLAIM.format(due=_DUE.format(states="= 'pending'", crashes=MAX_CRASHES))
_CLAIM_AGAIN: Final = _CLAIM.format(due=_DUE.format(states="in ('retry', 'parked')", crashes=MAX_CRASHES))
_NEXT_DUE: Final = """
select extract(epoch from least(
    (select min(next_attempt_at) from webhook.deliveries where state = 'pending' and next_attempt_at > now()),
    (select min(next_attempt_at) from webhook.deliveries where state in ('retry', 'parked') and next_attempt_at > now())
) - now())::float8
"""
_EXPIRE: Final = """
with gone as (
    select id from webhook.deliveries where state = 'leased' and lease_until < now()
    order by lease_until limit 1000 for update skip locked
)
update webhook.deliveries d
set state = case when d.crashes + 1 >= %(limit)s then 'dead' else 'retry' end,
    crashes = d.crashes + 1, next_attempt_at = now(), lease_owner = null, lease_until = null,
    last_error = 'lease_expired: the worker died or hung in the middle (' || d.lease_owner || ')'
from gone where gone.id = d.id
returning d.id, d.request_id, d.state, d.crashes
"""
# Of many rows, only those that nobody else holds just now: who waits for one lock while holding others can be part of a
# deadlock with intake, which counts duplicates many at once.
_FREE: Final = """
    select id from webhook.deliveries where state = 'leased' and lease_owner = any(%(owners)s) for update skip locked
"""
_RENEW: Final = f"""
with free as ({_FREE})
update webhook.deliveries d set lease_until = now() + make_interval(secs => %(lease)s) from free where free.id = d.id
"""  # noqa: S608  (constants of this file)
_HELD: Final = """
select lease_owner from webhook.deliveries where state = 'leased' and lease_owner = any(%(owners)s)
"""
_FINISH: Final = """
update webhook.deliveries
set state = %(state)s, next_attempt_at = now() + make_interval(secs => %(delay)s), last_error = %(last_error)s,
    done_at = case when %(state)s = 'done' then now() end, lease_owner = null, lease_until = null,
    tries = case when %(state)s = 'pending' then greatest(0, tries - 1) else tries end
where id = %(id)s and state = 'leased' and lease_owner = %(owner)s
returning request_id
"""
_FINISH_MANY: Final = """
update webhook.deliveries d
set state = given.state, next_attempt_at = now() + make_interval(secs => given.delay), last_error = given.error,
    done_at = case when given.state = 'done' then now() end, lease_owner = null, lease_until = null,
    tries = case when given.state = 'pending' then greatest(0, d.tries - 1) else d.tries end
from unnest(%(ids)s::bigint[], %(states)s::text[], %(delays)s::float8[], %(errors)s::text[])
    as given (id, state, delay, error)
where d.id = given.id
"""
# Whoever waited for these need not wait for its own backoff any longer.
_WAKE: Final = """
with waiting as materialized (
    select d.id, d.next_attempt_at > now() as early
    from webhook.deliveries d
    where (d.state in ('pending', 'retry')) is true and d.id = any(array(
        select later.id
        from unnest(%(ids)s::bigint[], %(request_ids)s::text[]) as ended (id, request_id) cross join lateral (
            select w.id from webhook.deliveries w
            where w.request_id = ended.request_id and w.id > ended.id and w.state in ('pending', 'retry')
              and (w.state = 'pending' or exists (
                select from webhook.effects e
                where e.delivery_id = w.id and e.name = 'stream' and e.state = 'failed'
                  and e.detail ->> 'kind' = 'waiting'))
            -- By request, each by itself: as a join it reads the whole backlog for every batch.
            offset 0) as later))
    for update of d skip locked
), moved as (
    update webhook.deliveries d set next_attempt_at = now() from waiting where waiting.id = d.id and waiting.early
)
select pg_notify('webhook_deliveries', '') from waiting limit 1
"""
_RELEASE: Final = f"""
with free as ({_FREE})
update webhook.deliveries d
set state = 'retry', next_attempt_at = now() + make_interval(secs => %(delay)s), lease_owner = null, lease_until = null,
    tries = greatest(0, d.tries - 1), last_error = %(why)s
from free where free.id = d.id
"""  # noqa: S608  (constants of this file)
_ABANDON: Final = """
update webhook.deliveries d
set state = 'retry', next_attempt_at = now(), lease_owner = null, lease_until = null,
    tries = greatest(0, d.tries - 1), last_error = %(why)s
from (select id from webhook.deliveries where state = 'leased' and starts_with(lease_owner, %(claim)s || ':')
      for update skip locked) as free
where free.id = d.id
"""
_RECORDS: Final = """
select delivery_id, name, state, tries, detail, last_error from webhook.effects where delivery_id = any(%s)
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A leased delivery. `crashes`: how often it was leased by a worker that died with it."""

    delivery: Delivery
    crashes: int


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a delivery of a batch; without a verdict it stays leased, and goes on alone."""

    delivery: Delivery
    verdict: Verdict | None


def claim(
    connection: Connection,
    owner: str,
    limit: int,
    lease_seconds: float,
    *,
    fresh_first: bool = True,
    max_bytes: int = 4 * 1024**2,
    suspects: int = 1,
    force: bool = False,
) -> list[Claim] | None:
    """Lease up to `limit` deliveries that are due, of each queue the one that waited longest first.

    `fresh_first`: those that were never tried go before those that are tried again; otherwise the other way round.
    `max_bytes` bounds the bodies of each of the two queues, but one delivery is always taken. `suspects`: how many of each
    may be taken of those that may be killing their workers. None: another worker claims just now. Two claims at once do
    no harm (`force`), but each locks for a while what the other has leased.
    """
    queries = [_CLAIM_FRESH, _CLAIM_AGAIN] if fresh_first else [_CLAIM_AGAIN, _CLAIM_FRESH]
    rows: list[Any] = []
    with connection.transaction():
        if not force and not _is_my_turn(connection):
            return None
        # A claim that a crash of the server takes back does no harm: every later write asks for the lease.
        connection.execute("set local synchronous_commit = off")
        for query in queries:
            if len(rows) < limit:
                wanted = {
                    "owner": owner,
                    "limit": limit - len(rows),
                    "lease": lease_seconds,
                    "bytes": max_bytes,
                    "suspects": suspects,
                }
                rows += connection.execute(query, wanted, binary=True).fetchall()
    claims = [Claim(Delivery(*row[:-1]), int(row[-1])) for row in rows]
    return sorted(claims, key=lambda each: each.delivery.id)


def _is_my_turn(connection: Connection) -> bool:
    row = connection.execute("select pg_try_advisory_xact_lock(%s)", (_CLAIM_LOCK,)).fetchone()
    return bool(row and row[0])


def next_due(connection: Connection) -> float | None:
    """Seconds until the next delivery becomes due; None when none is scheduled."""
    row = connection.execute(_NEXT_DUE).fetchone()
    return None if row is None or row[0] is None else float(row[0])


def expire(connection: Connection, max_crashes: int) -> list[dict[str, Any]]:
    """Take back the leases that ran out. A delivery that loses its worker `max_crashes` times is dead."""
    rows = connection.execute(_EXPIRE, {"limit": max_crashes}).fetchall()
    return [dict(zip(("delivery_id", "request_id", "state", "crashes"), row, strict=True)) for row in rows]


def renew(connection: Connection, owners: Sequence[str], lease_seconds: float) -> frozenset[str]:
    """Extend leases; returns the owners that still hold theirs. One whose row is held just now is extended next time."""
    connection.execute(_RENEW, {"owners": list(owners), "lease": lease_seconds})
    return _held(connection, owners)


def _held(connection: Connection, owners: Sequence[str]) -> frozenset[str]:
    rows = connection.execute(_HELD, {"owners": list(owners)}).fetchall()
    return frozenset(str(row[0]) for row in rows)


def finish(connection: Connection, delivery: Delivery, verdict: Verdict) -> bool:
    """End an attempt. False when the lease was no longer ours, and nothing was written."""
    with connection.transaction():
        row = connection.execute(
            _FINISH,
            {
                "id": delivery.id,
                "owner": delivery.lease_owner,
                "state": str(verdict.state),
                "delay": verdict.delay,
                "last_error": _shown(verdict),
            },
        ).fetchone()
        if row is not None:
            connection.execute(_WAKE, {"ids": [delivery.id], "request_ids": [row[0]]})
    return row is not None


def finish_many(
    connection: Connection, endings: Sequence[Ending], entries: Iterable[Entry]
) -> frozenset[int]:
    """Record effects and end attempts. Returns the deliveries that were ours; of the others nothing was written."""
    with connection.transaction():
        held = fence(connection, [each.delivery for each in endings])
        record_many(connection, [entry for entry in entries if entry.delivery_id in held])
        ended = [each for each in endings if each.verdict and each.delivery.id in held]
        given = {
            "ids": [each.delivery.id for each in ended],
            "request_ids": [each.delivery.request_id for each in ended],
            "states": [str(each.verdict.state) for each in ended if each.verdict],
            "delays": [each.verdict.delay for each in ended if each.verdict],
            "errors": [_shown(each.verdict) for each in ended if each.verdict],
        }
        if ended:
            connection.execute(_FINISH_MANY, given)
            connection.execute(_WAKE, given)
    return held


def _shown(verdict: Verdict) -> str | None:
    return clean_text(verdict.last_error[:4000]) if verdict.last_error else None


def release(connection: Connection, owners: Sequence[str], why: str, *, delay: float = 0.0) -> frozenset[str]:
    """Give leases back without a verdict; returns the owners that have none any more. The others are to try again.

    They are due again in `delay` seconds.
    """
    connection.execute(_RELEASE, {"owners": list(owners), "why": why, "delay": delay})
    return frozenset(owners) - _held(connection, owners)


def abandon(connection: Connection, claim_owner: str, why: str) -> int:
    """Give back what a claim leased whose answer never came; returns how many that were."""
    return connection.execute(_ABANDON, {"claim": claim_owner, "why": why}).rowcount


def records(connection: Connection, delivery_ids: Sequence[int]) -> dict[int, dict[str, Record]]:
    """The effects recorded for each of the deliveries, by name."""
    found: dict[int, dict[str, Record]] = defaultdict(dict)
    for identifier, name, state, tries, detail, error in connection.execute(_RECORDS, (list(delivery_ids),)):
        found[int(identifier)][str(name)] = Record(str(state), int(tries), detail, error)
    return found
