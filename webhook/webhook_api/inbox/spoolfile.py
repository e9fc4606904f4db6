"""One spool file: an SQLite database on the local disk whose every commit is synced before it returns.

WAL with ``synchronous=FULL`` syncs the log at each commit. One process owns a file, by an flock on the file beside it
(``.lock``): SQLite's own locks are the process's, and would be lost with any other descriptor that it closes.
A sequence number is never used twice, so that what the inbox has taken can be told by one number.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Final

from webhook_api.inbox.allowance import is_large
from webhook_api.inbox.model import Delivery

SUFFIX: Final = ".spool"
BROKEN: Final = ".broken"
_KEYS: Final = frozenset({"source", "request_id", "dedup_key", "body", "body_sha256"})
_FIELDS: Final = frozenset(field.name for field in dataclass_fields(Delivery)) - _KEYS
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_VACUUM_PAGES: Final = 512
"""An empty file larger than this gives its room back."""
CLOSE_SECONDS: Final = 2.0
"""So long a file that is given up waits for what is being written to it."""

_SCHEMA: Final = """
create table if not exists meta (name text primary key, value text not null) without rowid;
create table if not exists deliveries (
    seq         integer primary key autoincrement,
    source      text not null,
    request_id  text not null,
    dedup_key   text not null,
    body_sha256 text not null,
    fields      text not null,
    body        blob not null,
    digest      text not null,
    arrivals    integer not null default 1,
    received_at real not null,
    last_at     real not null,
    unsure      integer not null default 0
);
create index if not exists deliveries_request on deliveries (request_id);
create index if not exists deliveries_received on deliveries (received_at);
create table if not exists rejected (
    seq integer primary key, source text, request_id text, dedup_key text, body_sha256 text, fields text, body blob,
    digest text, arrivals integer, received_at real, last_at real, unsure integer, reason text
);
"""
COLUMNS: Final = (
    "source, request_id, dedup_key, body_sha256, fields, body, digest, arrivals, received_at, last_at, unsure"
)


class SpoolBroken(Exception):
    """The file could not be used. ``corrupt``: because of what is in it. ``lost``: it will never be usable again."""

    def __init__(self, message: str, *, corrupt: bool, lost: bool = False) -> None:
        self.corrupt = corrupt
        self.lost = lost or corrupt
        super().__init__(message)


class GivenUp(Exception):
    """Nobody waits for the entries any more. None of them is there."""


class SpoolFull(Exception):
    """There is no room for this delivery."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A delivery on its way into the spool."""

    delivery: Delivery
    received_at: float
    """Unix seconds."""
    unsure: bool = False
    """The database may have stored this very arrival, without our hearing of it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A delivery in the spool."""

    seq: int
    delivery: Delivery
    arrivals: int
    received_at: float
    last_at: float
    unsure: bool


