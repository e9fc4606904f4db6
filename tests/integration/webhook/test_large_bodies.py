"""Large bodies over a slow line to a real PostgreSQL: they have time for their bytes, and nobody fails with them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from webhook_api import db
from webhook_api.db import Breaker, DatabaseUnavailable
from webhook_api.inbox import DatabaseInbox, Delivery, allowance, intake_pool
from webhook_api.inbox.keeper import Keeper, connector
from webhook_api.inbox.spool import Spool
from webhook_api.inbox.spoolfile import Entry, SpoolFile
from webhook_api.inbox.spooling import SpoolingInbox

from tests.support.databases import migrated_database, with_address
from tests.support.trouble import Faults, Trouble, trouble

pytestmark = pytest.mark.backends
PATIENCE = 60.0
LARGE = b"x" * 3_000_000
SLOW = Faults(bytes_per_second=1_000_000)
"""3 s for a large body, which nothing had before that was not told how large it is."""


@pytest.fixture(scope="module")
def url(database_url: str) -> Iterator[str]:
    with migrated_database(database_url) as made:
        yield made


@pytest.fixture
def connection(url: str) -> Iterator[db.Connection]:
    with db.connect(url, "test") as made:
        made.execute("truncate webhook.deliveries, webhook.spools cascade")
        yield made


@pytest.fixture
def line(url: str) -> Iterator[Trouble]:
    backend = urlsplit(url)
    with trouble(backend.hostname or "127.0.0.1", backend.port or 5432) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be as busy as the line is slow."""
    monkeypatch.setattr(allowance, "BYTES_PER_SECOND", 100_000)
    monkeypatch.setattr(allowance, "LARGE_SECONDS", PATIENCE)


class Lab:
    """What stands behind the intake of one process, with a line to the database that can be made slow."""

    def __init__(self, url: str, line: Trouble, directory: Path) -> None:
        through = with_address(url, "127.0.0.1", line.port)
        self.pool = intake_pool(through, "large")
        self.breaker = Breaker()
        self.spool = Spool(directory, max_bytes=10**9, reserve_bytes=0)
        self.database = DatabaseInbox(self.pool, breaker=self.breaker, probed=True, deadline=20)
        self.inbox = SpoolingInbox(self.database, self.spool)
        self.keeper = Keeper(self.pool, self.breaker, self.spool, connector(through, "large drain"))
        self.pool.open()
        self.keeper.start()
        wait_for(lambda: self.spool.available, "the spool is open")
        wait_for(lambda: self.pool.usage()["idle"] > 0, "a connection is there")

    def close(self) -> None:
        self.keeper.stop(30)
        self.pool.close()


