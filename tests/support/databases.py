"""Databases of a test's own in a real PostgreSQL."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql
from webhook_api.migrate import migrate, packaged

EMPTY = "template0"
_TURN = 0x7768745F6D616B65
"""The advisory lock of whoever makes the migrated template (an arbitrary number)."""


@contextmanager
def fresh_database(superuser_url: str, template: str = EMPTY) -> Iterator[str]:
    """URL of an empty database, dropped afterwards whoever is still connected."""
    name = f"webhook_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        connection.execute(_create(name, template))
    try:
        yield with_database(superuser_url, name)
    finally:
        with psycopg.connect(superuser_url, autocommit=True) as connection:
            connection.execute(
                sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
            )


@contextmanager
def migrated_database(superuser_url: str) -> Iterator[str]:
    """URL of a database with the service's schema, dropped afterwards. Copied from one that was migrated once."""
    with fresh_database(superuser_url, _template(superuser_url)) as url:
        yield url


def _template(superuser_url: str) -> str:
    """Name of a database that stands as the migrations leave it. Made by whoever comes first, and kept."""
    checksums = "".join(migration.checksum for migration in packaged())
    name = f"webhook_migrated_{hashlib.sha256(checksums.encode()).hexdigest()[:12]}"
    with psycopg.connect(superuser_url, autocommit=True) as connection:
        if not _stands(connection, name):
            connection.execute("select pg_advisory_lock(%s)", (_TURN,))
            if not _stands(connection, name):
                _make(connection, superuser_url, name)
    return name


def _make(server: psycopg.Connection, superuser_url: str, name: str) -> None:
    """Under another name first: what is half-made is nobody's template."""
    making = f"{name}_making"
    server.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(making)))
    server.execute(_create(making, EMPTY))
    with psycopg.connect(with_database(superuser_url, making), autocommit=True) as connection:
        migrate(connection)
    server.execute(sql.SQL("alter database {} rename to {}").format(*map(sql.Identifier, (making, name))))


def _stands(server: psycopg.Connection, name: str) -> bool:
    return server.execute("select 1 from pg_database where datname = %s", (name,)).fetchone() is not None


def _create(name: str, template: str) -> sql.Composed:
    return sql.SQL("create database {} encoding 'UTF8' template {}").format(
        *map(sql.Identifier, (name, template))
    )


def with_database(url: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def with_address(url: str, host: str, port: int) -> str:
    """The same database through another address."""
    parts = urlsplit(url)
    credentials, separator, _ = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{credentials}{separator}{host}:{port}"))
