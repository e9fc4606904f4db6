"""Times each question, counts the rows that it reads, and measures the intake, side by side in two databases."""

from __future__ import annotations

import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from webhook_api.bodies import dedup_key
from webhook_api.db import Connection, connect
from webhook_api.inbox import DatabaseInbox, Delivery, intake_pool
from webhook_api.shapes import SHAPES

from bench.table.queries import QUERIES, Known, Query

STATEMENT_SECONDS: Final = 30.0
READ_BOUND: Final = 20_000
"""More rows than this are a scan, whatever the planner calls it."""
_READ: Final = """
select pg_stat_get_xact_tuples_returned('webhook.deliveries'::regclass)
    + (select coalesce(sum(pg_stat_get_xact_tuples_returned(indexrelid) + pg_stat_get_xact_tuples_fetched(indexrelid)), 0)
       from pg_index where indrelid = 'webhook.deliveries'::regclass)
"""


@contextmanager
def session(url: str) -> Iterator[Connection]:
    """A connection as the service's, with the console's bound."""
    with connect(url, "bench-table", statement_timeout=STATEMENT_SECONDS) as connection:
        connection.execute("set lock_timeout = 0")
        # What parallel workers read is not counted here.
        connection.execute("set max_parallel_workers_per_gather = 0")
        yield connection


def question(connection: Connection, query: Query, known: Known, times: int) -> dict[str, Any]:
    """Seconds of each of ``times`` runs (``None``: not in time), and the rows that one of them read."""
    seconds: list[float | None] = []
    read = 0
    for _ in range(times):
        try:
            with connection.transaction(force_rollback=query.writes):
                if query.prepare:
                    query.prepare(connection)
                before = _rows_read(connection)
                started = time.perf_counter()
                query.run(connection, known)
                seconds.append(time.perf_counter() - started)
                read = _rows_read(connection) - before
        except psycopg.errors.QueryCanceled:
            seconds.append(None)
            break
    return {"seconds": seconds, "rows_read": read}


def _rows_read(connection: Connection) -> int:
    row = connection.execute(_READ).fetchone()
    return int(row[0]) if row else 0


def intake(url: str, threads: int, seconds: float) -> dict[str, float]:
    """Store new deliveries for a while: rows a second, and times in milliseconds."""
    pool = intake_pool(url, "bench-intake")
    pool.open()
    inbox = DatabaseInbox(pool)
    times: list[list[float]] = [[] for _ in range(threads)]
    _store(inbox)
    ends = time.perf_counter() + seconds

    def run(mine: list[float]) -> None:
        while time.perf_counter() < ends:
            started = time.perf_counter()
            _store(inbox)
            mine.append(time.perf_counter() - started)

    started = time.perf_counter()
    workers = [threading.Thread(target=run, args=(mine,)) for mine in times]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - started
    pool.close()
    every = sorted(each for mine in times for each in mine)
    return {
        "per_second": len(every) / took,
        "p50_ms": 1000 * statistics.median(every),
        "p99_ms": 1000 * every[int(len(every) * 0.99)],
        "max_ms": 1000 * every[-1],
        "rows": len(every),
    }


def _settle(url: str) -> None:
    """What the intake has left waiting is done: the questions that follow are about a table without a backlog."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "update webhook.deliveries set state = 'done', done_at = now() where state = 'pending'"
        )
        connection.execute("vacuum (analyze) webhook.deliveries")


def _store(inbox: DatabaseInbox) -> None:
    name = str(uuid.uuid4())
    body = SHAPES["portrait-ok"].build(name, "https://v3.fal.media")
    digest = uuid.uuid4().hex * 2
    headers = {
        "x-fal-webhook-request-id": name,
        "x-fal-webhook-signature": digest * 2,
        "content-type": "application/json",
    }
    stored = inbox.store(
        Delivery("fal", name, dedup_key("completed", digest), "completed", body, digest, headers=headers)
    )
    assert stored.created


def side_by_side(
    urls: dict[str, str],
    known: dict[str, Known],
    rounds: int,
    times: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """All measurements, the databases taking turns in every round. By name and database: lists of samples."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for threads in (1, 32):
            for place in _turns(urls, number):
                name = f"intake: {threads} at once"
                sample = intake(urls[place], threads, seconds)
                _settle(urls[place])
                found.setdefault(name, {}).setdefault(place, []).append(sample)
            say(f"round {number + 1}: {name}")
        for place in _turns(urls, number):
            with session(urls[place]) as connection:
                for query in QUERIES:
                    sample = question(connection, query, known[place], times)
                    found.setdefault(query.name, {}).setdefault(place, []).append(sample)
            say(f"round {number + 1}: questions to {place}")
    return found


def _turns(urls: dict[str, str], number: int) -> list[str]:
    places = list(urls)
    return places if number % 2 == 0 else places[::-1]
