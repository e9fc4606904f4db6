"""Batches in a real PostgreSQL: each delivery has the result that it would have had alone, whoever it came with."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webhook_api import db
from webhook_api.inbox import DatabaseInbox, Delivery, Stored, intake_pool
from webhook_api.inbox.batch import prepare, store_batch
from webhook_api.inbox.group import Bounds
from webhook_api.inbox.statement import store_one

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def shared(url: str) -> Iterator[db.Connection]:
    with db.connect(url, "test") as made:
        prepare(made)
        # Nothing here asks what a power failure leaves.
        made.execute("set synchronous_commit = off")
        yield made


@pytest.fixture
def connection(shared: db.Connection) -> db.Connection:
    shared.execute("delete from webhook.deliveries")
    return shared


@pytest.fixture
def inbox(url: str, connection: db.Connection) -> Iterator[DatabaseInbox]:
    pool = intake_pool(url, "test")
    pool.open()
    yield DatabaseInbox(pool, deadline=20)
    pool.close()


def arrived(request_id: str = "r-1", body: bytes = b"{}", **changes: Any) -> Delivery:
    return Delivery(
        **{
            "source": "fal", "request_id": request_id, "dedup_key": "completed", "status": "completed", "body": body,
            "body_sha256": hashlib.sha256(body).hexdigest(), "headers": {"a": "b"}, **changes,
        }
    )  # fmt: skip


def soon() -> float:
    return time.monotonic() + 20


def alone_what_is_left(
    connection: db.Connection, deliveries: list[Delivery], results: list[Stored | None]
) -> list[Stored]:
    return [
        result if result is not None else store_one(connection, delivery)
        for delivery, result in zip(deliveries, results, strict=True)
    ]


def contents(connection: db.Connection) -> tuple[Any, Any]:
    rows = connection.execute(
        "select source, request_id, dedup_key, status, body, body_sha256, headers, account_id, state, aside, attempts "
        "from webhook.deliveries order by 1, 2, 3"
    ).fetchall()
    variants = connection.execute(
        "select d.source, d.request_id, d.dedup_key, v.body from webhook.delivery_variants v "
        "join webhook.deliveries d on d.id = v.delivery_id order by 1, 2, 3, 4"
    ).fetchall()
    return rows, variants


MADE = st.builds(
    lambda source, request, status, body, aside: arrived(
        request,
        body,
        source=source,
        status=status,
        dedup_key=f"aside:stale:{status}" if aside else status,
        aside="stale" if aside else None,
        state="dead" if aside else "pending",
    ),
    st.sampled_from(["fal", "manual"]),
    st.sampled_from(["r1", "r2"]),
    st.sampled_from(["completed", "failed", "in_progress"]),
    st.sampled_from([b"{}", b"[]", bytes(range(256))]),
    st.booleans(),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(MADE, min_size=1, max_size=12), min_size=1, max_size=3))
def test_a_batch_is_what_its_deliveries_would_have_been_alone(
    connection: db.Connection, batches: list[list[Delivery]]
) -> None:
    """fal.md's fault table, "duplicate, also inside one batch": one row, arrivals counted, other bodies kept."""
    connection.execute("delete from webhook.deliveries")
    expected = [[store_one(connection, delivery) for delivery in batch] for batch in batches]
    wanted = contents(connection)
    connection.execute("delete from webhook.deliveries")
    found = [alone_what_is_left(connection, batch, store_batch(connection, batch)) for batch in batches]
    assert contents(connection) == wanted
    for batch, alone, together in zip(batches, expected, found, strict=True):
        # A batch has no order of its own, so who of the copies was the first, and which of two bodies, may differ.
        assert sorted(s.created for s in alone) == sorted(s.created for s in together)
        assert sorted(s.another_result for s in alone) == sorted(s.another_result for s in together)
        assert sorted((d.identity, s.variant) for d, s in zip(batch, alone, strict=True)) == sorted(
            (d.identity, s.variant) for d, s in zip(batch, together, strict=True)
        )


def test_a_batch_is_one_transaction(inbox: DatabaseInbox, connection: db.Connection) -> None:
    stored = inbox.store_many([arrived(f"r-{n}") for n in range(50)], soon())
    assert all(result is not None and result.created for result in stored)
    assert connection.execute("select count(distinct xmin::text) from webhook.deliveries").fetchone() == (1,)


def test_requests_at_once_share_commits(inbox: DatabaseInbox, connection: db.Connection) -> None:
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda n: inbox.store(arrived(f"r-{n}")), range(1000)))
    assert all(result.created for result in results)
    row = connection.execute("select count(*), count(distinct xmin::text) from webhook.deliveries").fetchone()
    assert row is not None
    assert row[0] == 1000
    assert row[1] < 900


@pytest.mark.parametrize("bad", [
    arrived("bad", headers={"x": "\0"}), arrived("bad", source="NOT A SOURCE"), arrived("bad", status="no status"),
    arrived("nul \0 byte"), arrived("bad", account_id="\ud800"),
])  # fmt: skip
def test_one_that_cannot_be_stored_fails_none_of_its_neighbours(
    inbox: DatabaseInbox, connection: db.Connection, bad: Delivery
) -> None:
    neighbours = [arrived(f"r-{n}") for n in range(10)]
    batch = [*neighbours[:5], bad, *neighbours[5:]]
    results = inbox.store_many(batch, soon())
    assert results == [None] * 11
    for delivery in neighbours:
        assert inbox.store(delivery, until=soon()).created
    with pytest.raises((psycopg.Error, ValueError)):
        inbox.store(bad, until=soon())
    assert inbox.available
    assert connection.execute("select count(*) from webhook.deliveries").fetchone() == (10,)
    # By the group commit too, where each finds out for itself.
    with ThreadPoolExecutor(11) as pool:
        futures = [pool.submit(inbox.store, delivery) for delivery in batch]
        outcomes = [future.exception(30) is None for future in futures]
    assert outcomes == [True] * 5 + [False] + [True] * 5