class Lock:
    """Who owns a spool file. Free as soon as the process is gone, however it went."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, file: Path) -> Lock | None:
        """Own ``file``, or return None when somebody does."""
        path = file.with_suffix(".lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The owner before us may have removed the file between our open and our lock.
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                return cls(path, descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def release(self, *, remove: bool = False) -> None:
        """Give it up; ``remove`` when the file is gone."""
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


class SpoolFile:
    """An open spool file that this process owns. Safe for threads; everything in it is short and synced."""

    def __init__(self, path: Path, lock: Lock) -> None:
        """Open, or make, the file. Raises SpoolBroken."""
        self.path = path
        self._lock = lock
        self._io = threading.Lock()
        self._closed = False
        with self._guard():
            self._connection = _open(path)
            self._reader = _open(path)
            self._inode = path.stat().st_ino
            self.id = self._identity()
            self.rows: int
            self.rows, self._last_seq = self._connection.execute(
                "select count(*), coalesce((select seq from sqlite_sequence where name = 'deliveries'), 0) "
                "from deliveries"
            ).fetchone()
        # What an earlier owner had begun to drain is not known: no copy is counted into its rows.
        self._drained_to = self._last_seq

    @classmethod
    def create(cls, directory: Path) -> SpoolFile:
        """Make a new file. Raises SpoolBroken."""
        path = directory / f"{uuid.uuid4().hex}{SUFFIX}"
        try:
            lock = Lock.take(path)
        except OSError as error:
            raise SpoolBroken(f"{error.strerror or error}", corrupt=False) from error
        if lock is None:
            raise SpoolBroken("a new spool file is taken", corrupt=False)
        try:
            return cls(path, lock)
        except SpoolBroken:
            for name in _files(path):
                name.unlink(missing_ok=True)
            lock.release(remove=True)
            raise

    @classmethod
    def adopt(cls, path: Path) -> SpoolFile | None:
        """Own and open a file that nobody owns; None when somebody does. Raises SpoolBroken."""
        lock = Lock.take(path)
        if lock is None:
            return None
        if not path.exists():
            lock.release(remove=True)
            return None
        try:
            made = cls(path, lock)
            made.check()
        except SpoolBroken as error:
            if error.corrupt:
                set_aside(path)
            lock.release(remove=error.corrupt)
            raise
        return made

    def check(self) -> None:
        """Read the whole structure. Raises SpoolBroken when it is damaged."""
        with self._guard():
            found = self._connection.execute("pragma quick_check(1)").fetchone()
        if found != ("ok",):
            raise SpoolBroken(f"damaged: {found}"[:200], corrupt=True)

    def append(self, entries: Sequence[Entry], wanted: Callable[[], bool] = lambda: True) -> list[int]:
        """Commit entries, synced. Returns how often each has arrived (1: it is a row of its own).

        ``wanted`` is asked before the commit. Raises SpoolBroken and GivenUp; then none of them is there.
        """
        with self._io, self._guard():
            if self._closed:
                raise SpoolBroken("the file was given up", corrupt=False, lost=True)
            if not self._in_place():
                raise SpoolBroken("the file was removed or replaced", corrupt=False, lost=True)
            with self._transaction():
                counts = [self._put(entry) for entry in entries]
                if not wanted():
                    raise GivenUp
            self.rows += counts.count(1)
            return counts

    def head(self, rows: int, size: int) -> list[Row]:
        """Return the oldest rows, about ``size`` bytes at most, and count no further copies into them.

        A large one comes alone, so that the others neither wait for it nor fail with it.
        Raises SpoolBroken. Rows whose digest is wrong are moved to ``rejected``.
        """
        with self._io, self._guard():
            chosen: list[int] = []
            total = 0
            for seq, length in self._connection.execute(
                "select seq, length(body) from deliveries order by seq limit ?", (rows,)
            ):
                if chosen and (total + length > size or is_large(length)):
                    break
                chosen.append(seq)
                total += length
                if is_large(length):
                    break
            if not chosen:
                return []
            self._drained_to = max(self._drained_to, chosen[-1])
        with self._guard():
            found = self._reader.execute(
                f"select seq, {COLUMNS} from deliveries where seq <= ? order by seq",  # noqa: S608  (constants)
                (chosen[-1],),
            ).fetchall()
        good, bad = [], []
        for record in found:
            row = row_of(record)
            if row is None:
                bad.append((record[0], "digest"))
            else:
                good.append(row)
        if bad:
            self.reject(bad)
        return good

    def salvage(self) -> Iterator[Row]:
        """Each row of a damaged file that can still be read and proves to be whole."""
        seqs: set[int] = set()
        for query in (
            "select seq from deliveries order by seq",
            "select seq from deliveries order by seq desc",
        ):
            with contextlib.suppress(sqlite3.Error):
                seqs.update(seq for (seq,) in self._reader.execute(query))
        for seq in sorted(
            seqs | set(range(max(1, self._last_seq - self.rows), self._last_seq + self.rows + 2))
        ):
            with contextlib.suppress(sqlite3.Error):
                record = self._reader.execute(
                    f"select seq, {COLUMNS} from deliveries where seq = ?",  # noqa: S608  (constants)
                    (seq,),
                ).fetchone()
                row = row_of(record) if record else None
                if row is not None:
                    yield row

    def delete(self, through: int) -> None:
        """Forget all rows up to a sequence number: they are in the inbox. Raises SpoolBroken."""
        with self._io, self._guard(), self._transaction():
            self.rows -= self._connection.execute(
                "delete from deliveries where seq <= ?", (through,)
            ).rowcount

    def recount(self) -> None:
        """Count the rows again, when the number proves to be wrong. Raises SpoolBroken."""
        with self._io, self._guard():
            self.rows = self._connection.execute("select count(*) from deliveries").fetchone()[0]

    def others(self, request_id: str) -> bool:
        """Whether rows of other requests stand here. Raises SpoolBroken."""
        with self._guard():
            found = self._reader.execute(
                "select exists (select 1 from deliveries where request_id <> ?)", (request_id,)
            ).fetchone()
        return bool(found[0])

    def postpone(self, request_ids: set[str], *, unsure: int | None = None) -> None:
        """Put all rows of these requests at the end, in their order. Raises SpoolBroken.

        ``unsure``: this row may be in the inbox, without our hearing of it.
        """
        with self._io, self._guard(), self._transaction():
            if unsure is not None:
                self._connection.execute("update deliveries set unsure = 1 where seq = ?", (unsure,))
            last = self._connection.execute("select max(seq) from deliveries").fetchone()[0]
            for request_id in sorted(request_ids):
                self._connection.execute(
                    f"insert into deliveries ({COLUMNS}) select {COLUMNS} from deliveries "  # noqa: S608
                    "where request_id = ? and seq <= ? order by seq",
                    (request_id, last),
                )
                self._connection.execute(
                    "delete from deliveries where request_id = ? and seq <= ?", (request_id, last)
                )

    def reject(self, rows: Sequence[tuple[int, str]]) -> None:
        """Keep rows that can never be stored apart, for a person to see. Raises SpoolBroken."""
        with self._io, self._guard(), self._transaction():
            for seq, reason in rows:
                self._connection.execute(
                    f"insert or replace into rejected (seq, {COLUMNS}, reason) "  # noqa: S608  (constants)
                    f"select seq, {COLUMNS}, ? from deliveries where seq = ?",
                    (reason[:500], seq),
                )
                self.rows -= self._connection.execute("delete from deliveries where seq = ?", (seq,)).rowcount

    def rejected(self) -> int:
        """How many rows were rejected."""
        with self._guard():
            return int(self._reader.execute("select count(*) from rejected").fetchone()[0])

    def request_ids(self) -> Iterator[str]:
        """Each row's request."""
        with self._guard():
            for (request_id,) in self._reader.execute("select request_id from deliveries"):
                yield request_id

    def live_bytes(self) -> int:
        """Bytes in use."""
        with self._guard():
            return live_bytes(self._reader)

    def oldest(self) -> float | None:
        """When the oldest row was received, in Unix seconds."""
        with self._guard():
            found = self._reader.execute("select min(received_at) from deliveries").fetchone()[0]
        return None if found is None else float(found)

    def shrink(self) -> None:
        """Give the room of a file that is empty back to the disk. Raises SpoolBroken."""
        with self._io, self._guard():
            if self.rows == 0 and self._pages() > _VACUUM_PAGES:
                self._connection.execute("vacuum")
                self._connection.execute("pragma wal_checkpoint(truncate)")

    def put_aside(self, *, unless_rows: bool = False) -> None:
        """Close the file under a name that nobody drains, for a person to look at.

        ``unless_rows``: one that has got a row meanwhile keeps its name, so that it is drained.
        """
        with self._last_word() as alone:
            if unless_rows and (not alone or self.rows > 0):
                if alone:
                    self._close(remove_empty=False)
                return
            with contextlib.suppress(OSError):
                set_aside(self.path)
            if alone:
                self._close(remove_empty=False)
            self.path.with_suffix(".lock").unlink(missing_ok=True)

    def close(self, *, remove_empty: bool = True) -> bool:
        """Close and give up the file; remove it when nothing is in it. Whether it was removed.

        What is being written is waited for: it may be a delivery that is about to be answered. Where the disk hangs in
        it, the file stays this process's until its end.
        """
        with self._last_word() as alone:
            return alone and self._close(remove_empty=remove_empty)

    @contextlib.contextmanager
    def _last_word(self) -> Iterator[bool]:
        """Whether nobody writes, and nobody will meanwhile."""
        alone = self._io.acquire(timeout=CLOSE_SECONDS)
        try:
            yield alone
        finally:
            if alone:
                self._io.release()

    def _close(self, *, remove_empty: bool) -> bool:
        if self._closed:
            return False
        self._closed, removed = True, False
        with contextlib.suppress(SpoolBroken, sqlite3.Error):
            with self._guard():
                empty = self._connection.execute(
                    "select not exists (select 1 from deliveries) and not exists (select 1 from rejected)"
                ).fetchone()[0]
            if remove_empty and empty and self._in_place():
                for name in _files(self.path):
                    name.unlink(missing_ok=True)
                removed = True
        for connection in (self._reader, self._connection):
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        if removed:
            # The last connection's close may have written its log again.
            for name in _files(self.path):
                name.unlink(missing_ok=True)
        self._lock.release(remove=removed)
        return removed

    def _put(self, entry: Entry) -> int:
        delivery = entry.delivery
        same = self._connection.execute(
            "update deliveries set arrivals = arrivals + 1, last_at = max(last_at, ?) where seq > ? "
            "and request_id = ? and source = ? and dedup_key = ? and body_sha256 = ? returning arrivals",
            (entry.received_at, self._drained_to, delivery.request_id, delivery.source, delivery.dedup_key,
             delivery.body_sha256),
        ).fetchone()  # fmt: skip
        if same is not None:
            return int(same[0])
        fields = json.dumps({k: v for k, v in asdict(delivery).items() if k not in _KEYS})
        self._connection.execute(
            f"insert into deliveries ({COLUMNS}) values (?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?)",  # noqa: S608
            (*delivery.identity, delivery.body_sha256, fields, delivery.body, _digest(delivery, fields),
             entry.received_at, entry.received_at, int(entry.unsure)),
        )  # fmt: skip
        return 1

    def _identity(self) -> uuid.UUID:
        self._connection.execute(
            "insert into meta values ('id', ?) on conflict do nothing", (str(uuid.uuid4()),)
        )
        row = self._connection.execute("select value from meta where name = 'id'").fetchone()
        try:
            return uuid.UUID(row[0])
        except ValueError as error:
            raise SpoolBroken("no identity", corrupt=True) from error

    def _in_place(self) -> bool:
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def _pages(self) -> int:
        return int(self._connection.execute("pragma page_count").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("begin immediate")
        try:
            yield
            self._connection.execute("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self._connection.in_transaction:
                    self._connection.execute("rollback")
            raise

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise broken(error) from error


def broken(error: sqlite3.Error | OSError) -> SpoolBroken:
    """Say what a fault of SQLite or of the disk means."""
    code = getattr(error, "sqlite_errorcode", None)
    corrupt = code is not None and code & 0xFF in _CORRUPT
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    return SpoolBroken(f"{name}: {error}"[:300], corrupt=corrupt)


def set_aside(path: Path) -> Path:
    """Rename a damaged file with its logs, so that nobody takes it for a spool file. Returns its new name."""
    for name in _files(path):
        if name.exists():
            name.rename(name.with_name(name.name.replace(SUFFIX, SUFFIX + BROKEN)))
    return path.with_name(path.name + BROKEN)


def live_bytes(connection: sqlite3.Connection) -> int:
    """Bytes in use in an SQLite database."""
    pages, free, size = (
        connection.execute(f"pragma {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def _files(path: Path) -> list[Path]:
    return [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))]


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("pragma journal_size_limit = 16777216")
    connection.execute("pragma cell_size_check = on")
    connection.executescript(_SCHEMA)
    path.chmod(0o600)
    # The names of the file and of its log have to outlive a power failure too.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return connection


def _digest(delivery: Delivery, fields: str) -> str:
    text = json.dumps([*delivery.identity, delivery.body_sha256, fields])
    digest = hashlib.sha256(text.encode() + b"\n")
    # Not joined before: a large body would stand in memory twice.
    digest.update(delivery.body)
    return digest.hexdigest()


def row_of(record: tuple[Any, ...]) -> Row | None:
    """A record (``seq`` and :data:`COLUMNS`) as a row; ``None`` when it is not what was written."""
    seq, source, request_id, dedup_key, sha256, fields, body, digest, arrivals, received, last, unsure = (
        record
    )
    try:
        # A newer release may have known more about a delivery than this one does.
        known = {name: value for name, value in json.loads(fields).items() if name in _FIELDS}
        delivery = Delivery(
            source=source,
            request_id=request_id,
            dedup_key=dedup_key,
            body=bytes(body),
            body_sha256=sha256,
            **known,
        )
        whole = _digest(delivery, fields) == digest
    except (ValueError, TypeError, AttributeError):
        return None
    if not whole:
        return None
    return Row(seq, delivery, arrivals, received, last, bool(unsure))
