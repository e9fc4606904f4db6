"""From the spool into a real PostgreSQL: in order, and exactly once whatever dies in the middle."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from webhook_api import db
from webhook_api.db import Breaker
from webhook_api.inbox import MAX_VARIANTS, DatabaseInbox, Delivery, intake_pool
from webhook_api.inbox.batch import prepare
from webhook_api.inbox.drain import drain
from webhook_api.inbox.keeper import Keeper
from webhook_api.inbox.spool import Spool
from webhook_api.inbox.spoolfile import Entry, SpoolBroken, SpoolFile
from webhook_api.inbox.spooling import SpoolingInbox

from tests.support.databases import with_address
from tests.support.gate import Gate, gate

pytestmark = pytest.mark.backends
PATIENCE = 60.0


@pytest.fixture
def connection(url: str) -> Iterator[db.Connection]:
    with db.connect(url, "test") as made:
        prepare(made)
        made.execute("truncate webhook.deliveries, webhook.spools cascade")
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpoolFile]:
    made = SpoolFile.create(tmp_path)
    yield made
    made.close()


def arrived(request_id: str = "r-1", body: bytes = b"{}", **changes: Any) -> Delivery:
    return Delivery(
        **{
            "source": "fal", "request_id": request_id, "dedup_key": "completed", "status": "completed", "body": body,
            "body_sha256": hashlib.sha256(body).hexdigest(), "headers": {"a": "b"}, "edge_request_id": "e-1", **changes,
        }
    )  # fmt: skip


def entries(*deliveries: Delivery, at: float = 1_700_000_000.0) -> list[Entry]:
    return [Entry(delivery, at + n) for n, delivery in enumerate(deliveries)]


def head(file: SpoolFile) -> list[Any]:
    return file.head(1000, 10**9)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def stored(connection: db.Connection) -> list[Any]:
    return connection.execute(
        "select request_id, dedup_key, attempts from webhook.deliveries order by id"
    ).fetchall()


def test_rows_arrive_as_they_came(connection: db.Connection, file: SpoolFile) -> None:
    body = bytes(range(256)) * 100
    file.append(
        entries(
            arrived(
                body=body, account_id="a", training_type_hint="style", probe=True, aside="stale", state="dead"
            )
        )
    )
    done = drain(connection, file, head(file))
    assert [outcome for _, _, outcome in done.taken] == ["stored"]
    row = connection.execute(
        "select body, headers, state, aside, account_id, training_type_hint, edge_request_id, probe, "
        "extract(epoch from first_seen_at)::float8, extract(epoch from last_seen_at)::float8, next_attempt_at <= now() "
        "from webhook.deliveries"
    ).fetchone()
    seen = 1_700_000_000.0
    assert row == (body, {"a": "b"}, "dead", "stale", "a", "style", "e-1", True, seen, seen, True)
    assert file.rows == 0


def test_the_order_of_a_request_is_kept(connection: db.Connection, file: SpoolFile) -> None:
    """The keys sort the other way round, and the worker goes by the rows' ids."""
    file.append(
        entries(
            arrived("b", dedup_key="queued:1", status="queued"), arrived("a", dedup_key="z"),
            arrived("b", dedup_key="in_progress:1", status="in_progress"), arrived("b", dedup_key="completed"),
        )
    )  # fmt: skip
    drain(connection, file, head(file))
    assert [key for request_id, key, _ in stored(connection) if request_id == "b"] == [
        "queued:1", "in_progress:1", "completed",
    ]  # fmt: skip


def test_a_copy_drained_later_leaves_the_first_arrival_as_it_was(
    connection: db.Connection, file: SpoolFile, url: str
) -> None:
    """What was sent for the row is recognised by it: another time would send stream entry and forward once more."""
    pool = intake_pool(url, "test")
    pool.open()
    assert DatabaseInbox(pool).store(arrived("known", edge_request_id="other")).created
    pool.close()
    first = connection.execute("select first_seen_at from webhook.deliveries").fetchone()
    file.append(entries(arrived("known")))
    assert [outcome for _, _, outcome in drain(connection, file, head(file)).taken] == ["duplicate"]
    assert connection.execute("select first_seen_at from webhook.deliveries").fetchone() == first


def test_copies_variants_and_other_results_are_what_they_would_have_been(
    connection: db.Connection, file: SpoolFile, url: str
) -> None:
    pool = intake_pool(url, "test")
    pool.open()
    inbox = DatabaseInbox(pool)
    assert inbox.store(arrived("known", edge_request_id="other")).created
    file.append(
        entries(
            arrived("known"), arrived("known"), arrived("known", body=b"[]"), arrived("new"), arrived("new"),
            arrived("new", dedup_key="failed", status="failed"),
        )
    )  # fmt: skip
    outcomes = [outcome for _, _, outcome in drain(connection, file, head(file)).taken]
    pool.close()
    assert outcomes == ["duplicate", "variant", "stored", "another_result"]
    assert stored(connection) == [("known", "completed", 4), ("new", "completed", 2), ("new", "failed", 1)]
    assert connection.execute("select body from webhook.delivery_variants").fetchall() == [(b"[]",)]