def test_a_held_row_keeps_none_of_its_neighbours_waiting(
    inbox: DatabaseInbox, connection: db.Connection, url: str
) -> None:
    inbox.store(arrived("held"))
    with psycopg.connect(url) as holder:
        holder.execute("select from webhook.deliveries where request_id = 'held' for update")
        batch = [arrived("a"), arrived("held"), arrived("z")]
        results = inbox.store_many(batch, soon())
        assert [result is not None for result in results] == [True, False, True]
        with pytest.raises(db.DatabaseUnavailable) as caught:
            inbox.store(arrived("held"), until=soon())
        assert caught.value.reason == "locked"
    assert inbox.available
    assert inbox.store(arrived("held")).attempts == 2


def test_a_row_that_another_transaction_is_just_making_keeps_no_neighbour_out(
    inbox: DatabaseInbox, connection: db.Connection, url: str
) -> None:
    with psycopg.connect(url) as other:
        other.execute(
            "insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256) "
            "values ('fal', 'just made', 'completed', 'completed', '{}', repeat('a', 64))"
        )
        batch = [arrived("a"), arrived("just made"), arrived("z")]
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(inbox.store, delivery) for delivery in batch]
            assert futures[0].result(30).created
            assert futures[2].result(30).created
            error = futures[1].exception(30)
        assert isinstance(error, db.DatabaseUnavailable)
        assert error.reason == "locked"
    assert inbox.available


def test_a_commit_that_fails_is_nobodys_200(inbox: DatabaseInbox, connection: db.Connection) -> None:
    """fal.md, what implementers get wrong, 8: nobody is answered 200 after a failed write."""
    connection.execute(
        "create function public.refuse() returns trigger language plpgsql as "
        "$$ begin raise exception 'no room' using errcode = '53100'; end $$"
    )
    connection.execute(
        "create constraint trigger refuse after insert on webhook.deliveries deferrable initially deferred "
        "for each row execute function public.refuse()"
    )
    try:
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(inbox.store, arrived(f"r-{n}")) for n in range(50)]
            errors = [future.exception(60) for future in futures]
        assert all(isinstance(error, db.DatabaseUnavailable) for error in errors)
        assert "resources" in {error.reason for error in errors if isinstance(error, db.DatabaseUnavailable)}
        assert not inbox.available
        results = inbox.store_many([arrived("x"), arrived("y")], soon())
        assert all(isinstance(result, db.DatabaseUnavailable) for result in results)
    finally:
        connection.execute("drop trigger refuse on webhook.deliveries; drop function public.refuse()")
    assert connection.execute("select count(*) from webhook.deliveries").fetchone() == (0,)


def test_connections_that_end_under_load_cost_nothing_and_double_nothing(
    inbox: DatabaseInbox, connection: db.Connection
) -> None:
    """fal.md's fault table, "killed before / after the commit", for the database's side of the connection."""
    stop = threading.Event()

    def terminate() -> None:
        while not stop.wait(0.3):
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where pid <> pg_backend_pid() and datname = current_database() and application_name = 'test'"
            )

    killer = threading.Thread(target=terminate)
    killer.start()
    accepted: list[str] = []

    def one(n: int) -> None:
        try:
            inbox.store(arrived(f"r-{n}", edge_request_id=f"e-{n}"))
        except db.DatabaseUnavailable:
            return
        accepted.append(f"r-{n}")

    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(one, range(400)))
    finally:
        stop.set()
        killer.join(30)
    rows = dict(connection.execute("select request_id, attempts from webhook.deliveries").fetchall())
    assert accepted
    assert set(accepted) <= set(rows)
    assert set(rows.values()) == {1}


def test_two_instances_with_the_same_deliveries_do_not_wait_in_a_circle(
    url: str, connection: db.Connection
) -> None:
    pools = [intake_pool(url, f"instance-{n}") for n in range(2)]
    for pool in pools:
        pool.open()
    inboxes = [DatabaseInbox(pool, deadline=20, bounds=Bounds(rows=16)) for pool in pools]

    def one(n: int) -> Stored:
        """As often as it takes: on a busy machine a row is held longer than anybody waits for it alone."""
        ends = time.monotonic() + 60
        while True:
            try:
                return inboxes[n % 2].store(arrived(f"r-{(n * 7) % 40}"))
            except db.DatabaseUnavailable as error:
                # Where it timed out it may have been counted.
                if error.reason != "locked" or time.monotonic() > ends:
                    raise

    with ThreadPoolExecutor(32) as threads:
        results = list(threads.map(one, range(800)))
    for pool in pools:
        pool.close()
    assert sum(result.created for result in results) == 40
    row = connection.execute("select count(*), sum(attempts) from webhook.deliveries").fetchone()
    assert row == (40, 800)


def test_a_large_body_is_stored_apart(inbox: DatabaseInbox, connection: db.Connection) -> None:
    body = b"x" * 3_000_000
    assert inbox.store(arrived("large", body=body)).created
    assert connection.execute("select length(body) from webhook.deliveries").fetchone() == (3_000_000,)
