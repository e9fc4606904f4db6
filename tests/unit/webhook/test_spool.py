"""The spool on a real disk: durable, bounded, and never the end of the process, whatever the disk does."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from webhook_api.db import DatabaseUnavailable
from webhook_api.inbox import Delivery, Stored, spoolfile
from webhook_api.inbox.spool import Hand, Present, Spool
from webhook_api.inbox.spoolfile import SUFFIX, Entry, SpoolBroken, SpoolFile, _digest
from webhook_api.inbox.spoolview import export, look

WEBHOOK = Path(__file__).resolve().parents[3] / "webhook"
NOW = 1_700_000_000.0


def arrived(request_id: str = "r-1", body: bytes = b"{}", **changes: Any) -> Delivery:
    return Delivery(
        **{
            "source": "fal", "request_id": request_id, "dedup_key": "completed", "status": "completed", "body": body,
            "body_sha256": hashlib.sha256(body).hexdigest(), "headers": {"a": "b"}, "edge_request_id": "e",
            "last_error": None, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path, max_bytes=64 * 1024 * 1024, reserve_bytes=0)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpoolFile]:
    made = SpoolFile.create(tmp_path)
    yield made
    made.close()


def put(spool: Spool, delivery: Delivery, at: float = NOW) -> Any:
    return spool.put(delivery, at, unsure=False, seconds=20)


def refused(spool: Spool, delivery: Delivery) -> str:
    with pytest.raises(DatabaseUnavailable) as caught:
        put(spool, delivery)
    return caught.value.reason


def test_what_goes_in_comes_out_with_every_field(file: SpoolFile) -> None:
    delivery = arrived(
        body=bytes(range(256)), gateway_request_id="g", training_type_hint="style", account_id="acc", probe=True,
        state="dead", last_error="why", aside="stale", headers={"x": "ü", "n": None},
    )  # fmt: skip
    file.append([Entry(delivery, NOW, unsure=True)])
    (row,) = file.head(10, 10**6)
    assert (row.delivery, row.arrivals, row.received_at, row.unsure) == (delivery, 1, NOW, True)


@contextmanager
def writing(file: SpoolFile, delivery: Delivery) -> Iterator[threading.Event]:
    """A thread is in the middle of writing to the file until the event is set."""
    begun, go = threading.Event(), threading.Event()

    def wanted() -> bool:
        begun.set()
        return go.wait(30)

    with ThreadPoolExecutor(1) as hand:
        written = hand.submit(file.append, [Entry(delivery, NOW)], wanted)
        assert begun.wait(30)
        try:
            yield go
        finally:
            go.set()
        assert written.result(30) == [1]


@pytest.mark.parametrize("end", ["close", "put_aside"])
def test_a_file_that_is_given_up_while_a_delivery_is_written_keeps_it(tmp_path: Path, end: str) -> None:
    """A process that stops, or has drained an old file, never pulls the file from under who writes to it."""
    file = SpoolFile.create(tmp_path)
    give_up = file.close if end == "close" else partial(file.put_aside, unless_rows=True)
    with ThreadPoolExecutor(1) as keeper, writing(file, arrived()) as go:
        ended = keeper.submit(give_up)
        time.sleep(0.1)
        assert not ended.done()
        go.set()
        ended.result(30)
    again = SpoolFile.adopt(file.path)
    assert again is not None
    assert [row.delivery.request_id for row in again.head(10, 10**6)] == ["r-1"]
    again.close(remove_empty=False)


def test_a_write_that_hangs_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoolfile, "CLOSE_SECONDS", 0.05)
    file = SpoolFile.create(tmp_path)
    with writing(file, arrived()):
        assert file.close() is False
        assert SpoolFile.adopt(file.path) is None, "it is still this process's"
    assert [row.delivery.request_id for row in file.head(10, 10**6)] == ["r-1"]
    file.close()


def test_who_comes_to_a_file_that_was_given_up_writes_to_another_one(spool: Spool) -> None:
    put(spool, arrived("r-1"))
    (given_up,) = spool.files()
    given_up.close()
    given_up.close()
    with pytest.raises(SpoolBroken, match="given up") as caught:
        given_up.append([Entry(arrived("r-2"), NOW)])
    assert caught.value.lost
    assert put(spool, arrived("r-2")) == Stored(None, True, 1, variant=False, spooled=True)


def test_it_is_on_the_disk_before_it_is_answered(tmp_path: Path) -> None:
    """A process that is killed at the very moment of its answer leaves the delivery to the next one."""
    program = (
        "import sys, os, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from webhook_api.inbox import Delivery\n"
        "from webhook_api.inbox.spool import Spool\n"
        "spool = Spool(Path(sys.argv[2]), max_bytes=10**9, reserve_bytes=0); spool.start()\n"
        "for n in range(20):\n"
        "    d = Delivery('fal', f'r-{n}', 'completed', 'completed', b'{}', 'a' * 64)\n"
        "    spool.put(d, time.time(), unsure=False, seconds=20); print(n, flush=True)\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(WEBHOOK), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    after = Spool(tmp_path, max_bytes=10**9, reserve_bytes=0)
    after.start()
    assert after.rows == 20
    assert after.holds("r-7")
    after.stop()


def test_every_commit_is_synced(file: SpoolFile) -> None:
    assert file._connection.execute("pragma journal_mode").fetchone() == ("wal",)
    assert file._connection.execute("pragma synchronous").fetchone() == (2,)


def test_copies_are_counted_and_other_bodies_are_rows(spool: Spool) -> None:
    """fal.md's fault table, "duplicate": one row, its arrivals counted; another body is kept."""
    assert put(spool, arrived()).outcome == "spooled"
    again = put(spool, arrived())
    assert (again.created, again.attempts, again.id, again.spooled) == (False, 2, None, True)
    assert put(spool, arrived(body=b"[]")).created
    assert put(spool, arrived(source="manual")).created
    assert spool.rows == 3


