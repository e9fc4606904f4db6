"""Fills `webhook.deliveries` with finished deliveries of the past and a few that wait, as a site has after years.

Nothing is random that a second run would do otherwise, except the request ids. Indexes are taken away, the rows are
made by the server itself, and the indexes built again: ten times as fast as keeping them up to date row by row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

CHUNK: Final = 250_000
DEAD_EVERY: Final = 5_000
PARKED_EVERY: Final = 20_000
RETRY_EVERY: Final = 100_000
DAYS: Final = 400
"""The past over which the deliveries are spread, evenly."""
EFFECTS: Final = ("avatar", "raw_archive", "archive", "stream")

Say = Callable[[str], None]
Connection = psycopg.Connection[Any]

_DELIVERIES: Final = """
insert into webhook.deliveries (source, request_id, dedup_key, status, gateway_request_id, account_id, body, body_sha256,
    headers, edge_request_id, state, tries, attempts, first_seen_at, last_seen_at, next_attempt_at, last_error, done_at)
select case when g %% 20 = 0 then 'manual' else 'fal' end, rid,
    (case when g %% 25 = 0 then 'failed:' else 'completed:' end) || md5(rid),
    case when g %% 25 = 0 then 'failed' else 'completed' end, rid, 'user_0123456789',
    convert_to('{"request_id":"' || rid || '","gateway_request_id":"' || rid || '","status":"OK","payload":{'
        || '"diffusers_lora_file":{"url":"https://v3.fal.media/files/' || md5(rid) || '/pytorch_lora_weights.safetensors",'
        || '"content_type":"application/octet-stream","file_name":"pytorch_lora_weights.safetensors","file_size":89745224},'
        || '"config_file":{"url":"https://v3.fal.media/files/' || md5(rid) || '/config.json","file_size":452}}}', 'UTF8'),
    md5(rid) || md5(rid),
    jsonb_build_object('x-fal-webhook-request-id', rid, 'x-fal-webhook-user-id', 'user_0123456789',
        'x-fal-webhook-timestamp', '1760000000', 'content-type', 'application/json', 'x-fal-webhook-signature',
        md5(rid) || md5(rid) || md5(rid) || md5(rid)),
    md5(rid), state, 1, 1, seen, seen,
    case when state in ('parked', 'retry') then now() + interval '1 day' else seen end,
    case when state <> 'done' then 'avatar: avatar_not_found: no avatar has fal_request_id (yet)' end,
    case when state = 'done' then seen end
from (
    select g, gen_random_uuid()::text as rid,
        case when g %% %(dead)s = 0 then 'dead' when g %% %(parked)s = 1 then 'parked' when g %% %(retry)s = 2 then 'retry'
             else 'done' end as state,
        now() - make_interval(secs => (%(rows)s - g) * %(seconds)s::float8 / %(rows)s) as seen
    from generate_series(%(first)s::bigint, %(last)s::bigint) g) made
"""
_EFFECTS: Final = """
insert into webhook.effects (delivery_id, name, state, tries, detail, updated_at)
select d.id, e.name, 'done', 1, e.detail, d.first_seen_at
from webhook.deliveries d,
    (values ('avatar', '{"after":"completed","outcome":"completed","before":"training"}'::jsonb),
            ('raw_archive', '{"key":"deliveries/fal/0/0.json","size":1900}'),
            ('archive', '{"artifacts":[]}'), ('stream', '{"entry":"0-1","added":true}')) e (name, detail)
where d.id between %(first)s and %(last)s and d.state = 'done' and e.name = any(%(effects)s)
"""
_INDEXES: Final = """
select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), c.conname, pg_get_constraintdef(c.oid), c.contype
from pg_index i left join pg_constraint c on c.conindid = i.indexrelid and c.conrelid = i.indrelid
where i.indrelid = %s::regclass
order by i.indisprimary, 1
"""
_FOREIGN: Final = """
select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint
where contype = 'f' and confrelid = 'webhook.deliveries'::regclass
"""


def fill(
    connection: Connection,
    rows: int,
    say: Say,
    effects: Sequence[str] = EFFECTS,
    days: float = DAYS,
    trouble: int = 1,
) -> None:
    """Bring an empty, migrated database (autocommit) to `rows` deliveries, and `effects` for each that is done.

    They are spread over the last `days`; `trouble` times as many as usual are dead, parked or tried again.
    """
    values = {
        "rows": rows, "seconds": days * 86_400, "dead": DEAD_EVERY // trouble, "parked": PARKED_EVERY // trouble,
        "retry": RETRY_EVERY // trouble, "effects": list(effects),
    }  # fmt: skip
    started = time.monotonic()
    tables = ("webhook.deliveries", "webhook.effects")
    foreign = connection.execute(_FOREIGN).fetchall()
    for table, name, _ in foreign:
        connection.execute(_sql("alter table {} drop constraint {}", table, name))
    dropped = {table: _drop_indexes(connection, table) for table in tables}
    connection.execute("alter table webhook.deliveries disable trigger user")
    _insert(connection, _DELIVERIES, values, "deliveries", say)
    _restore(connection, "webhook.deliveries", dropped["webhook.deliveries"], say)
    first = connection.execute("select coalesce(min(id), 1) from webhook.deliveries").fetchone()
    _insert(connection, _EFFECTS, values, "effects", say, offset=int(first[0]) - 1 if first else 0)
    _restore(connection, "webhook.effects", dropped["webhook.effects"], say)
    connection.execute("alter table webhook.deliveries enable trigger user")
    for table, name, definition in foreign:
        connection.execute(_sql("alter table {} add constraint {} ", table, name) + sql.SQL(definition))
    for table in tables:
        connection.execute(_sql("vacuum (analyze, freeze) {}", table))
        say(f"{table} is vacuumed and analysed")
    say(f"{rows:,} deliveries after {time.monotonic() - started:.0f} s")


def _insert(
    connection: Connection, query: str, values: dict[str, Any], what: str, say: Say, offset: int = 0
) -> None:
    started, rows = time.monotonic(), values["rows"]
    for first in range(1, rows + 1, CHUNK):
        last = min(first + CHUNK - 1, rows)
        connection.execute(query.encode(), {**values, "first": first + offset, "last": last + offset})
        if first == 1 or last == rows or (last // CHUNK) % 4 == 0:
            pace = last / (time.monotonic() - started)
            say(f"{what}: of {last:,} of {rows:,} rows ({pace:,.0f}/s)")


def _drop_indexes(connection: Connection, table: str) -> list[tuple[str, str]]:
    """Take indexes and unique constraints away; returns what brings each back."""
    found = []
    for name, definition, constraint, constraint_definition, _ in connection.execute(
        _INDEXES, (table,)
    ).fetchall():
        if constraint is None:
            found.append((name, definition))
            connection.execute(sql.SQL("drop index ") + sql.SQL(name))
        else:
            found.append((name, f'alter table {table} add constraint "{constraint}" {constraint_definition}'))
            connection.execute(_sql("alter table {} drop constraint {}", table, constraint))
    return found


def _restore(connection: Connection, table: str, definitions: list[tuple[str, str]], say: Say) -> None:
    for name, definition in definitions:
        started = time.monotonic()
        connection.execute(definition.encode())
        say(f"{table}: {name} is built ({time.monotonic() - started:.0f} s)")


def _sql(text: str, table: str, name: str | None = None) -> sql.Composed:
    parts = [sql.SQL(table)] if name is None else [sql.SQL(table), sql.Identifier(name)]
    return sql.SQL(text).format(*parts)