def test_a_death_between_commit_and_deletion_repeats_nothing(
    connection: db.Connection, file: SpoolFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fal.md's fault table, "killed before / after the commit": nothing twice, not even a counted copy."""
    file.append(entries(*(arrived(f"r-{n}") for n in range(5))))

    def dies(through: int) -> None:
        raise SpoolBroken("killed here", corrupt=False)

    with monkeypatch.context() as patched:
        patched.setattr(file, "delete", dies)
        with pytest.raises(SpoolBroken):
            drain(connection, file, head(file))
    assert len(stored(connection)) == 5
    assert file.rows == 5
    file.append(entries(arrived("r-0"), arrived("later")))
    # In smaller batches than before, as after a fault.
    assert drain(connection, file, file.head(2, 10**9)).repeated == 2
    done = drain(connection, file, head(file))
    assert done.repeated == 3
    assert {request_id: attempts for request_id, _, attempts in stored(connection)} == {
        "r-0": 2, "r-1": 1, "r-2": 1, "r-3": 1, "r-4": 1, "later": 1,
    }  # fmt: skip
    assert file.rows == 0


def test_a_death_before_the_commit_leaves_all_in_the_file(
    connection: db.Connection, file: SpoolFile, url: str
) -> None:
    """fal.md's fault table, "killed before / after the commit": nothing stored, nothing lost."""
    file.append(entries(arrived("a"), arrived("b")))
    with db.connect(url, "dies") as doomed:
        prepare(doomed)
        doomed.execute(
            "create or replace function pg_temp.dies() returns trigger language plpgsql as "
            "$$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
        )
        doomed.execute(
            "create trigger dies after insert on webhook.spools for each statement execute function pg_temp.dies()"
        )
        try:
            with pytest.raises(psycopg.OperationalError):
                drain(doomed, file, head(file))
        finally:
            connection.execute("drop trigger if exists dies on webhook.spools")
    assert stored(connection) == []
    assert file.rows == 2
    drain(connection, file, head(file))
    assert [request_id for request_id, _, _ in stored(connection)] == ["a", "b"]


def test_what_was_stored_without_our_hearing_of_it_counts_once(
    connection: db.Connection, file: SpoolFile, url: str
) -> None:
    pool = intake_pool(url, "test")
    pool.open()
    DatabaseInbox(pool).store(arrived("unsure"))
    pool.close()
    file.append([Entry(arrived("unsure"), 1_700_000_000.0, unsure=True)])
    drain(connection, file, head(file))
    assert stored(connection) == [("unsure", "completed", 1)]


def test_a_row_that_cannot_be_stored_stops_nobody(connection: db.Connection, file: SpoolFile) -> None:
    file.append(
        entries(
            arrived("good"), arrived("nul \0 byte"), arrived("sender", source="NOT A SOURCE"), arrived("last")
        )
    )
    done = drain(connection, file, head(file))
    assert [request_id for request_id, _, _ in stored(connection)] == ["good", "last"]
    assert len(done.rejected) == file.rejected() == 2
    assert file.rows == 0


def test_a_held_row_makes_only_its_own_request_wait(
    connection: db.Connection, file: SpoolFile, url: str
) -> None:
    drained_first = SpoolFile.create(file.path.parent)
    drained_first.append(entries(arrived("held")))
    drain(connection, drained_first, head(drained_first))
    drained_first.close()
    file.append(
        entries(
            arrived("before"), arrived("held"), arrived("held", dedup_key="failed", status="failed"), arrived("after"),
        )
    )  # fmt: skip
    with psycopg.connect(url) as holder:
        holder.execute("select from webhook.deliveries where request_id = 'held' for update")
        done = drain(connection, file, head(file))
        assert done.held == {"held"}
        assert [request_id for request_id, _, _ in stored(connection)] == ["held", "before", "after"]
        assert [row.delivery.dedup_key for row in head(file)] == ["completed", "failed"]
    drain(connection, file, head(file))
    assert stored(connection)[-1] == ("held", "failed", 1)
    assert stored(connection)[0] == ("held", "completed", 2)
    assert file.rows == 0


def test_variants_stay_bounded_when_all_come_at_once(connection: db.Connection, url: str) -> None:
    """Two arrivals that both counted one too few would otherwise both be kept."""
    pool = intake_pool(url, "test", max_size=16)
    pool.open()
    inbox = DatabaseInbox(pool, deadline=PATIENCE)
    inbox.store(arrived(body=b"first"))

    def store(number: int) -> None:
        """As often as it takes: on a busy machine the row is held longer than a sender would wait."""
        ends = time.monotonic() + PATIENCE
        while True:
            try:
                inbox.store(arrived(body=b"other %d" % number))
                return
            except db.DatabaseUnavailable as error:
                if error.reason not in ("locked", "timeout") or time.monotonic() > ends:
                    raise

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(store, range(64)))
    pool.close()
    assert connection.execute("select count(*) from webhook.delivery_variants").fetchone() == (MAX_VARIANTS,)
    assert connection.execute("select attempts from webhook.deliveries").fetchone() == (65,)


