"""One entry in the Redis stream that tells the bot, exactly once.

A worker can die between adding the entry and recording that it did. So the entry and a marker are written by one
script, which Redis runs and persists as one: a second attempt finds the marker and gets the first entry's id back.

What fal reports and what the reconciler learned by asking fal are two deliveries of one result. Whichever comes second
adds no entry when it says nothing new (`same_report`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC
from typing import Any, Final

import psycopg
import redis

from webhook_api.bodies import FINAL_STATUSES, BodyError, Event, parse, training_type
from webhook_api.db import Connection, DatabaseUnavailable
from webhook_api.effects import avatar
from webhook_api.effects.base import Delivery, Job, Outcome, Result
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "stream"
MARKER_SECONDS: Final = 30 * 86_400
"""How long a marker is kept: longer than any outage after which an attempt could be repeated."""

_ADD: Final = """
local before = redis.call('GET', KEYS[2])
if before then return {before, 0} end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(ARGV, 3))
redis.call('SET', KEYS[2], id, 'EX', ARGV[2])
return {id, 1}
"""
_ADD_SHA: Final = hashlib.sha1(_ADD.encode()).hexdigest()  # noqa: S324  (Redis' name of the script)
RECONCILE: Final = "reconcile"
"""Source of what the reconciler learned by asking fal."""

_OLDER: Final = """
select given.id, min(older.id)
from unnest(%(ids)s::bigint[], %(request_ids)s::text[], %(probes)s::boolean[]) as given (id, request_id, probe)
cross join lateral (
    select o.id from webhook.deliveries o
    where o.request_id = given.request_id and o.id < given.id and o.probe = given.probe
      and o.state in ('pending', 'leased', 'retry')
      and not exists (
        select from webhook.effects e
        where e.delivery_id = o.id and e.name = 'stream'
          and (e.state in ('done', 'skipped') or e.detail ->> 'final' = 'true'))
    -- By request, each by itself: as a join it reads the whole backlog for every batch.
    offset 0) as older
group by given.id
"""
# The index deliveries_reconciled answers the first at once for all that was never asked for, which is nearly everything.
_TOLD: Final = """
select given.id, o.id, o.source, o.body
from unnest(%(ids)s::bigint[], %(request_ids)s::text[], %(statuses)s::text[]) as given (id, request_id, status)
join webhook.deliveries o
  on o.request_id = given.request_id and o.source {other} 'reconcile' and o.status = given.status and not o.probe
join webhook.effects e on e.delivery_id = o.id and e.name = 'stream' and e.state = 'done'
order by o.id
"""
_TOLD_BY_RECONCILE: Final = _TOLD.format(other="=")
_TOLD_BY_OTHERS: Final = _TOLD.format(other="<>")


def stream_name(stream: str, probe: bool) -> str:
    """The stream that a delivery belongs to: probes have one of their own."""
    return f"{stream}:probe" if probe else stream


def marker(delivery: Delivery, stream: str, replay: int = 0) -> str:
    """Key of the marker. Not the row's id: a database that was made anew gives old ids again.

    `replay`: how often an operator has asked for the entry again; each has a marker of its own. The stream's name stands
    in braces, so that a Redis Cluster keeps both keys in one slot.
    """
    identity: tuple[object, ...] = (
        delivery.source, delivery.request_id, delivery.dedup_key, delivery.first_seen_at.timestamp()
    )  # fmt: skip
    identity += (replay,) if replay else ()
    return f"{{{stream}}}:sent:{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}"


def fields(job: Job) -> dict[str, str]:
    """The entry. All values are text; `archive` is JSON; times are RFC 3339 in UTC.

    `replay` is only there in an entry that an operator has asked for again, and counts how often.
    """
    delivery, event = job.delivery, job.event
    row = job.detail(avatar.NAME)
    kind = row.get("training_type") or training_type(delivery.training_type_hint)
    hint = event.hints.training_type if event else None
    return {
        "delivery_id": str(delivery.id),
        "source": delivery.source,
        "request_id": delivery.request_id,
        "status": delivery.status,
        "avatar_id": str(row.get("avatar_id") or ""),
        "training_type": kind or hint or "",
        "occurred_at": delivery.first_seen_at.astimezone(UTC).isoformat(timespec="milliseconds"),
        "archive": json.dumps(_archive(job), separators=(",", ":")),
        "probe": "1" if delivery.probe else "0",
        **({"replay": str(replay_of(job))} if replay_of(job) else {}),
    }


def replay_of(job: Job) -> int:
    """How often an operator has asked for this entry again; 0 for nearly all."""
    return int(job.detail(NAME).get("replay") or 0)


def _archive(job: Job) -> dict[str, Any]:
    """Where the files are. A `missing` one will stand under its key when the object store is back."""
    return {
        "bucket": job.tools.store.bucket,
        "artifacts": [
            {name: entry[name] for name in ("place", "key", "state", "size", "sha256") if name in entry}
            for entry in job.detail("archive").get("artifacts", ())
        ],
    }


def same_report(status: str, mine: Event | None, other: Event | None) -> bool:
    """Whether two deliveries with the same final status tell the bot the same.

    A result does when its payload is the same: one without a payload and the full one after it do not. A failure or a
    cancellation says nothing else that the bot acts on; its text differs between a webhook and the queue API.
    """
    if status != "completed":
        return status in FINAL_STATUSES
    return mine is not None and other is not None and mine.payload == other.payload


def run(job: Job) -> Outcome:
    """Add the entry, unless a former attempt did."""
    result = run_many([job])[job.delivery.id]
    if isinstance(result, EffectError):
        raise result
    return result


def run_many(jobs: Sequence[Job]) -> dict[int, Result]:
    """Add the entries of many deliveries, in one round trip. An outage of Redis is raised as `EffectError`."""
    results: dict[int, Result] = {}
    for job in jobs:
        before = _before_avatar(job)
        if before is not None:
            results[job.delivery.id] = before
    ready = [job for job in jobs if job.delivery.id not in results]
    if ready:
        results |= _asked(ready)
        ready = [job for job in ready if job.delivery.id not in results]
    if ready:
        results |= _add(ready)
    return results


def _before_avatar(job: Job) -> Result | None:
    """What keeps the entry from being added as long as the avatar is not settled."""
    row = job.records.get(avatar.NAME)
    if row is None or row.settled:
        return None
    if row.final:
        return Outcome.skipped("the avatar was given up")
    return EffectError(Failure.WAITING, "avatar_pending", "the avatar comes first")


def _asked(jobs: Sequence[Job]) -> dict[int, Result]:
    """Those whose entry must wait for an older delivery's, and those that another delivery has told already."""
    try:
        with jobs[0].tools.borrow() as connection:
            older = _older(connection, jobs)
            told = _told(
                connection, [job for job in jobs if job.delivery.id not in older and not replay_of(job)]
            )
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise EffectError(Failure.OUTAGE, "database_unavailable", str(error)) from error
    waiting: dict[int, Result] = {
        identifier: EffectError(
            Failure.WAITING, "older_first", f"delivery {first} of the same request comes first"
        )
        for identifier, first in older.items()
    }
    skipped = {identifier: Outcome.skipped(f"told by delivery {other}") for identifier, other in told.items()}
    return waiting | skipped


