"""What a site has beside its deliveries: the bot's avatars, counts of five minutes, deployments, and an audit of years."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from webhook_api.audit import Operation
from webhook_api.web import accounts

Connection = psycopg.Connection[Any]

PASSWORD: Final = "correct horse battery"  # noqa: S105  (of an account that lives as long as the benchmark)
TRAINING: Final = 300
"""Avatars in training."""
AVATARS_EVERY: Final = 5
"""Every so many deliveries belong to an avatar that the bot still has."""
PENDING: Final = 2_000
"""A backlog of the worker."""

_BOT: Final = """
create table users (id uuid primary key, telegram_id bigint);
create table avatars (
    id uuid primary key default gen_random_uuid(), user_id uuid not null references users, name varchar(100),
    training_type varchar(20), status varchar(32) not null, fal_request_id varchar(255), finetune_id varchar(255),
    training_progress integer not null default 0, training_started_at timestamptz, training_completed_at timestamptz,
    diffusers_lora_file_url varchar(500), config_file_url varchar(500), training_error text, fal_response_data json,
    last_status_check timestamptz, updated_at timestamptz not null default now());
insert into users values ('00000000-0000-0000-0000-000000000001', 1);
"""
_AVATARS: Final = """
insert into avatars (user_id, name, training_type, status, fal_request_id, training_progress, training_started_at,
    training_completed_at, diffusers_lora_file_url, config_file_url)
select '00000000-0000-0000-0000-000000000001', 'Avatar ' || id, 'portrait', 'completed', request_id, 100, first_seen_at,
    first_seen_at, 'https://v3.fal.media/files/' || dedup_key || '/pytorch_lora_weights.safetensors',
    'https://v3.fal.media/files/' || dedup_key || '/config.json'
from webhook.deliveries where id %% %(every)s = 0
"""
_TRAINING: Final = """
insert into avatars (user_id, name, training_type, status, fal_request_id, training_progress, training_started_at)
select '00000000-0000-0000-0000-000000000001', 'Avatar in training', 'portrait', 'training', gen_random_uuid(), 40,
    now() - make_interval(mins => g) from generate_series(1, %(training)s) g
"""
# As roles/backends makes them.
_INDEXES: Final = (
    "create index avatars_fal_request_id_idx on avatars (fal_request_id)",
    "create index avatars_training_idx on avatars (status) where lower(status::text) = 'training'",
)
_AUDIT: Final = """
insert into webhook.audit (at, operation, who, instance, action, affected, delivery_ids, detail)
select now() - make_interval(mins => 30 * g), gen_random_uuid(), 'maria', 'console',
    case when g %% 10 = 0 then 'dead-letters.replay' else 'console.login' end, case when g %% 10 = 0 then 200 else 0 end,
    case when g %% 10 = 0 then (select array_agg(first + (g * 7919 + n) %% %(rows)s) from generate_series(1, 200) n)
         else '{}' end, '{}'
from generate_series(1, 20000) g, (select min(id) as first from webhook.deliveries) d
"""
_DEPLOYMENTS: Final = """
insert into webhook.deployments (id, host, kind, started_at, ended_at, who, from_release, to_release, result, record)
select 'run-' || g, 'webhook-1', 'deploy', now() - make_interval(hours => g), now() - make_interval(hours => g, secs => -40),
    'aisha', 'r-' || g, 'r-' || g + 1, 'done', jsonb_build_object('steps', repeat('x', 2000))
from generate_series(1, 500) g
"""
_PENDING: Final = """
insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256)
select 'fal', gen_random_uuid()::text, 'completed:x', 'completed', convert_to(repeat('x', 500), 'UTF8'), repeat('0', 64)
from generate_series(1, %s)
"""
_ROLLUPS: Final = """
insert into webhook.rollups (starts_at, deliveries, failed, done, dead, latency_p50, latency_p95)
select to_timestamp(floor(extract(epoch from now()) / 300) * 300) - make_interval(mins => 5 * g), 1500, 60, 1440, 1, 0.4, 2.1
from generate_series(0, 287) g on conflict do nothing
"""


def furnish(connection: Connection, rows: int, say: Callable[[str], None]) -> None:
    """Add all that to a database (autocommit) that has its deliveries."""
    connection.execute(_BOT.encode())
    connection.execute(_AVATARS.encode(), {"every": AVATARS_EVERY})
    connection.execute(_TRAINING.encode(), {"training": TRAINING})
    for index in _INDEXES:
        connection.execute(index.encode())
    connection.execute("vacuum (analyze) avatars")
    say("the bot's avatars are there")
    connection.execute(_AUDIT.encode(), {"rows": rows})
    connection.execute(_DEPLOYMENTS.encode())
    connection.execute(_PENDING.encode(), (PENDING,))
    for table in ("webhook.audit", "webhook.deployments"):
        connection.execute(f"vacuum (analyze) {table}".encode())
    say("audit, deployments and a backlog are there")


@dataclass(frozen=True, slots=True)
class Known:
    """Rows that are known to be there, and a token for each role."""

    newest: datetime
    first: int
    middle: int
    done: int
    dead: int
    dead_middle: int
    parked: int
    request_id: str
    """Of ``done``."""
    avatar_id: str
    record: int
    """Of the audit: a replay of dead letters."""
    tokens: dict[str, str]


def settle(connection: Connection) -> Known:
    """Make accounts and tokens anew, bring the counts up to now, and look at what is there."""
    connection.execute("truncate webhook.accounts, webhook.sessions, webhook.api_tokens")
    connection.execute(_ROLLUPS.encode())
    operation, tokens = Operation("bench", "bench", "accounts.add"), {}
    for name, role in (("maria", "operator"), ("viktor", "viewer")):
        accounts.add(connection, name, role, PASSWORD, operation)
        tokens[role] = accounts.add_token(connection, name, role, operation)
    newest = _one(connection, "select max(first_seen_at) from webhook.deliveries where state <> 'pending'")
    first = _one(connection, "select min(id) from webhook.deliveries")
    middle = (first + _one(connection, "select max(id) from webhook.deliveries")) // 2
    dead = "select id from webhook.deliveries where state = 'dead' order by id + 0 desc"
    done = "select id from webhook.deliveries where id >= %s and state = 'done' order by id limit 1"
    done_id = _one(connection, done, middle)
    dead_count = _one(connection, "select count(*) from webhook.deliveries where state = 'dead'")
    return Known(
        newest=newest,
        first=first,
        middle=middle,
        done=done_id,
        dead=_one(connection, f"{dead} limit 1"),
        dead_middle=_one(connection, f"{dead} offset %s limit 1", dead_count // 2),
        parked=_one(
            connection,
            "select id from webhook.deliveries where state = 'parked' order by id + 0 desc limit 1",
        ),
        request_id=_one(connection, "select request_id from webhook.deliveries where id = %s", done_id),
        avatar_id=str(_one(connection, "select id from avatars where status = 'completed' limit 1")),
        record=_one(connection, "select min(id) from webhook.audit where action = 'dead-letters.replay'"),
        tokens=tokens,
    )


def _one(connection: Connection, query: str, *values: Any) -> Any:
    row = connection.execute(query.encode(), values or None).fetchone()
    assert row is not None, query
    return row[0]