class Process:
    """The storage of one API process, on the spool directory and the database of a test."""

    def __init__(self, url: str, directory: Path, name: str = "test") -> None:
        self.pool = intake_pool(url, name)
        self.breaker = Breaker(pause=0.1)
        self.spool = Spool(directory, max_bytes=10**8, reserve_bytes=0)
        self.database = DatabaseInbox(self.pool, breaker=self.breaker, probed=True, deadline=1.0)
        self.inbox = SpoolingInbox(
            self.database,
            self.spool,
            spool_seconds=30,
        )
        self.keeper = Keeper(
            self.pool, self.breaker, self.spool, lambda: db.connect(url, "drain", statement_timeout=10)
        )
        self.pool.open()
        self.keeper.start()
        wait_for(lambda: self.spool.available, "the spool is open")

    def close(self) -> None:
        self.keeper.stop(30)
        self.pool.close()


@pytest.fixture
def between(url: str) -> Iterator[Gate]:
    server = urlsplit(url)
    with gate(server.hostname or "", server.port or 5432) as made:
        yield made


@pytest.fixture
def process(url: str, between: Gate, tmp_path: Path, connection: db.Connection) -> Iterator[Process]:
    made = Process(with_address(url, "127.0.0.1", between.port), tmp_path)
    yield made
    made.close()


def takes_directly(process: Process) -> None:
    """The database takes deliveries again; one or the other may be spooled when a busy machine is late."""
    number = itertools.count()
    wait_for(
        lambda: process.inbox.store(arrived(f"direct-{next(number)}")).outcome == "stored",
        "a delivery is stored directly",
    )


def drained(process: Process) -> bool:
    return process.spool.rows == 0 and process.breaker.closed


@pytest.mark.parametrize("way", ["cut", "silence"])
def test_without_the_database_all_is_taken_and_later_there_exactly_once(
    process: Process, between: Gate, connection: db.Connection, way: str
) -> None:
    """fal.md's fault table, "PostgreSQL down": 200 from the spool, which is drained when it is back."""
    process.inbox.store(arrived("before"))
    getattr(between, way)()
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda n: process.inbox.store(arrived(f"r-{n % 50}")), range(100)))
    assert all(result.spooled for result in results)
    assert not process.inbox.available
    between.open()
    wait_for(lambda: drained(process), "the spool is drained")
    # A statement of which nothing was heard may have been carried out: its arrival counts once or twice, never as a row.
    counts = {request_id: attempts for request_id, _, attempts in stored(connection)}
    assert set(counts) == {"before", *(f"r-{n}" for n in range(50))}
    assert all(counts[f"r-{n}"] in {2, 3} for n in range(50))
    takes_directly(process)


def test_a_request_that_stands_in_the_spool_stays_behind_itself(
    process: Process, between: Gate, connection: db.Connection
) -> None:
    between.cut()
    assert process.inbox.store(arrived("a", dedup_key="1", status="queued")).spooled
    with psycopg.connect(connection.info.dsn, password=connection.info.password) as holder:
        # The drain cannot go on, but the database is back for everybody else.
        holder.execute("lock table webhook.spools in access exclusive mode")
        between.open()
        wait_for(lambda: process.breaker.closed, "the database is back")
        takes_directly(process)
        assert process.inbox.store(arrived("a", dedup_key="0")).spooled
        assert process.inbox.store_many([arrived("a", dedup_key="2"), arrived("b")], time.monotonic() + 5)[
            0
        ].spooled  # type: ignore[union-attr]
    wait_for(lambda: drained(process), "the spool is drained")
    assert [key for request_id, key, _ in stored(connection) if request_id == "a"] == ["1", "0", "2"]
    wait_for(
        lambda: process.inbox.store(arrived("a", dedup_key="3")).id is not None,
        "the direct way is open again",
    )


def test_a_hundred_copies_across_spool_and_database_are_one_row(
    process: Process, between: Gate, connection: db.Connection
) -> None:
    def one(n: int) -> Any:
        if n == 30:
            between.cut()
        if n == 60:
            between.open()
        return process.inbox.store(arrived("same", edge_request_id=f"e-{n}"))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(100)))
    assert len(results) == 100
    wait_for(lambda: drained(process), "the spool is drained")
    ((_, _, attempts),) = stored(connection)
    assert attempts >= 100


