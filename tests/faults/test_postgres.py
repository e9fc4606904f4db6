"""PostgreSQL goes away in every way while deliveries come in: nothing answered 200 is lost, doubled or forged."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from webhook_api.config import Settings

from tests.faults.conftest import SEED, size
from tests.support.faultsite import FaultSite, small_postgres, wait_postgres
from tests.support.ledger import Attempt, Event, Ledger, Sender
from tests.support.stackproc import Stack, running_stack

SPOOL = "spool_dir" in Settings.__dataclass_fields__
ANSWER_SECONDS = 8.0
"""Longest answer while PostgreSQL is away, on a busy machine; fal's patience is 15 s."""


def count() -> int:
    return size("EVENTS", 150, 2000)


def taken_without_postgresql(ledger: Ledger, start: float, end: float) -> list[Attempt]:
    """Every delivery was answered: by the spool where there is one, otherwise with 503, and never by a broken connection."""
    attempts = ledger.between(start, end)
    assert attempts, "nothing was sent while PostgreSQL was away"
    assert {attempt.status for attempt in attempts} <= {200, 503}
    assert max(attempt.seconds for attempt in attempts) < ANSWER_SECONDS
    accepted = [attempt for attempt in attempts if attempt.status == 200]
    if SPOOL:
        assert accepted, f"nothing was spooled: {ledger.answers()}"
    return accepted


def send_during(stack: Stack, ledger: Ledger, sender: Sender, events: list[Event]) -> float:
    """Send more, and return when some of it was tried: the first load may be gone before the fault is there."""
    began = ledger.now()
    sender.send(events)
    stack.wait(lambda: ledger.between(began, ledger.now()), "something is sent while PostgreSQL is away")
    return began


def test_postgresql_killed_under_load(stack: Stack, report: Callable[..., None]) -> None:
    with stack.load("pg-killed", count()) as (ledger, sender):
        ledger.ambiguous = True
        # Made before: their avatars are rows too.
        more = stack.events(ledger, count())
        stack.site.postgres.kill()
        killed = send_during(stack, ledger, sender, more)
        time.sleep(2)
        back = ledger.now()
        stack.site.postgres.start()
    taken = taken_without_postgresql(ledger, killed, back)
    stack.verify()
    report(ledger, taken_while_down=len(taken))


def test_postgresql_restarted_under_load(stack: Stack, report: Callable[..., None]) -> None:
    with stack.load("pg-restarted", count()) as (ledger, _):
        ledger.ambiguous = True
        for _ in range(size("RESTARTS", 1, 10)):
            stack.site.postgres.restart()
            wait_postgres(stack.database_url)
    stack.verify()
    report(ledger)


def test_postgresql_disk_full(site: FaultSite, tmp_path: Path, report: Callable[..., None]) -> None:
    """Its disk is full, so it refuses rows or stops altogether; then there is space again."""
    with (
        small_postgres(site) as small,
        running_stack(
            site, tmp_path / "stack", postgres_port=small.server.port, apis=1, workers=1, seed=SEED
        ) as stack,
    ):
        with stack.load("pg-full", count()) as (ledger, sender):
            ledger.ambiguous = True
            more = stack.events(ledger, count())
            small.fill()
            full = send_during(stack, ledger, sender, more)
            stack.wait(
                lambda: any(
                    a.status == 503 or a.answer.get("delivery_id", 0) is None
                    for a in ledger.between(full, ledger.now())
                ),
                "PostgreSQL can take no more rows",
            )
            time.sleep(1)
            freed = ledger.now()
            small.free()
            # The engine waits longer and longer before it starts a server again that cannot start.
            small.server.restart()
            wait_postgres(stack.database_url)
        taken_without_postgresql(ledger, full, freed)
        stack.verify()
        report(ledger)


def test_postgresql_slow_then_frozen(stack: Stack, report: Callable[..., None]) -> None:
    """Each answer takes 50 ms, then longer than intake waits, then the server stops in the middle of everything."""
    with stack.load("pg-slow", count()) as (ledger, _):
        ledger.ambiguous = True
        stack.postgres.faults.delay = 0.05
        time.sleep(1)
        stack.postgres.faults.delay = 2.5
        slow = ledger.now()
        time.sleep(2.5)
        stack.postgres.calm()
        stack.site.postgres.pause()
        time.sleep(2)
        stack.site.postgres.unpause()
        end = ledger.now()
    taken_without_postgresql(ledger, slow, end)
    stack.verify()
    report(ledger)


def test_connections_cut_in_the_middle_of_transactions(stack: Stack, report: Callable[..., None]) -> None:
    """By the line, before a request gets through or before its answer does, and by the server."""
    chance = random.Random(SEED)
    with stack.load("pg-cut", count()) as (ledger, sender):
        ledger.ambiguous = True
        before = stack.postgres.cuts
        stack.postgres.faults.lose_answer = 0.03
        stack.postgres.faults.lose_request = 0.02
        ended = 0
        with psycopg.connect(stack.database_url, autocommit=True) as admin:
            deadline = time.monotonic() + 60 + count() / 20
            while (sender.open or stack.postgres.cuts - before <= 20) and time.monotonic() < deadline:
                ended += len(
                    admin.execute(
                        "select pg_terminate_backend(pid) from pg_stat_activity "
                        "where datname = current_database() and usename = 'aisha_webhook' and random() < %s",
                        (chance.uniform(0, 0.2),),
                    ).fetchall()
                )
                time.sleep(chance.uniform(0, 0.4))
        cuts = stack.postgres.cuts - before
        stack.postgres.calm()
    assert cuts > 20
    stack.verify()
    report(ledger, cut_by_the_line=cuts, ended_by_the_server=ended)


@pytest.mark.skipif(not SPOOL, reason="there is no spool")
def test_what_the_spool_holds_survives_its_process(stack: Stack, report: Callable[..., None]) -> None:
    """PostgreSQL is away, everything accepted stands in the spool, and every instance is killed; then all come back."""
    stack.postgres.down()
    ledger = stack.ledger("spool-killed")
    events = stack.events(ledger, count() // 2)
    with stack.sender(ledger) as sender:
        sender.send(events)
        sender.wait(60)
        assert all(entry.accepted for entry in ledger.entries.values())
        for api in stack.apis:
            api.kill()
        stack.postgres.up()
        # One instance alone drains what both have left behind.
        stack.apis[0].start()
        stack.verify()
        stack.apis[1].start()
    report(ledger)
