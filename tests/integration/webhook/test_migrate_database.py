"""Migrations on a real PostgreSQL: from nothing, again, at the same time, half-way, and without the right to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql
from webhook_api import db
from webhook_api import migrate as module
from webhook_api.migrate import Migration, MigrationError, current_version, migrate, packaged

from tests.support.databases import fresh_database

pytestmark = pytest.mark.backends


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    with fresh_database(database_url) as fresh:
        yield fresh


def tables(connection: db.Connection) -> set[str]:
    rows = connection.execute("select tablename from pg_tables where schemaname = 'webhook'").fetchall()
    return {row[0] for row in rows}


def test_from_nothing_and_again(url: str) -> None:
    with db.connect(url, "test") as connection:
        assert current_version(connection) == 0
        first = migrate(connection)
        assert first.applied[0] == "0001_inbox"
        assert tables(connection) >= {"deliveries", "delivery_variants", "effects", "schema_migrations"}
        again = migrate(connection)
        assert (again.applied, again.version) == ((), first.version)
        assert current_version(connection) == first.version


def test_many_at_the_same_time_apply_each_once(url: str) -> None:
    def one(_: int) -> int:
        with db.connect(url, "test") as connection:
            return len(migrate(connection).applied)

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(one, range(6))) == [0, 0, 0, 0, 0, len(packaged())]


def test_a_file_that_fails_leaves_nothing_of_itself(url: str) -> None:
    broken = Migration(len(packaged()) + 1, "9999_broken", "create table webhook.half (id int); select 1/0;")
    with db.connect(url, "test") as connection:
        with pytest.raises(MigrationError, match="9999_broken: division by zero") as caught:
            migrate(connection, [*packaged(), broken])
        assert caught.value.reason == "statement"
        assert "half" not in tables(connection)
        assert current_version(connection) == len(packaged())
        # The lock is free again.
        with db.connect(url, "other") as other:
            migrate(other)


def outside(version: int, sql: str) -> Migration:
    return Migration(version, f"{version:04d}_outside", f"-- outside a transaction\n{sql}")


def test_an_index_is_built_concurrently_while_others_wait_to_migrate(url: str) -> None:
    # A process that waited inside a statement would be waited for by the index, and both would be stuck.
    table = Migration(1, "0001_table", "create table webhook.t (id int); insert into webhook.t values (1)")
    index = outside(
        2, "drop index concurrently if exists webhook.i;\ncreate index concurrently i on webhook.t (id);"
    )

    def one(_: int) -> int:
        with db.connect(url, "test") as connection:
            return len(migrate(connection, [table, index]).applied)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(one, range(4))) == [0, 0, 0, 2]
    with db.connect(url, "test") as connection:
        row = connection.execute(
            "select indisvalid from pg_index where indexrelid = 'webhook.i'::regclass"
        ).fetchone()
    assert row == (True,)


def test_a_file_outside_a_transaction_starts_over_after_a_failure(url: str) -> None:
    table = Migration(
        1, "0001_table", "create table webhook.t (id int); insert into webhook.t values (1), (1)"
    )
    text = (
        "drop index concurrently if exists webhook.i;\ncreate unique index concurrently i on webhook.t (id);"
    )
    with db.connect(url, "test") as connection:
        with pytest.raises(MigrationError, match="run it again"):
            migrate(connection, [table, outside(2, text)])
        assert current_version(connection) == 1
        # What PostgreSQL leaves behind: an index that is there and invalid.
        connection.execute("delete from webhook.t")
        assert migrate(connection, [table, outside(2, text)]).version == 2
        row = connection.execute(
            "select indisvalid from pg_index where indexrelid = 'webhook.i'::regclass"
        ).fetchone()
    assert row == (True,)


def test_a_lock_that_is_held_is_waited_for_and_then_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.5)
    with db.connect(url, "holder") as holder, db.connect(url, "test") as connection:
        holder.execute("select pg_advisory_lock(%s)", (module.LOCK_KEY,))
        with pytest.raises(MigrationError) as caught:
            migrate(connection)
        assert caught.value.reason == "locked"
        holder.execute("select pg_advisory_unlock(%s)", (module.LOCK_KEY,))
        assert migrate(connection).version == len(packaged())


def test_a_changed_file_is_refused(url: str) -> None:
    with db.connect(url, "test") as connection:
        migrate(connection)
        first = packaged()[0]
        with pytest.raises(MigrationError) as caught:
            migrate(connection, [Migration(1, first.name, first.sql + "-- changed"), *packaged()[1:]])
    assert caught.value.reason == "checksum"


def test_an_older_release_leaves_a_newer_schema_alone(url: str) -> None:
    with db.connect(url, "test") as connection:
        migrate(connection)
        outcome = migrate(connection, packaged()[:1])
        assert outcome.applied == ()
        assert outcome.version == len(packaged())


@contextmanager
def role_of_our_own(admin: psycopg.Connection) -> Iterator[sql.Identifier]:
    """Roles are the server's: a fixed name would be another run's as well."""
    role = sql.Identifier(f"webhook_test_{uuid.uuid4().hex[:12]}")
    admin.execute(sql.SQL("create role {}").format(role))
    try:
        yield role
    finally:
        admin.execute(sql.SQL("drop owned by {}").format(role))
        admin.execute(sql.SQL("drop role {}").format(role))


def test_without_the_right_to_create_it_says_what_to_grant(url: str) -> None:
    with (
        psycopg.connect(url, autocommit=True) as admin,
        role_of_our_own(admin) as nobody,
        db.connect(url, "test") as connection,
    ):
        connection.execute(sql.SQL("set role {}").format(nobody))
        with pytest.raises(MigrationError, match="grant CREATE"):
            migrate(connection)


def test_a_role_that_owns_only_its_schema_may_migrate(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin, role_of_our_own(admin) as owner:
        admin.execute(sql.SQL("create schema webhook authorization {}").format(owner))
        with db.connect(url, "test") as connection:
            connection.execute(sql.SQL("set role {}").format(owner))
            assert migrate(connection).version == len(packaged())