def test_another_process_drains_what_a_dead_one_left(
    url: str, between: Gate, tmp_path: Path, connection: db.Connection
) -> None:
    left = Spool(tmp_path, max_bytes=10**8, reserve_bytes=0)
    left.start()
    for n in range(20):
        left.put(arrived(f"r-{n}"), 1_700_000_000.0, unsure=False, seconds=20)
    left.stop()
    process = Process(url, tmp_path)
    wait_for(lambda: len(stored(connection)) == 20, "the orphan is drained")
    wait_for(lambda: len(list(tmp_path.glob("*.spool"))) == 1, "its file is gone")
    process.close()
    assert list(tmp_path.iterdir()) == []


def test_a_locked_table_sends_deliveries_to_the_spool_quickly(
    process: Process, connection: db.Connection, url: str
) -> None:
    with psycopg.connect(url) as blocker:
        blocker.execute("lock table webhook.deliveries in access exclusive mode")
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(lambda n: process.inbox.store(arrived(f"r-{n}")), range(64)))
        assert all(result.spooled for result in results)
    wait_for(lambda: drained(process), "the spool is drained")
    assert len(stored(connection)) == 64


def test_live_intake_goes_on_while_the_spool_is_drained(
    process: Process, between: Gate, connection: db.Connection
) -> None:
    between.cut()
    batch = [arrived(f"r-{n}") for n in range(64)]
    for start in range(40):
        moved = [arrived(f"{start}-{d.request_id}") for d in batch]
        assert all(
            getattr(r, "spooled", False) for r in process.inbox.store_many(moved, time.monotonic() + 1.5)
        )
    between.open()
    wait_for(lambda: process.breaker.closed, "the database is back")
    process.database._deadline = PATIENCE
    results = []
    while process.spool.rows or not results:
        results.append(process.inbox.store(arrived(f"live-{len(results)}")))
    # A live one may share its hash with a request in the spool, and then stands behind it.
    assert sum(result.id is not None for result in results) > len(results) / 2
    wait_for(lambda: drained(process), "the spool is drained")
    assert len(stored(connection)) == 64 * 40 + len(results)


def test_what_is_whole_in_a_damaged_file_still_gets_over(
    process: Process, between: Gate, connection: db.Connection, tmp_path: Path
) -> None:
    between.cut()
    sent = [arrived(f"r-{n}", body=b"x" * 1500) for n in range(64)]
    assert all(getattr(r, "spooled", False) for r in process.inbox.store_many(sent, time.monotonic() + 1.5))
    (file,) = [file for file in process.spool.files() if file.rows]
    # Written back to the file itself, and one page of it turned over.
    file._connection.execute("pragma wal_checkpoint(truncate)")
    with file.path.open("r+b") as stream:
        content = bytearray(stream.read())
        at = content.index(b"x" * 1500)
        page = at // 4096
        stream.seek(page * 4096)
        stream.write(bytes(byte ^ 0xFF for byte in content[page * 4096 : (page + 1) * 4096]))
    for cached in (file._connection, file._reader):
        cached.execute("pragma shrink_memory")
    between.open()
    wait_for(lambda: drained(process), "the spool is drained")
    wait_for(lambda: len(list(tmp_path.glob("*.broken"))) == 1, "the file is put aside")
    found = {request_id for request_id, _, _ in stored(connection)}
    assert found < {f"r-{n}" for n in range(64)}
    assert len(found) >= 56
    takes_directly(process)


def test_without_traffic_and_without_a_spool_the_database_is_found_again(
    url: str, between: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = intake_pool(with_address(url, "127.0.0.1", between.port), "test")
    breaker = Breaker(pause=0.1)
    inbox = DatabaseInbox(pool, breaker=breaker, probed=True)
    keeper = Keeper(pool, breaker, None, lambda: db.connect(url, "drain"))
    pool.open()
    keeper.start()
    try:
        between.silence()
        with pytest.raises(db.DatabaseUnavailable):
            inbox.store(arrived("during"))
        assert not inbox.available
        borrow, borrowers = pool.borrow, set()

        def noted(*arguments: Any) -> Any:
            borrowers.add(threading.get_ident())
            return borrow(*arguments)

        monkeypatch.setattr(pool, "borrow", noted)
        with pytest.raises(db.DatabaseUnavailable) as caught:
            inbox.store(arrived("during"))
        assert not caught.value.attempted
        assert threading.get_ident() not in borrowers, "it is refused without waiting for a connection"
        between.open()
        wait_for(lambda: inbox.available, "the database is found again")
    finally:
        keeper.stop()
        pool.close()
    with db.connect(url, "test") as connection:
        assert connection.execute("select from webhook.deliveries where status = 'unknown'").fetchall() == []
