"""Connections to PostgreSQL whose every wait is bounded, whatever way the server is down.

A server can be down in more ways than by refusing: packets vanish, the process is stopped while its kernel still
acknowledges, a lock is held, the disk is full. So each layer has a bound: ``connect_timeout`` and
``tcp_user_timeout`` for the network, ``statement_timeout`` and ``lock_timeout`` at the server, the pool's own
timeout, and a deadline in the client (:meth:`Connection.bounded`) for a server that simply stays silent.

Pools hold threads and sockets: open them after a fork, never before.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo
from psycopg_pool import ConnectionPool, PoolTimeout, TooManyRequests

INTAKE_DEADLINE: Final = 1.5
"""Seconds from the wish to store until the answer is 503. fal waits 15 s; 2 s are promised."""
CONNECT_TIMEOUT: Final = 2
"""Whole seconds; libpq takes less than 2 for 2."""

RV = TypeVar("RV")


class DatabaseUnavailable(Exception):
    """The database could not be used in time. ``reason`` is one word, for metrics and logs.

    ``attempted``: false when nothing was sent to it, so nothing can have been stored.
    """

    def __init__(self, reason: str, message: str, *, attempted: bool = True) -> None:
        self.reason = reason
        self.attempted = attempted
        super().__init__(message)


class DeadlineExceeded(psycopg.OperationalError):
    """The server did not answer before the deadline; the connection is closed."""


class Connection(psycopg.Connection[Any]):
    """A connection that can be given a deadline, after which a silent server is given up."""

    _deadline: float | None = None

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[Self]:
        """Bound all that happens inside to ``seconds`` in total. On a miss: :class:`DeadlineExceeded`."""
        self._deadline = time.monotonic() + seconds
        try:
            yield self
        finally:
            self._deadline = None

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait as psycopg does, but not past the deadline."""
        if self._deadline is None:
            return super().wait(gen, interval=interval, timeout=timeout)
        left = max(0.0, self._deadline - time.monotonic())
        try:
            return super().wait(
                gen, interval=interval, timeout=left if timeout is None else min(left, timeout)
            )
        except errors._WaitTimeout:
            self.pgconn.finish()
            raise DeadlineExceeded("the server did not answer before the deadline") from None


def conninfo(database_url: str, application_name: str, statement_timeout: float | None = None) -> str:
    """Connection string with the network's bounds and, when given, a statement timeout (seconds) in it."""
    # A process that froze inside a transaction holds up its rows no longer than this.
    options = "-c idle_in_transaction_session_timeout=10s"
    if statement_timeout is not None:
        milliseconds = round(statement_timeout * 1000)
        # The lock's bound is the shorter one, so that a row that somebody holds is told from a server that hangs.
        options += f" -c statement_timeout={milliseconds} -c lock_timeout={milliseconds // 3}"
    return make_conninfo(
        database_url,
        application_name=application_name[:63],
        # A SQL_ASCII database would otherwise give text as bytes.
        client_encoding="UTF8",
        connect_timeout=CONNECT_TIMEOUT,
        tcp_user_timeout=3000,
        keepalives=1,
        keepalives_idle=10,
        keepalives_interval=3,
        keepalives_count=3,
        options=options,
    )


def connect(
    database_url: str,
    application_name: str,
    *,
    autocommit: bool = True,
    statement_timeout: float | None = None,
) -> Connection:
    """Open one connection outside a pool (LISTEN, migrations, health). Raises psycopg.OperationalError."""
    return Connection.connect(
        conninfo(database_url, application_name, statement_timeout), autocommit=autocommit
    )


