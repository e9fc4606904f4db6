"""What PostgreSQL tells: the server, the schema, the rights, the deliveries, and the workers that are connected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import psycopg

from webhook_api.config import Settings
from webhook_api.db import Connection, connect
from webhook_api.doctor import Finding, fail, ok, skip, warn

CONNECTIONS_WARN: Final = 0.8
"""Share of max_connections in use from which a burst may find none."""
OLDEST_WARN: Final = 60.0
OLDEST_FAIL: Final = 600.0
"""Seconds for which something has been due and untouched."""
NEEDED: Final = {
    "deliveries": "select, insert, update, delete",
    "delivery_variants": "select, insert, delete",
    "effects": "select, insert, update, delete",
    "audit": "select, insert, delete",
    "samples": "select, insert, update, delete",
    "spools": "select, insert, update, delete",
    "reconciliations": "select, insert, update, delete",
    "reconcile_state": "select, update",
}
AVATAR_COLUMNS: Final = (
    "status", "training_progress", "training_started_at", "training_completed_at", "training_error", "finetune_id",
    "diffusers_lora_file_url", "config_file_url", "fal_response_data", "last_status_check", "updated_at",
)  # fmt: skip
_SECONDS: Final = 5.0

_SERVER: Final = """
select current_setting('server_version'), pg_is_in_recovery(), current_setting('transaction_read_only'),
    current_setting('server_encoding'), current_setting('synchronous_commit'), current_setting('fsync'),
    (select count(*) from pg_stat_activity where backend_type = 'client backend'),
    current_setting('max_connections')::integer, current_user, pg_database_size(current_database())
"""
_RIGHTS: Final = """
select t.name, to_regclass('webhook.' || t.name) is not null,
    case when to_regclass('webhook.' || t.name) is not null
         then (select array_agg(trim(r.name)) from unnest(string_to_array(t.needed, ',')) as r(name)
               where not has_table_privilege(to_regclass('webhook.' || t.name), trim(r.name))) end
from unnest(%s::text[], %s::text[]) as t (name, needed)
"""
_AVATARS: Final = """
select a.attname, has_column_privilege(a.attrelid, a.attnum, 'select'), has_column_privilege(a.attrelid, a.attnum, 'update')
from pg_attribute a where a.attrelid = to_regclass('public.avatars') and a.attnum > 0 and not a.attisdropped
"""
_DELIVERIES: Final = """
select
    (select count(*) from webhook.deliveries where state = 'pending'),
    (select extract(epoch from now() - min(next_attempt_at))::float8 from webhook.deliveries where state = 'pending'),
    (select count(*) from webhook.deliveries where state = 'leased'),
    (select count(*) from webhook.deliveries where state = 'leased' and lease_until < now() - interval '60 seconds'),
    (select count(*) from webhook.deliveries where state = 'retry'),
    (select extract(epoch from now() - min(next_attempt_at))::float8 from webhook.deliveries
     where state in ('retry', 'parked')),
    (select count(*) from webhook.deliveries where state = 'parked'),
    (select count(*) from webhook.deliveries where state = 'dead' and discarded_at is null and aside is null),
    (select count(*) from webhook.deliveries where state = 'dead' and discarded_at is null and aside is not null)
"""
_WORKERS: Final = """
select distinct application_name from pg_stat_activity
where application_name like 'webhook-worker %' and datname = current_database()
"""


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator[Connection]:
    opened = connect(settings.database_url, "webhook-doctor", statement_timeout=_SECONDS)
    with opened as connection, connection.bounded(_SECONDS):
        yield connection


def server(settings: Settings) -> Iterator[Finding]:
    """It answers, takes writes, keeps what it has acknowledged, and has connections left."""
    try:
        with _connected(settings) as connection:
            row = connection.execute(_SERVER).fetchone()
    except psycopg.Error as error:
        yield fail("database", f"cannot be reached: {_line(error)}",
                   "start PostgreSQL; compare DATABASE_URL, its password file and the network with it")  # fmt: skip
        return
    assert row is not None  # noqa: S101  (a select of constants gives a row)
    version, standby, read_only, encoding, commit, fsync, used, most, user, size = row
    yield ok("database", f"PostgreSQL {version}, as {user}, {_bytes(size)}")
    if standby or read_only == "on":
        yield fail(
            "database", "takes no writes (a standby, or read-only)", "point DATABASE_URL at the primary"
        )
    if fsync != "on" or commit == "off":
        yield fail("database", f"fsync is {fsync} and synchronous_commit {commit}: what was answered 200 may be lost",
                   "set both to on for this database")  # fmt: skip
    if encoding not in ("UTF8", "SQL_ASCII"):
        yield warn(
            "database", f"is encoded in {encoding}", "texts outside it are refused; use a UTF8 database"
        )
    if used > CONNECTIONS_WARN * most:
        yield warn(
            "database",
            f"{used} of {most} connections are in use",
            "raise max_connections, or find who holds them",
        )


def schema(settings: Settings) -> Iterator[Finding]:
    """It stands where this release's migrations end."""
    from webhook_api.migrate import MigrationError, applied_versions, packaged, pending

    try:
        with _connected(settings) as connection:
            applied = applied_versions(connection)
    except psycopg.Error as error:
        yield skip("schema", f"not looked at: {_line(error)}")
        return
    brought = packaged()
    try:
        missing = pending(brought, applied)
    except MigrationError as error:
        yield fail(
            "schema",
            str(error),
            "this image and this database do not belong together: deploy the right release",
        )
        return
    if missing:
        names = ", ".join(migration.name for migration in missing)
        yield fail("schema", f"{len(missing)} migration(s) are missing: {names}", "run webhook-api migrate")
        return
    ahead = max(applied, default=0) - len(brought)
    more = f"; the database is {ahead} ahead, of a newer release" if ahead > 0 else ""
    yield ok("schema", f"version {max(applied, default=0)}{more}", version=max(applied, default=0))


