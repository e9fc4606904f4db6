"""What is asked of the table: by workers, by the console and by retention, each through the service's own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from webhook_api import gauges, retention, status
from webhook_api.actions import DEAD_LETTERS
from webhook_api.config_upkeep import RetentionSettings
from webhook_api.console import Filter, audited, counted, found_by, listed, resolved
from webhook_api.db import Connection
from webhook_api.effects import stream
from webhook_api.reconcile import ledger
from webhook_api.retention import STEPS
from webhook_api.web import look
from webhook_api.worker import queue

PAGE: Final = 50
DEAD: Final = "d.state = 'dead' and d.discarded_at is null and d.aside is null"
RARE: Final = 5
"""Rows with a rare source and as many with a rare status, among the oldest: the worst place for who looks from the end."""
NEW: Final = 5_000
"""Deliveries that wait: a backlog that came after the statistics were taken."""

_NEW: Final = """
insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256)
select 'fal', gen_random_uuid()::text, 'completed:x', 'completed', convert_to(repeat('x', 500), 'UTF8'), repeat('0', 64)
from generate_series(1, %s)
"""


@dataclass(frozen=True, slots=True)
class Query:
    """A question. ``run`` is timed; ``prepare`` is not, and both are rolled back when ``writes``."""

    name: str
    run: Callable[[Connection, Known], Any]
    writes: bool = False
    prepare: Callable[[Connection], Any] | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """Rows that are known to be there."""

    first: int
    middle: int
    last: int
    request_id: str
    """Of the one in the middle."""


def know(connection: Connection) -> Known:
    """Look at the table; gives a few of the oldest rows a rare source and a rare status."""
    connection.execute(
        "update webhook.deliveries set source = 'replicate' where id in "
        "(select id from webhook.deliveries order by id limit %s)",
        (RARE,),
    )
    connection.execute(
        "update webhook.deliveries set status = 'cancelled' where id in "
        "(select id from webhook.deliveries order by id offset %s limit %s)",
        (RARE, RARE),
    )
    row = connection.execute("select min(id), max(id) from webhook.deliveries").fetchone()
    assert row is not None
    # Rolled back inserts have left holes in the ids.
    found = connection.execute(
        "select id, request_id from webhook.deliveries where id >= %s order by id limit 1",
        ((row[0] + row[1]) // 2,),
    ).fetchone()
    assert found is not None
    return Known(row[0], int(found[0]), row[1], str(found[1]))


def _list(extra: str = "true", after: str | None = None, **wanted: Any) -> Callable[[Connection, Known], Any]:
    def run(connection: Connection, known: Known) -> Any:
        said = {name: value(known) if callable(value) else value for name, value in wanted.items()}
        begin = getattr(known, after) if after else None
        return listed(connection, Filter(**said), limit=PAGE, after=begin, extra=extra)

    return run


def _through(extra: str = look.EVERYTHING, **wanted: Any) -> Callable[[Connection, Known], Any]:
    """As the console's pages ask."""

    def run(connection: Connection, known: Known) -> Any:
        said = {name: value(known) if callable(value) else value for name, value in wanted.items()}
        asked = resolved(connection, Filter(**said), deep=False)
        return look.through(connection, asked, limit=PAGE + 1, extra=extra)

    return run


def _since(_: Known) -> datetime:
    return datetime.now(UTC) - timedelta(minutes=30)


def _ago(days: float) -> Callable[[Known], datetime]:
    return lambda _: datetime.now(UTC) - timedelta(days=days)


def _claim(connection: Connection, _: Known) -> int:
    claims = queue.claim(connection, "bench", 128, 60.0)
    assert claims is not None
    assert len(claims) == 128
    return len(claims)


def _batch(connection: Connection) -> dict[str, Any]:
    """The last 128 of the backlog, as a worker's batch."""
    found = connection.execute(
        "select id, request_id from webhook.deliveries where state = 'pending' order by id desc limit 128"
    ).fetchall()
    return {
        "ids": [row[0] for row in found],
        "request_ids": [row[1] for row in found],
        "probes": [False] * 128,
    }


def _older(connection: Connection, _: Known) -> Any:
    return connection.execute(stream._OLDER, _batch(connection)).fetchall()


def _wake(connection: Connection, _: Known) -> Any:
    return connection.execute(queue._WAKE, _batch(connection)).fetchall()


