"""The inbox in a real PostgreSQL: one row an event, under every kind of repetition."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from webhook_api import db
from webhook_api.db import Breaker
from webhook_api.inbox import MAX_VARIANTS, DatabaseInbox, Delivery, intake_pool

from tests.support.databases import with_address
from tests.support.gate import gate

pytestmark = pytest.mark.backends


@pytest.fixture
def connection(url: str) -> Iterator[db.Connection]:
    with db.connect(url, "test") as made:
        made.execute("truncate webhook.deliveries cascade")
        yield made


@pytest.fixture
def inbox(url: str, connection: db.Connection) -> Iterator[DatabaseInbox]:
    database = intake_pool(url, "test")
    database.open()
    # A busy machine must not turn a held row into a deadline that has passed.
    yield DatabaseInbox(database, deadline=20)
    database.close()


def arrived(request_id: str = "r-1", body: bytes = b"{}", **changes: Any) -> Delivery:
    return Delivery(
        **{
            "source": "fal", "request_id": request_id, "dedup_key": "completed", "status": "completed", "body": body,
            "body_sha256": hashlib.sha256(body).hexdigest(), "headers": {"content-type": "application/json"}, **changes,
        }
    )  # fmt: skip


def test_a_row_holds_the_bytes_as_they_came(inbox: DatabaseInbox, connection: db.Connection) -> None:
    body = bytes(range(256)) * 400
    stored = inbox.store(
        arrived(body=body, account_id="a", training_type_hint="style", edge_request_id="e", probe=True)
    )
    assert (stored.created, stored.attempts, stored.outcome) == (True, 1, "stored")
    row = connection.execute(
        "select body, headers, state, account_id, training_type_hint, edge_request_id, probe, tries, "
        "next_attempt_at <= now() from webhook.deliveries where id = %s",
        (stored.id,),
    ).fetchone()
    assert row == (body, {"content-type": "application/json"}, "pending", "a", "style", "e", True, 0, True)


def test_a_hundred_at_once_are_one_row(inbox: DatabaseInbox, connection: db.Connection) -> None:
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda _: inbox.store(arrived()), range(100)))
    assert sum(result.created for result in results) == 1
    assert len({result.id for result in results}) == 1
    assert connection.execute("select count(*), max(attempts) from webhook.deliveries").fetchone() == (1, 100)


def test_another_body_is_a_variant_and_bounded(inbox: DatabaseInbox, connection: db.Connection) -> None:
    inbox.store(arrived(body=b"first"))
    for n in range(MAX_VARIANTS + 5):
        stored = inbox.store(arrived(body=b"other %d" % n))
        assert stored.outcome == "variant"
    inbox.store(arrived(body=b"other 0"))
    assert inbox.store(arrived(body=b"first")).outcome == "duplicate"
    assert connection.execute("select body from webhook.deliveries").fetchall() == [(b"first",)]
    assert connection.execute("select count(*) from webhook.delivery_variants").fetchone() == (MAX_VARIANTS,)


def test_sources_and_statuses_do_not_mix(inbox: DatabaseInbox, connection: db.Connection) -> None:
    inbox.store(arrived())
    inbox.store(arrived(source="manual"))
    inbox.store(arrived(dedup_key="failed", status="failed"))
    inbox.store(arrived(dedup_key="in_progress:aa", status="in_progress"))
    assert connection.execute("select count(*) from webhook.deliveries").fetchone() == (4,)


def test_another_result_of_a_request_is_marked(inbox: DatabaseInbox) -> None:
    assert inbox.store(arrived(dedup_key="in_progress:aa", status="in_progress")).outcome == "stored"
    assert inbox.store(arrived(dedup_key="completed:aa")).outcome == "stored"
    assert inbox.store(arrived(dedup_key="completed:bb")).outcome == "another_result"
    assert inbox.store(arrived(dedup_key="completed:bb")).outcome == "duplicate"


def test_a_row_that_somebody_holds_keeps_no_other_delivery_out(
    inbox: DatabaseInbox, connection: db.Connection, url: str
) -> None:
    inbox.store(arrived(request_id="held"))
    with psycopg.connect(url) as holder:
        holder.execute("select from webhook.deliveries where request_id = 'held' for update")
        with pytest.raises(db.DatabaseUnavailable) as caught:
            inbox.store(arrived(request_id="held"))
        assert caught.value.reason == "locked"
        assert inbox.available
        assert inbox.store(arrived(request_id="other")).created


def test_a_duplicate_does_not_reopen_what_is_done(inbox: DatabaseInbox, connection: db.Connection) -> None:
    inbox.store(arrived())
    connection.execute("update webhook.deliveries set state = 'done', done_at = now()")
    assert inbox.store(arrived()).attempts == 2
    assert connection.execute("select state from webhook.deliveries").fetchone() == ("done",)


def test_the_worker_is_told_at_commit(inbox: DatabaseInbox, connection: db.Connection) -> None:
    connection.execute("listen webhook_deliveries")
    inbox.store(arrived())
    assert [note.channel for note in connection.notifies(timeout=5, stop_after=1)] == ["webhook_deliveries"]


def test_connections_of_a_restarted_server_cost_no_delivery(
    inbox: DatabaseInbox, connection: db.Connection
) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: inbox.store(arrived(f"warm-{n}")), range(32)))
    connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where pid <> pg_backend_pid() and datname = current_database()"
    )
    assert inbox.store(arrived("after")).created


def test_a_long_outage_does_not_keep_the_pool_away(url: str) -> None:
    # psycopg_pool doubles its pauses: with its default an outage of 8 s is followed by 7 s more of its own making.
    server = urlsplit(url)
    with gate(server.hostname or "", server.port or 5432) as between:
        database = intake_pool(with_address(url, "127.0.0.1", between.port), "test", max_size=4)
        inbox = DatabaseInbox(database, breaker=Breaker(pause=0.1))
        database.open()
        try:
            assert inbox.store(arrived("before"))
            between.cut()
            until = time.monotonic() + 8
            while time.monotonic() < until:
                with pytest.raises(db.DatabaseUnavailable):
                    inbox.store(arrived("during"))
                time.sleep(0.2)
            between.open()
            until = time.monotonic() + 6
            while True:
                try:
                    assert inbox.store(arrived("after"))
                    break
                except db.DatabaseUnavailable:
                    assert time.monotonic() < until, "the pool stays away from a server that is back"
        finally:
            database.close()


def test_the_schema_refuses_what_must_not_be(connection: db.Connection) -> None:
    insert = (
        "insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256, state) "
        "values (%s, 'r', 'k', %s, '', %s, %s)"
    )
    good = ("fal", "completed", "a" * 64, "pending")
    for position, wrong in enumerate(("No Sender", "finished", "no digest", "sleeping")):
        values = [*good[:position], wrong, *good[position + 1 :]]
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(insert, values)
    with pytest.raises(psycopg.errors.CheckViolation):
        connection.execute(insert, [*good[:3], "leased"])