class Database:
    """A pool of autocommitting connections. ``open`` it after the fork."""

    def __init__(
        self,
        database_url: str,
        application_name: str,
        *,
        max_size: int,
        min_size: int = 1,
        statement_timeout: float | None = INTAKE_DEADLINE,
        configure: Callable[[Connection], None] | None = None,
    ) -> None:
        """``configure`` is called with every new connection."""
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            conninfo(database_url, application_name, statement_timeout),
            connection_class=Connection,
            kwargs={"autocommit": True},
            configure=configure,
            min_size=min_size,
            max_size=max_size,
            timeout=INTAKE_DEADLINE,
            # Give a failed attempt up soon: the next borrower starts a new one. With the default of 300 s the
            # pool's own backoff would keep it away from a server that is back.
            reconnect_timeout=1.0,
            max_lifetime=1800,
            name=application_name,
            open=False,
        )

    def open(self) -> None:
        """Start the pool's threads. Does not wait for a connection: the server may be down."""
        self._pool.open(wait=False)

    def close(self) -> None:
        """Close all connections, waiting at most 2 s for the pool's threads."""
        self._pool.close(timeout=2.0)

    def usage(self) -> dict[str, int]:
        """Return how many connections are open and idle, and how many callers wait for one."""
        stats = self._pool.get_stats()
        names = {"open": "pool_size", "idle": "pool_available", "waiting": "requests_waiting"}
        return {name: stats.get(key, 0) for name, key in names.items()}

    @contextlib.contextmanager
    def borrow(self, deadline: float = INTAKE_DEADLINE) -> Iterator[Connection]:
        """Lend a connection; waiting for it and using it together take at most ``deadline`` seconds.

        Raises :class:`DatabaseUnavailable` when there is none in time or the connection is lost in use. Faults of
        a statement (psycopg.DataError and others) pass through.
        """
        started = time.monotonic()
        try:
            with self._pool.connection(timeout=deadline) as connection:
                left = deadline - (time.monotonic() - started)
                with connection.bounded(left):
                    yield connection
        except (PoolTimeout, TooManyRequests) as error:
            raise DatabaseUnavailable(
                "no_connection", "no connection to the database in time", attempted=False
            ) from error
        except DeadlineExceeded as error:
            raise DatabaseUnavailable("timeout", "the database did not answer in time") from error
        except errors.LockNotAvailable as error:
            raise DatabaseUnavailable("locked", "another transaction holds what is to be written") from error
        except errors.QueryCanceled as error:
            raise DatabaseUnavailable("timeout", "the database gave the statement up in time") from error
        except (
            errors.OperationalError,
            errors.ReadOnlySqlTransaction,
            errors.UndefinedTable,
            errors.InvalidSchemaName,
        ) as error:
            raise DatabaseUnavailable(*_reason(error)) from error


def _reason(error: psycopg.Error) -> tuple[str, str]:
    """Reason and text of a fault that is the server's state and not the statement's content."""
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return "read_only", "the database is read-only (a standby?)"
    if isinstance(error, errors.UndefinedTable | errors.InvalidSchemaName):
        return "not_migrated", "the schema is not there: run webhook-api migrate"
    if (error.sqlstate or "").startswith("53"):
        return "resources", "the database is out of disk, memory or connections"
    return "connection_lost", "the connection to the database was lost"


@contextlib.contextmanager
def sole(connection: Connection, key: int) -> Iterator[bool]:
    """Whether nobody else holds the advisory lock ``key``; it is held until the end, and then given back."""
    row = connection.execute("select pg_try_advisory_lock(%s)", (key,)).fetchone()
    held = bool(row and row[0])
    try:
        yield held
    finally:
        if held:
            with contextlib.suppress(psycopg.Error):
                connection.execute("select pg_advisory_unlock(%s)", (key,))


@dataclass
class Breaker:
    """Answers at once while the database is known to be down, so that threads are not all held waiting for it.

    After a failure the next ``pause`` seconds are refused at once; then one caller at a time may try.
    """

    pause: float = 1.0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._failed_at: float | None = None
        self._trying = False
        self.reason: str | None = None

    @property
    def closed(self) -> bool:
        """Whether the last attempt succeeded (or none was made)."""
        return self._failed_at is None

    @property
    def shut(self) -> bool:
        """Whether the last attempt failed and nobody is trying now."""
        return self._failed_at is not None and not self._trying

    def admit(self) -> bool:
        """Whether the caller may try now. One that may must then call ``succeed`` or ``fail``."""
        with self._lock:
            if self._failed_at is None:
                return True
            if self._trying or self.clock() - self._failed_at < self.pause:
                return False
            self._trying = True
            return True

    def succeed(self) -> None:
        """Record a success: everyone may try again."""
        with self._lock:
            self._failed_at, self._trying, self.reason = None, False, None

    def fail(self, reason: str) -> None:
        """Record a failure for the next ``pause`` seconds."""
        with self._lock:
            self._failed_at, self._trying, self.reason = self.clock(), False, reason