def _backlog(connection: Connection) -> Any:
    return connection.execute(_NEW, (NEW,))


def _prune(step: int) -> Callable[[Connection, Known], Any]:
    def run(connection: Connection, _: Known) -> Any:
        values = {"days": 1, "limit": RetentionSettings().batch_rows, "at": "-infinity", "id": 0}
        found = connection.execute(STEPS[step].statement.encode(), values).fetchall()
        assert len(found) == values["limit"], f"{len(found)} rows"
        return found

    return run


def _mark(pruned: int) -> Callable[[Connection], Any]:
    """As if the steps before had been there: the oldest rows, twice as many as a batch takes."""
    return lambda connection: connection.execute(
        "update webhook.deliveries set pruned = %s where id in (select id from webhook.deliveries where state = 'done' "
        "and pruned = 0 order by done_at, id limit 1000)",
        (pruned,),
    )


def _of_avatar(connection: Connection, known: Known) -> Any:
    return ledger.reported(connection, known.request_id)


QUERIES: Final = (
    Query("worker: next due", lambda c, _: queue.next_due(c)),
    Query("worker: expired leases", lambda c, _: queue.expire(c, 3), writes=True),
    Query("console: newest", _list()),
    Query("console: a page in the middle", _list(after="middle")),
    Query("console: state dead", _list(states=("dead",))),
    Query("console: state parked or retry", _list(states=("parked", "retry"))),
    Query("console: state done", _list(states=("done",))),
    Query("console: a common source", _list(source="manual")),
    Query("console: a rare source", _list(source="replicate")),
    Query("console: a source that never was", _list(source="nobody")),
    Query("console: status failed", _list(status="failed")),
    Query("console: a rare status", _list(status="cancelled")),
    Query("console: since half an hour", _list(since=_since)),
    Query("console: since half an hour, failed", _list(since=_since, status="failed")),
    Query("console: until a long time ago", _list(until=_ago(399.9))),
    Query("console: an hour long ago", _list(since=_ago(200), until=_ago(200 - 1 / 24))),
    Query("console: request id", _list(request_ids=lambda known: (known.request_id,))),
    Query("console: dead letters", _list(DEAD)),
    Query("console: kept aside", _list(aside="any")),
    Query("console: count dead letters", lambda c, _: counted(c, Filter(states=("dead",)))),
    Query("console: one in full", lambda c, known: found_by(c, str(known.middle), body=True)),
    Query("console: one in full, by request", lambda c, known: found_by(c, known.request_id)),
    Query("page: since 100 days, failed", _through(since=_ago(100), status="failed")),
    Query("page: since 100 days, manual", _through(since=_ago(100), source="manual")),
    Query(
        "page: since 100 days, failed and manual", _through(since=_ago(100), status="failed", source="manual")
    ),
    Query("page: since 100 days, done", _through(since=_ago(100), states=("done",))),
    Query("page: a text", _through(text="nowhere")),
    Query("page: a text, failed", _through(text="nowhere", status="failed")),
    Query("page: a reason", _through(reason="nowhere")),
    Query("page: an avatar that the bot does not know", _through(avatar_recorded="nobody")),
    Query("page: dead letters", _through(DEAD_LETTERS)),
    Query("page: dead letters, a text", _through(DEAD_LETTERS, text="nowhere")),
    Query("page: parked", _through("d.state = 'parked'")),
    Query("page: what was done to one", lambda c, known: audited(c, delivery=known.middle)),
    Query("metrics: inbox", lambda c, _: gauges.inbox(c)),
    Query("status page: counts", lambda c, _: c.execute(status._COUNTS).fetchone()),
    Query("sizes of tables", lambda c, _: retention.sizes(c)),
    Query("prune: 500 bodies", _prune(0), writes=True),
    Query("prune: effects of 500", _prune(2), writes=True, prepare=_mark(1)),
    Query("prune: 500 deliveries", _prune(3), writes=True, prepare=_mark(2)),
    Query("reconcile: OK without a payload", lambda c, _: ledger.without_payload(c), writes=True),
    Query("reconcile: was it reported?", _of_avatar),
    # Last: each leaves thousands of dead rows behind for the next.
    Query("worker: claim of 128", _claim, writes=True, prepare=_backlog),
    Query("worker: older ones of a batch", _older, writes=True, prepare=_backlog),
    Query("worker: wake who waited for a batch", _wake, writes=True, prepare=_backlog),
)