def test_a_hundred_copies_at_once_are_one_row(spool: Spool) -> None:
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda _: put(spool, arrived()), range(100)))
    assert sorted(result.attempts for result in results) == list(range(1, 101))
    assert spool.rows == 1


def test_a_copy_is_not_counted_into_a_row_that_is_being_drained(file: SpoolFile) -> None:
    assert file.append([Entry(arrived(), NOW)]) == [1]
    (row,) = file.head(10, 10**6)
    assert file.append([Entry(arrived(), NOW)]) == [1]
    file.delete(row.seq)
    assert [left.arrivals for left in file.head(10, 10**6)] == [1]
    assert file.rows == 1


def test_a_sequence_number_is_never_used_twice(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path)
    file.append([Entry(arrived(f"r-{n}"), NOW) for n in range(5)])
    last = file.head(10, 10**6)[-1].seq
    file.delete(last)
    path, identity = file.path, file.id
    file.close(remove_empty=False)
    again = SpoolFile.adopt(path)
    assert again is not None
    assert again.id == identity
    again.append([Entry(arrived(), NOW)])
    assert again.head(1, 10**6)[0].seq == last + 1
    again.close()


def test_what_is_put_off_keeps_its_own_order(file: SpoolFile) -> None:
    for request_id, key in (("a", "1"), ("b", "1"), ("a", "2"), ("c", "1")):
        file.append([Entry(arrived(request_id, dedup_key=key), NOW)])
    file.postpone({"a"})
    order = [(row.delivery.request_id, row.delivery.dedup_key) for row in file.head(10, 10**6)]
    assert order == [("b", "1"), ("c", "1"), ("a", "1"), ("a", "2")]
    assert file.rows == 4


def test_two_processes_never_own_one_file(tmp_path: Path) -> None:
    """Two processes on one SPOOL_DIR: the second has a file of its own, and takes the first's only when it is gone."""
    first, second = (Spool(tmp_path, max_bytes=10**8, reserve_bytes=0) for _ in range(2))
    first.start()
    put(first, arrived("of the first"))
    second.start()
    assert second.adopt() == 0
    assert not second.holds("of the first")
    put(second, arrived("of the second"))
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 2
    first.stop()
    assert second.adopt() == 1
    assert second.holds("of the first")
    assert second.rows == 2
    assert [file.rows for file in second.files()] == [1, 1]
    second.stop()


def test_an_empty_file_does_not_stay(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10**8, reserve_bytes=0)
    spool.start()
    spool.stop()
    assert list(tmp_path.iterdir()) == []