def _older(connection: Connection, jobs: Sequence[Job]) -> dict[int, int]:
    """The entries of one request stand in the order in which its deliveries arrived: who waits for whom."""
    given = {
        "ids": [job.delivery.id for job in jobs],
        "request_ids": [job.delivery.request_id for job in jobs],
        "probes": [job.delivery.probe for job in jobs],
    }
    return {int(mine): int(first) for mine, first in connection.execute(_OLDER, given).fetchall()}


def _told(connection: Connection, jobs: Sequence[Job]) -> dict[int, int]:
    """By whom the bot was told already: the reconciler and a sender may report the same result."""
    # What an operator has asked for again is told again.
    ends = [
        job for job in jobs
        if job.delivery.status in FINAL_STATUSES and not job.delivery.probe and not replay_of(job)
    ]  # fmt: skip
    learned = [job for job in ends if job.delivery.source == RECONCILE]
    sent = [job for job in ends if job.delivery.source != RECONCILE]
    found: dict[int, int] = {}
    for group, query in ((sent, _TOLD_BY_RECONCILE), (learned, _TOLD_BY_OTHERS)):
        if not group:
            continue
        by_id = {job.delivery.id: job for job in group}
        given = {
            "ids": list(by_id),
            "request_ids": [job.delivery.request_id for job in group],
            "statuses": [job.delivery.status for job in group],
        }
        for mine, other, source, body in connection.execute(query, given, binary=True).fetchall():
            job = by_id[int(mine)]
            report = _read(bytes(body), job.tools.shapes.get(source, "fal"))
            if mine not in found and same_report(job.delivery.status, job.event, report):
                found[int(mine)] = int(other)
    return found


def _read(body: bytes, shape: str) -> Event | None:
    try:
        return parse(body, shape)
    except BodyError:
        return None


def _add(jobs: Sequence[Job]) -> dict[int, Result]:
    """Run the script once a delivery. What Redis refuses for one of them concerns that one."""
    tools = jobs[0].tools
    places = {job.delivery.id: _place(job) for job in jobs}
    with tools.redis.use() as client:
        pipeline = client.pipeline(transaction=False)
        pipeline.script_load(_ADD)
        for job in jobs:
            target, mark = places[job.delivery.id]
            entry = [part for pair in fields(job).items() for part in pair]
            pipeline.evalsha(_ADD_SHA, 2, target, mark, str(tools.stream_maxlen), str(MARKER_SECONDS), *entry)
        answers: list[Any] = pipeline.execute(raise_on_error=False)[1:]
        if all(isinstance(answer, Exception) for answer in answers):
            raise answers[0]
    return {
        job.delivery.id: _result(*places[job.delivery.id], answer)
        for job, answer in zip(jobs, answers, strict=True)
    }


def _place(job: Job) -> tuple[str, str]:
    target = stream_name(job.tools.stream, job.delivery.probe)
    return target, marker(job.delivery, target, replay_of(job))


def _result(target: str, mark: str, answer: Any) -> Result:
    if isinstance(answer, redis.RedisError):
        message = f"Redis: {type(answer).__name__}: {answer}"
        return EffectError(Failure.OUTAGE, "redis_unavailable", message)
    detail = {"stream": target, "entry": str(answer[0]), "marker": mark, "added": bool(answer[1])}
    return Outcome(EffectState.DONE, detail)