def rights(settings: Settings) -> Iterator[Finding]:
    """This role may do what the service does, in its own schema and in the bot's table."""
    try:
        with _connected(settings) as connection:
            tables = connection.execute(_RIGHTS, (list(NEEDED), list(NEEDED.values()))).fetchall()
            columns = connection.execute(_AVATARS).fetchall()
    except psycopg.Error as error:
        yield skip("rights", f"not looked at: {_line(error)}")
        return
    lacking = [f"{', '.join(wanted)} on webhook.{name}" for name, there, wanted in tables if there and wanted]
    if lacking:
        yield fail(
            "rights", f"this role lacks {'; '.join(lacking)}", "make it the owner of the schema webhook"
        )
    yield from _avatar_rights(columns)
    if not lacking and columns:
        yield ok("rights", "this role may do what the service does")


def _avatar_rights(columns: list[Any]) -> Iterator[Finding]:
    if not columns:
        yield fail("rights", "the bot's table public.avatars is not there", "every delivery waits, parked: is this the "
                   "bot's database (DATABASE_URL)? Has the bot made its tables?")  # fmt: skip
        return
    named = {str(name): (bool(select), bool(update)) for name, select, update in columns}
    missing = [name for name in ("id", "status", "fal_request_id") if name not in named]
    if missing:
        yield fail(
            "rights", f"public.avatars has no column {', '.join(missing)}", "the bot's schema is another one"
        )
    unread = [name for name, (select, _) in named.items() if not select]
    unwritten = [name for name in AVATAR_COLUMNS if name in named and not named[name][1]]
    if unread:
        yield fail("rights", f"this role may not read public.avatars ({', '.join(unread[:5])})",
                   "GRANT SELECT ON public.avatars TO the service's role")  # fmt: skip
    if unwritten:
        yield fail("rights", f"this role may not update {', '.join(unwritten)} of public.avatars",
                   f"GRANT UPDATE ({', '.join(unwritten)}) ON public.avatars TO the service's role")  # fmt: skip


def deliveries(settings: Settings) -> Iterator[Finding]:
    """Nothing is stuck, and no dead letter waits for an operator."""
    try:
        with _connected(settings) as connection:
            row = connection.execute(_DELIVERIES).fetchone()
    except psycopg.Error as error:
        yield skip("deliveries", f"not counted: {_line(error)}")
        return
    assert row is not None  # noqa: S101  (a select of counts gives a row)
    pending, pending_age, leased, expired, retry, again_age, parked, dead, aside = row
    yield ok("deliveries", f"{pending} pending, {leased} in work, {retry} to be tried again, {parked} parked",
             pending=pending, leased=leased, retry=retry, parked=parked, dead=dead, aside=aside)  # fmt: skip
    look = "is a worker running? See its log"
    for name, age in (
        ("the oldest new delivery", pending_age),
        ("the oldest that is tried again", again_age),
    ):
        if age is not None and age > OLDEST_WARN:
            make = fail if age > OLDEST_FAIL else warn
            yield make("deliveries", f"{name} has been due for {age:.0f} s", look)
    if expired:
        yield warn("deliveries", f"{expired} lease(s) have run out, and nobody took them back", look)
    if dead:
        yield warn("deliveries", f"{dead} dead letter(s) wait for you", "webhook-api dead-letters list")
    if aside:
        yield warn(
            "deliveries",
            f"{aside} authentic delivery(s) were kept aside",
            "webhook-api dead-letters list --aside any",
        )


def workers(settings: Settings) -> Iterator[Finding]:
    """At least one worker is connected."""
    try:
        with _connected(settings) as connection:
            names = sorted(str(row[0]) for row in connection.execute(_WORKERS).fetchall())
    except psycopg.Error as error:
        yield skip("worker", f"not looked at: {_line(error)}")
        return
    instances = sorted({name.removeprefix("webhook-worker ").removesuffix(" listener") for name in names})
    if instances:
        yield ok("worker", f"connected: {', '.join(instances)}", instances=instances)
    else:
        yield fail("worker", "no worker is connected to the database: deliveries are stored and not processed",
                   "start it (docker start …-worker), and see its log")  # fmt: skip


def _line(error: psycopg.Error) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _bytes(size: int) -> str:
    return f"{size / 1024**2:,.0f} MiB"