def test_a_full_spool_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=300_000, reserve_bytes=0)
    spool.start()
    entries = [Entry(arrived(f"r-{n}", body=b"x" * 20_000), NOW) for n in range(100)]
    taken = sum(spool.put_many([entry], 20)[0].__class__ is Stored for entry in entries)
    assert 5 <= taken <= 14
    assert refused(spool, arrived("more", body=b"x" * 20_000)) == "spool_full"
    assert spool.rows == taken
    spool.refresh()
    assert not spool.available
    assert (spool.state().error, spool.state().bytes <= 300_000) == ("full", True)
    # A small one does not suffer for a large one that comes with it, and room that is made is used.
    file = spool.files()[0]
    file.delete(file.head(100, 10**9)[-1].seq)
    spool.refresh()
    assert spool.available
    large, small = arrived("large", body=b"x" * 400_000), arrived("small")
    results = spool.put_many([Entry(large, NOW), Entry(small, NOW)], 20)
    assert [isinstance(result, Stored) for result in results] == [False, True]
    spool.stop()


def test_the_disk_belongs_to_others_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10**9, reserve_bytes=10**15)
    spool.start()
    assert not spool.available
    assert spool.state().error == "disk_full"
    assert refused(spool, arrived()) == "spool_full"
    spool.stop()


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write past this size: what SQLite sees on a disk with faults."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_is_refused_and_leaves_nothing_half(spool: Spool) -> None:
    put(spool, arrived("before"))
    with no_file_larger_than(100_000):
        assert refused(spool, arrived("too much", body=b"x" * 300_000)) == "spool_failed"
    assert not spool.holds("too much")
    assert put(spool, arrived("after")).spooled
    assert [row.delivery.request_id for row in spool.files()[0].head(10, 10**9)] == ["before", "after"]


def test_a_directory_that_cannot_be_written_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    spool = Spool(tmp_path / "plain" / "spool", max_bytes=10**9, reserve_bytes=0)
    spool.start()
    assert not spool.available
    assert refused(spool, arrived()) == "spool_failed"
    spool.stop()


def test_a_directory_that_is_removed_is_made_again(spool: Spool, tmp_path: Path) -> None:
    put(spool, arrived("before"))
    for path in tmp_path.iterdir():
        path.unlink()
    assert put(spool, arrived("after")).spooled
    # What stood in the removed file is still open, and is not lost while the process lives.
    assert spool.rows == 2
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 1


def damage(path: Path) -> None:
    """Overwrite all pages but the first."""
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(os.urandom(size - 4096))


def filled(directory: Path, rows: int = 200) -> Path:
    """A file without an owner, with its log written back."""
    file = SpoolFile.create(directory)
    file.append([Entry(arrived(f"r-{n}", body=b"x" * 1000), NOW) for n in range(rows)])
    file._connection.execute("pragma wal_checkpoint(truncate)")
    file.close()
    return file.path


def test_a_damaged_file_is_put_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    path = filled(tmp_path)
    damage(path)
    spool = Spool(tmp_path, max_bytes=10**9, reserve_bytes=0)
    spool.start()
    assert spool.available
    assert put(spool, arrived("new")).spooled
    assert not path.exists()
    assert len(list(tmp_path.glob("*.broken"))) == 1
    spool.stop()


def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / f"strange{SUFFIX}").write_bytes(b"not a database at all" * 1000)
    spool = Spool(tmp_path, max_bytes=10**9, reserve_bytes=0)
    spool.start()
    assert spool.available
    assert len(list(tmp_path.glob("*.broken"))) == 1
    spool.stop()


def test_our_own_file_damaged_under_us_is_replaced(spool: Spool, tmp_path: Path) -> None:
    for n in range(50):
        put(spool, arrived(f"r-{n}", body=b"x" * 1000))
    own = spool.files()[-1]
    own._connection.execute("pragma wal_checkpoint(truncate)")
    damage(own.path)
    own._connection.execute("pragma shrink_memory")
    assert put(spool, arrived("after")).spooled


def test_a_changed_row_is_not_delivered(file: SpoolFile) -> None:
    file.append([Entry(arrived("good"), NOW), Entry(arrived("bad"), NOW)])
    file._connection.execute(
        "update deliveries set fields = replace(fields, 'queued', 'x'), body = x'00' where seq = 2"
    )
    assert [row.delivery.request_id for row in file.head(10, 10**6)] == ["good"]
    assert file.rejected() == 1
    assert file.rows == 1


