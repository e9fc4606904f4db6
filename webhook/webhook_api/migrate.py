"""Schema migrations: numbered SQL files, each in one transaction, under one advisory lock.

A file whose first line is ``-- outside a transaction`` is run statement by statement instead: an index on a big table
is built concurrently, without a lock that stops deliveries. Each of its statements must bear being run again.

A file that was applied is recorded with its checksum and must not change afterwards. A database that is ahead of
this code (a rollback) is left alone: migrations are written so that the previous release works on the new schema.
No tool of the Python world that needs neither an ORM nor a compiled client does more for plain SQL.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Final

import psycopg
from psycopg import errors

LOCK_KEY: Final = 0x41495348_57484B31 & 0x7FFFFFFFFFFFFFFF
"""The advisory lock that all migrating processes share (an arbitrary, fixed number)."""
LOCK_TIMEOUT: Final = 60
"""Seconds to wait for another process that migrates."""
LOCK_PAUSE: Final = 0.2
"""Seconds between two tries to get it."""
OUTSIDE: Final = "-- outside a transaction"
_NAME: Final = re.compile(r"([0-9]{4})_([a-z0-9_]+)\.sql")

_CREATE_TABLE: Final = """
create table if not exists webhook.schema_migrations (
    version     integer     not null,
    name        text        not null,
    checksum    text        not null,
    applied_at  timestamptz not null default now(),
    duration_ms integer     not null,
    constraint schema_migrations_pkey primary key (version)
)"""


class MigrationError(Exception):
    """Migrating is not possible. ``reason`` is one of numbering, checksum, locked, statement, connection."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, as recorded in the database."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def outside(self) -> bool:
        """Whether it runs outside a transaction."""
        return self.sql.startswith(OUTSIDE)

    @property
    def statements(self) -> list[str]:
        """Its statements, when it runs outside: a semicolon at the end of a line ends one."""
        parts = re.split(r";[ \t]*(?:\n|$)", self.sql)
        return [part for part in parts if re.sub(r"--[^\n]*", "", part).strip()]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: names applied now, and the version at which the schema stands."""

    applied: tuple[str, ...]
    version: int


def packaged() -> list[Migration]:
    """Return the migrations that this release brings, in order."""
    return read(resources.files("webhook_api") / "migrations")


def read(directory: Traversable) -> list[Migration]:
    """Read and order a directory's migrations. Raises MigrationError(numbering) for gaps and doubles."""
    found = []
    for entry in directory.iterdir():
        if entry.name.endswith(".sql"):
            match = _NAME.fullmatch(entry.name)
            if not match:
                raise MigrationError("numbering", f"{entry.name}: name migrations NNNN_what_it_does.sql")
            found.append(Migration(int(match[1]), entry.name[:-4], entry.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    for expected, migration in enumerate(found, start=1):
        if migration.version != expected:
            raise MigrationError(
                "numbering", f"{migration.name}: expected number {expected:04d} (gap or double)"
            )
    return found


def pending(migrations: Sequence[Migration], applied: dict[int, str]) -> list[Migration]:
    """Return those not applied yet. Raises MigrationError(checksum) when an applied file has changed since."""
    for migration in migrations:
        recorded = applied.get(migration.version)
        if recorded is not None and recorded != migration.checksum:
            raise MigrationError(
                "checksum",
                f"{migration.name} was applied with another content. Restore the file and put the change into a "
                "new migration.",
            )
    return [migration for migration in migrations if migration.version not in applied]


def migrate(connection: psycopg.Connection[Any], migrations: Sequence[Migration] | None = None) -> Outcome:
    """Bring the schema up to date over an autocommitting connection. Idempotent; safe to run at the same time.

    Raises :class:`MigrationError`; what was applied before the failing file stays applied.
    """
    todo = packaged() if migrations is None else migrations
    _lock(connection)
    try:
        _prepare(connection)
        applied = _applied(connection)
        missing = pending(todo, applied)
        for migration in missing:
            _apply(connection, migration)
        versions = [*applied, *(migration.version for migration in missing)]
        return Outcome(tuple(migration.name for migration in missing), max(versions, default=0))
    finally:
        if not connection.closed:
            connection.execute("select pg_advisory_unlock(%s)", (LOCK_KEY,))


def current_version(connection: psycopg.Connection[Any]) -> int:
    """Return the version at which the schema stands; 0 when nothing was ever applied."""
    row = connection.execute("select to_regclass('webhook.schema_migrations') is not null").fetchone()
    return max(_applied(connection), default=0) if row and row[0] else 0


def applied_versions(connection: psycopg.Connection[Any]) -> dict[int, str]:
    """Return the applied versions and their checksums; none when nothing was ever applied."""
    row = connection.execute("select to_regclass('webhook.schema_migrations') is not null").fetchone()
    return _applied(connection) if row and row[0] else {}


def _lock(connection: psycopg.Connection[Any]) -> None:
    """Take the lock. By asking again and again: who waits inside a statement would stop an index built concurrently."""
    connection.execute(f"set lock_timeout = '{LOCK_TIMEOUT}s'")
    ends = time.monotonic() + LOCK_TIMEOUT
    while True:
        row = connection.execute("select pg_try_advisory_lock(%s)", (LOCK_KEY,)).fetchone()
        if row and row[0]:
            return
        if time.monotonic() >= ends:
            raise MigrationError(
                "locked",
                f"another process has been migrating for more than {LOCK_TIMEOUT} s: see pg_stat_activity",
            )
        time.sleep(LOCK_PAUSE)


def _prepare(connection: psycopg.Connection[Any]) -> None:
    # "create schema if not exists" asks for the right to create before it looks whether there is anything to do.
    row = connection.execute("select 1 from pg_namespace where nspname = 'webhook'").fetchone()
    try:
        if not row:
            connection.execute("create schema webhook")
        connection.execute(_CREATE_TABLE)
    except errors.InsufficientPrivilege as error:
        raise MigrationError(
            "statement",
            f"{error.diag.message_primary}: grant CREATE on the database to this role, or make it the owner of "
            "the schema webhook",
        ) from error


def _applied(connection: psycopg.Connection[Any]) -> dict[int, str]:
    rows = connection.execute("select version, checksum from webhook.schema_migrations").fetchall()
    return {int(version): str(checksum) for version, checksum in rows}


def _apply(connection: psycopg.Connection[Any], migration: Migration) -> None:
    started = time.monotonic()
    try:
        if migration.outside:
            for statement in migration.statements:
                connection.execute(statement.encode())
            _record(connection, migration, started)
        else:
            with connection.transaction():
                connection.execute(migration.sql.encode())
                _record(connection, migration, started)
    except psycopg.Error as error:
        where = error.diag.message_primary or str(error)
        left = "run it again: it starts over" if migration.outside else "nothing of this file stands"
        raise MigrationError("statement", f"{migration.name}: {where} ({left})") from error


def _record(connection: psycopg.Connection[Any], migration: Migration, started: float) -> None:
    connection.execute(
        "insert into webhook.schema_migrations (version, name, checksum, duration_ms) values (%s, %s, %s, %s)",
        (
            migration.version,
            migration.name,
            migration.checksum,
            round((time.monotonic() - started) * 1000),
        ),
    )
