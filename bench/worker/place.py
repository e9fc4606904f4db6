"""A database, a stream and a bucket of a run's own, with the bot's tables, and deliveries put into them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis
from minio import Minio
from psycopg import sql
from webhook_api.migrate import migrate

from bench.intake.backends import Backends

_BOT: Final = """
create table users (id uuid primary key, telegram_id varchar(255));
create table avatars (
    id uuid primary key, user_id uuid not null references users, name varchar(100), training_type varchar(20),
    status varchar(50) not null, fal_request_id varchar(255), finetune_id varchar(255),
    training_progress integer not null default 0, training_started_at timestamptz, training_completed_at timestamptz,
    diffusers_lora_file_url varchar(500), config_file_url varchar(500), training_error text, fal_response_data json,
    last_status_check timestamptz, updated_at timestamptz not null default now());
create index avatars_fal_request_id_idx on avatars (fal_request_id);
insert into users values ('00000000-0000-0000-0000-000000000001', '1');
"""
_AVATARS: Final = """
insert into avatars (id, user_id, training_type, status, fal_request_id)
select gen_random_uuid(), '00000000-0000-0000-0000-000000000001', 'style', 'training', id
from unnest(%s::text[]) as given (id)
"""
# fal's own shape of a finished style training, with the headers that intake keeps.
_DELIVERIES: Final = """
insert into webhook.deliveries (source, request_id, dedup_key, status, gateway_request_id, account_id, body, body_sha256,
    headers, edge_request_id)
select 'fal', id, 'completed:' || md5(id), 'completed', id, 'user_0123456789', body, encode(sha256(body), 'hex'),
    jsonb_build_object('x-fal-webhook-request-id', id, 'x-fal-webhook-user-id', 'user_0123456789',
        'x-fal-webhook-timestamp', '1760000000', 'content-type', 'application/json',
        'x-fal-webhook-signature', repeat(md5(id), 4)),
    md5(id)
from (
    select id, convert_to('{"request_id":"' || id || '","gateway_request_id":"' || id || '","status":"OK","error":null,'
        || '"payload":{"finetune_id":"' || md5(id) || '","seed":13822349374293842938,"timings":{"inference":181.2},'
        || '"logs":"' || repeat('step 100 of 100, loss 0.0123; ', 12) || '"}}', 'UTF8') as body
    from unnest(%s::text[]) as given (id)) as made
"""


@dataclass(frozen=True)
class Place:
    """Where a run happens."""

    url: str
    redis_url: str
    s3: dict[str, str]
    stream: str
    bucket: str

    def environ(self) -> dict[str, str]:
        """Settings of its workers."""
        return {
            "DATABASE_URL": self.url,
            "REDIS_URL": self.redis_url,
            "MINIO_BUCKET_NAME": self.bucket,
            "REDIS_STREAM": self.stream,
            "REDIS_STREAM_MAXLEN": "10000000",
            "ENVIRONMENT": "bench",
            "WORKER_METRICS_PORT": "0",
            **self.s3,
        }

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """A connection of the bench's own."""
        return psycopg.connect(self.url, autocommit=True)

    def feed(self, events: int) -> None:
        """Put so many new deliveries into the inbox, each with an avatar that waits for it."""
        with self.connect() as connection:
            connection.execute("alter table webhook.deliveries disable trigger deliveries_notify")
            for first in range(0, events, 5000):
                ids = [str(uuid.uuid4()) for _ in range(min(5000, events - first))]
                connection.execute(_AVATARS, (ids,))
                connection.execute(_DELIVERIES, (ids,))
            connection.execute("alter table webhook.deliveries enable trigger deliveries_notify")
            connection.execute("analyze")
            connection.execute("checkpoint")

    def entries(self) -> int:
        """Entries in the stream."""
        client = redis.Redis.from_url(self.redis_url)
        try:
            return int(str(client.xlen(self.stream)))
        finally:
            client.close()

    def clear(self) -> None:
        """Take stream, markers and objects away."""
        client = redis.Redis.from_url(self.redis_url)
        for keys in _chunks(client.scan_iter(f"*{self.stream}*", count=5000), 5000):
            client.unlink(*keys)
        client.close()
        store = Minio(
            self.s3["MINIO_ENDPOINT"],
            access_key=self.s3["MINIO_ACCESS_KEY"],
            secret_key=self.s3["MINIO_SECRET_KEY"],
            secure=False,
            region="us-east-1",
        )
        if store.bucket_exists(self.bucket):
            for entry in store.list_objects(self.bucket, recursive=True):
                store.remove_object(self.bucket, str(entry.object_name))


def _chunks(items: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def place(servers: Backends) -> Iterator[Place]:
    """A place that is gone afterwards."""
    mark = uuid.uuid4().hex[:10]
    name = f"bench_worker_{mark}"
    url = urlunsplit(urlsplit(servers.database_url)._replace(path=f"/{name}"))
    made = Place(url, servers.redis_url, servers.s3, f"bench:{mark}", f"bench-{mark}")
    with psycopg.connect(servers.database_url, autocommit=True) as server:
        server.execute(
            sql.SQL("create database {} encoding 'UTF8' template template0").format(sql.Identifier(name))
        )
        try:
            with made.connect() as connection:
                migrate(connection)
                connection.execute(_BOT)
            yield made
        finally:
            made.clear()
            server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def wait_empty(place: Place, events: int, seconds: float) -> None:
    """Return when so many deliveries were finished; fails after `seconds`."""
    ends = time.monotonic() + seconds
    with place.connect() as connection:
        while True:
            left = connection.execute(
                "select count(*) from webhook.deliveries where state in ('pending', 'leased') or "
                "(state in ('retry', 'parked') and next_attempt_at < now() + interval '1 hour')"
            ).fetchone()
            if left is not None and left[0] == 0:
                return
            if time.monotonic() > ends:
                raise SystemExit(f"{left} of {events} deliveries are not finished after {seconds:.0f} s")
            time.sleep(0.25)