def test_rows_that_cannot_be_stored_are_put_aside_with_their_file(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path)
    file.append([Entry(arrived("bad"), NOW)])
    file.reject([(1, "why")])
    file.close()
    spool = Spool(tmp_path, max_bytes=10**9, reserve_bytes=0)
    spool.start()
    (aside,) = tmp_path.glob("*.broken")
    view = look(aside)
    assert (view.rows, view.rejected, view.owned) == (0, 1, False)
    (document,) = export(aside)
    assert (document["request_id"], document["table"], document["whole"]) == ("bad", "rejected", True)
    spool.stop()
    assert [path.name for path in tmp_path.iterdir() if "broken" not in path.name] == []


def test_a_row_of_a_newer_release_is_understood(file: SpoolFile) -> None:
    file.append([Entry(arrived("newer"), NOW)])
    fields, digest = file._connection.execute("select fields, digest from deliveries").fetchone()
    newer = json.dumps(json.loads(fields) | {"from_the_future": 1})
    delivery = arrived("newer")
    file._connection.execute(
        "update deliveries set fields = ?, digest = ?", (newer, _digest(delivery, newer))
    )
    assert digest != _digest(delivery, newer)
    assert [row.delivery for row in file.head(1, 100)] == [delivery]


def test_whole_rows_of_a_damaged_file_are_salvaged(tmp_path: Path) -> None:
    file = SpoolFile.create(tmp_path)
    file.append([Entry(arrived(f"r-{n}"), NOW) for n in range(10)])
    assert [row.delivery.request_id for row in file.salvage()] == [f"r-{n}" for n in range(10)]
    file.close()


def test_a_disk_that_hangs_holds_nobody_longer_than_its_deadline(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next one waits for the hand, however long that takes to notice that the disk is back.
    monkeypatch.setattr("webhook_api.inbox.spool.STUCK", 60.0)
    file = spool.files()[-1]
    with file._io:
        # Who waited for the disk would wait for ever.
        with pytest.raises(DatabaseUnavailable) as caught:
            spool.put(arrived(), NOW, unsure=False, seconds=0.2)
        assert caught.value.reason == "spool_failed"
        assert "in time" in str(caught.value)
    # It was called off before it was committed: the sender heard 503, and it is not there.
    assert spool.put(arrived("next"), NOW, unsure=False, seconds=60).spooled
    assert [row.delivery.request_id for row in file.head(10, 10**6)] == ["next"]
    assert not spool.holds(arrived().request_id)


def test_a_hand_that_is_stuck_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webhook_api.inbox.spool.STUCK", 0.0)
    hand, begun, release = Hand("test"), threading.Event(), threading.Event()

    def hang(_settle: object) -> None:
        begun.set()
        release.wait()

    deadline = time.monotonic() + 30
    while not begun.is_set():
        assert time.monotonic() < deadline, "the hand begins"
        with pytest.raises(TimeoutError):
            hand.do(hang, 0.05)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        hand.do(lambda settle: 1, 60)
    assert time.monotonic() - started < 30
    release.set()


def test_another_fault_in_one_row_does_not_harm_its_neighbours(spool: Spool) -> None:
    good, bad = arrived("good"), arrived("bad \ud800")
    results = spool.put_many([Entry(good, NOW), Entry(bad, NOW)], 20)
    assert [isinstance(result, Stored) for result in results] == [True, False]
    assert spool.rows == 1


def test_present_says_no_only_when_it_is_sure() -> None:
    present = Present()
    assert "a" not in present
    for _ in range(300):
        present.add("a")
    present.add("b")
    for _ in range(300):
        present.remove("a")
    assert "b" in present
    present.remove("b")
    assert "a" not in present
    assert "b" not in present


def test_sqlite_faults_are_told_apart() -> None:
    from webhook_api.inbox.spoolfile import broken

    corrupt = sqlite3.DatabaseError("malformed")
    corrupt.sqlite_errorcode = sqlite3.SQLITE_CORRUPT  # type: ignore[misc]
    assert broken(corrupt).corrupt
    full = sqlite3.OperationalError("full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL  # type: ignore[misc]
    assert not broken(full).corrupt
    assert isinstance(broken(OSError(5, "I/O error")), SpoolBroken)