@pytest.fixture
def lab(url: str, connection: db.Connection, line: Trouble, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(url, line, tmp_path)
    yield made
    line.calm()
    made.close()


def arrived(request_id: str, body: bytes = b"{}", **changes: Any) -> Delivery:
    return Delivery(
        **{
            "source": "fal", "request_id": request_id, "dedup_key": "completed", "status": "completed", "body": body,
            "body_sha256": hashlib.sha256(body).hexdigest(), "headers": {"a": "b"}, "edge_request_id": "e-1", **changes,
        }
    )  # fmt: skip


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def stored(connection: db.Connection) -> dict[str, int]:
    return dict(connection.execute("select request_id, attempts from webhook.deliveries").fetchall())


@pytest.mark.usefixtures("patient")
def test_a_large_body_has_the_time_that_its_bytes_take(
    lab: Lab, line: Trouble, connection: db.Connection
) -> None:
    """It was given up after a second, and its share of the spool's time was no longer than a small one's."""
    line.faults = SLOW
    result = lab.inbox.store(arrived("large", LARGE))
    assert not result.spooled
    assert stored(connection) == {"large": 1}


def test_a_slow_large_body_is_no_outage(lab: Lab, line: Trouble, connection: db.Connection) -> None:
    """The breaker used to open, and small neighbours were refused or spooled while the database was up."""
    line.faults = SLOW
    with pytest.raises(DatabaseUnavailable) as caught:
        lab.database.store(arrived("large", LARGE), until=time.monotonic() + 1.0)
    assert (caught.value.reason, caught.value.attempted) == ("timeout", True)
    assert lab.database.available
    with pytest.raises(DatabaseUnavailable):
        lab.database.store(arrived("no time is left", LARGE), until=time.monotonic())
    assert lab.database.available


def test_the_message_says_that_it_was_slow_and_not_away(
    lab: Lab, line: Trouble, connection: db.Connection
) -> None:
    line.faults = SLOW
    with lab.spool.files()[-1]._io, pytest.raises(DatabaseUnavailable) as caught:
        lab.inbox.store(arrived("large", LARGE), until=time.monotonic() + 1.5)
    assert caught.value.reason == "spool_failed"
    assert str(caught.value) == "the database did not take it in time, and the spool was not written in time"
    # What was called off is not on the disk.
    assert lab.inbox.store(arrived("small")).created
    assert lab.spool.rows == 0


def test_a_large_row_has_its_time_to_be_drained(
    url: str, line: Trouble, connection: db.Connection, tmp_path: Path
) -> None:
    """Six seconds were what any batch had, of four megabytes or ten."""
    file = SpoolFile.create(tmp_path)
    file.append(
        [Entry(arrived("large", b"x" * 7_000_000), time.time()), Entry(arrived("small"), time.time())]
    )
    file.close(remove_empty=False)
    line.faults = SLOW
    made = Lab(url, line, tmp_path)
    try:
        wait_for(lambda: stored(connection) == {"large": 1, "small": 1}, "all is drained")
        assert not made.keeper._slow, "at the first try"
    finally:
        line.calm()
        made.close()


def test_a_row_that_cannot_be_drained_holds_up_nobody_of_another_request(
    url: str, line: Trouble, connection: db.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "DRAIN_SECONDS", 2.0)
    monkeypatch.setattr(allowance, "DRAIN_SECONDS_MOST", 2.0)
    file = SpoolFile.create(tmp_path)
    rows = [
        arrived("large", LARGE), arrived("large", dedup_key="failed", status="failed"),
        *(arrived(f"small-{n}") for n in range(20)),
    ]  # fmt: skip
    file.append([Entry(delivery, time.time()) for delivery in rows])
    file.close(remove_empty=False)
    line.faults = Faults(bytes_per_second=200_000)
    made = Lab(url, line, tmp_path)
    try:
        small = {f"small-{n}": 1 for n in range(20)}
        wait_for(lambda: stored(connection) == small, "what stands behind it is drained")
        # The database commits before the file is told.
        wait_for(lambda: made.spool.rows == 2, "only the request that cannot be drained is left")
        line.calm()
        wait_for(lambda: made.spool.rows == 0, "it comes when the line is well again")
    finally:
        line.calm()
        made.close()
    found = connection.execute(
        "select dedup_key, attempts from webhook.deliveries where request_id = 'large' order by id"
    ).fetchall()
    assert found == [("completed", 1), ("failed", 1)], "in its order, and each once"


def test_a_small_one_does_not_share_the_spool_s_write_with_a_large_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10**9, reserve_bytes=0)
    spool.start()
    batches: list[list[str]] = []
    append, began, go = SpoolFile.append, threading.Event(), threading.Event()

    def watched(self: SpoolFile, entries: Any, wanted: Any) -> list[int]:
        batches.append([entry.delivery.request_id for entry in entries])
        began.set()
        assert go.wait(PATIENCE)
        return append(self, entries, wanted)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as threads:
        patch.setattr(SpoolFile, "append", watched)

        def queued(number: int) -> bool:
            return spool._group.waiting == number

        def put(delivery: Delivery) -> Any:
            return threads.submit(spool.put, delivery, time.time(), unsure=False, seconds=PATIENCE)

        futures = [put(arrived("first"))]
        assert began.wait(PATIENCE)
        for waiting, delivery in enumerate((arrived("a"), arrived("large", LARGE), arrived("b")), 1):
            futures.append(put(delivery))
            wait_for(partial(queued, waiting), "it queues")
        go.set()
        assert all(future.result(PATIENCE).spooled for future in futures)
    spool.stop()
    assert batches == [["first"], ["a", "b"], ["large"]]
