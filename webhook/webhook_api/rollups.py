"""Counts of each five minutes, kept by a worker while they are recent, so that no page ever counts deliveries.

A bucket is read by the index on ``first_seen_at`` and holds at most ``MOST`` rows; the newest are counted again every
minute, and those of the last day that are missing are filled in little by little.
"""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import Final

import psycopg

from webhook_api.config import Settings
from webhook_api.db import Connection, connect, sole

BUCKET: Final = timedelta(minutes=5)
AGAIN: Final = 3
"""The newest buckets, which still change."""
HORIZON: Final = timedelta(hours=24)
AT_ONCE: Final = 12
"""Missing buckets that one run fills in."""
MOST: Final = 50_000
"""Rows of a bucket that are read; above it the counts stop."""
KEEP: Final = timedelta(days=31)
EVERY: Final = 60.0
LOCK: Final = 0x7768745F726F6C6C
"""Advisory lock of whoever counts (an arbitrary number)."""
LOG: Final = logging.getLogger(__name__)

_COUNT: Final = f"""
insert into webhook.rollups (starts_at, deliveries, failed, done, dead, latency_p50, latency_p95)
select %(starts)s, count(*), count(*) filter (where status = 'failed'), count(*) filter (where state = 'done'),
       count(*) filter (where state = 'dead' and discarded_at is null and aside is null),
       percentile_cont(0.5) within group (order by took), percentile_cont(0.95) within group (order by took)
from (select status, state, discarded_at, aside,
             case when replayed_at is null then extract(epoch from done_at - first_seen_at) end as took
      from webhook.deliveries
      where first_seen_at >= %(starts)s and first_seen_at < %(ends)s and not probe limit {MOST}) as d
on conflict (starts_at) do update set deliveries = excluded.deliveries, failed = excluded.failed, done = excluded.done,
    dead = excluded.dead, latency_p50 = excluded.latency_p50, latency_p95 = excluded.latency_p95, counted_at = now()
"""  # noqa: S608  (the only value is a constant of this module)


def start_of(moment: datetime) -> datetime:
    """Beginning of the bucket in which a moment lies."""
    seconds = int(BUCKET.total_seconds())
    return datetime.fromtimestamp(int(moment.timestamp()) // seconds * seconds, UTC)


def count(connection: Connection, now: datetime) -> int:
    """Count the newest buckets and some that are missing; returns how many."""
    newest = start_of(now)
    known = {
        row[0]
        for row in connection.execute(
            "select starts_at from webhook.rollups where starts_at >= %s", (newest - HORIZON,)
        ).fetchall()
    }
    all_starts = [newest - BUCKET * index for index in range(int(HORIZON / BUCKET))]
    missing = [starts for starts in all_starts[AGAIN:] if starts not in known]
    wanted = all_starts[:AGAIN] + missing[:AT_ONCE]
    for starts in wanted:
        connection.execute(_COUNT, {"starts": starts, "ends": starts + BUCKET})
    connection.execute("delete from webhook.rollups where starts_at < %s", (now - KEEP,))
    return len(wanted)


def job(settings: Settings, stop: threading.Event) -> None:
    """Count every minute until ``stop`` is set. For a thread of the worker."""
    while not stop.is_set():
        try:
            with (
                connect(settings.database_url, "webhook-rollups", statement_timeout=5.0) as connection,
                sole(connection, LOCK) as alone,
            ):
                if alone:
                    count(connection, datetime.now(UTC))
        except psycopg.Error as error:
            LOG.warning("rollups_failed", extra={"error": str(error)[:300]})
        except Exception:  # a defect must not end the worker's other work
            LOG.exception("rollups_defect")
        stop.wait(EVERY)
