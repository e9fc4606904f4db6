"""A database of its own with the bot's tables, settings, deliveries and workers: what the worker's tests need."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psycopg
import redis
from minio import Minio
from minio.error import MinioException
from webhook_api.bodies import dedup_key
from webhook_api.config import NEEDS_WORKER, Settings, load_settings
from webhook_api.outlets import ObjectStore, minio_client
from webhook_api.worker.loop import Worker

from tests.support.databases import migrated_database

REPO = Path(__file__).resolve().parents[2]
T = TypeVar("T")
STATUSES = ("draft", "photos_uploading", "ready_for_training", "training", "completed", "error", "cancelled")
_MAIN = """
import sys
from pathlib import Path
from webhook_api.config import NEEDS_WORKER, load_settings
from webhook_api.jsonlog import configure
from webhook_api.worker import run
configure("INFO")
sys.exit(run(load_settings(needs=NEEDS_WORKER), Path(sys.argv[1])))
"""


class Bucket(Protocol):
    """The fixture `s3`."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


def wait_for(condition: Callable[[], T], what: str, seconds: float = 120.0) -> T:
    """The first true value of `condition`. Fails when there is none within `seconds`."""
    ends = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > ends:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)


def bot_tables(native_enum: bool, upper: bool) -> str:
    """The bot's tables, in one of the ways in which it may have made them."""
    spell = str.upper if upper else str
    labels = ", ".join(f"'{spell(status)}'" for status in STATUSES)
    kinds = ", ".join(f"'{spell(kind)}'" for kind in ("portrait", "style"))
    types = (
        f"create type avatar_status as enum ({labels}); create type avatar_training_type as enum ({kinds});"
        if native_enum
        else ""
    )
    status, kind = (
        ("avatar_status", "avatar_training_type") if native_enum else ("varchar(50)", "varchar(20)")
    )
    return f"""
    {types}
    create table users (id uuid primary key, telegram_id varchar(255));
    create table avatars (
        id uuid primary key, user_id uuid not null references users, name varchar(100), training_type {kind},
        status {status} not null, fal_request_id varchar(255), finetune_id varchar(255),
        training_progress integer not null default 0 check (training_progress between 0 and 100),
        training_started_at timestamptz, training_completed_at timestamptz,
        diffusers_lora_file_url varchar(500), config_file_url varchar(500), training_error text,
        fal_response_data json, last_status_check timestamptz, updated_at timestamptz not null default now(),
        trigger_word varchar(50), trigger_phrase varchar(100));
    """


class Lab:
    """One database, one stream and one bucket of a test's own."""

    def __init__(self, database_url: str, redis_url: str, s3: Bucket, tmp_path: Path) -> None:
        self.database_url = database_url
        self.redis_url = redis_url
        self.s3 = s3
        self.tmp_path = tmp_path
        self.stream = f"test:{uuid.uuid4().hex[:12]}"
        self.bucket = f"test-{uuid.uuid4().hex[:12]}"
        self.connection = psycopg.connect(database_url, autocommit=True)
        self.redis = redis.Redis.from_url(redis_url, decode_responses=True)
        self.minio = Minio(
            s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False, region="us-east-1"
        )
        self.native_enum = self.upper = False

    def close(self) -> None:
        """Remove what the test left in Redis and the object store."""
        self.connection.close()
        keys = list(self.redis.scan_iter(f"*{self.stream}*"))
        if keys:
            self.redis.delete(*keys)
        self.redis.close()
        if self.minio.bucket_exists(self.bucket):
            for entry in self.minio.list_objects(self.bucket, recursive=True):
                self.minio.remove_object(self.bucket, entry.object_name)
            # rclone may keep an empty folder, and then says that the bucket isn't empty.
            with suppress(MinioException):
                self.minio.remove_bucket(self.bucket)

    def make_bot_tables(self, native_enum: bool = False, upper: bool = False) -> None:
        """Make the bot's tables."""
        self.native_enum, self.upper = native_enum, upper
        self.connection.execute(bot_tables(native_enum, upper))  # type: ignore[call-overload]

    def environ(self, **changes: str) -> dict[str, str]:
        """Settings of a worker that loses no time."""
        return {
            "DATABASE_URL": self.database_url,
            "REDIS_URL": self.redis_url,
            "MINIO_ENDPOINT": self.s3.endpoint,
            "MINIO_ACCESS_KEY": self.s3.access_key,
            "MINIO_SECRET_KEY": self.s3.secret_key,
            "MINIO_BUCKET_NAME": self.bucket,
            "REDIS_STREAM": self.stream,
            "LEASE_SECONDS": "5",
            "EVENT_MAX_ATTEMPTS": "3",
            "ENVIRONMENT": "test",
            "WORKER_METRICS_PORT": "0",
            **changes,
        }

    def settings(self, **changes: str) -> Settings:
        """The same, read."""
        return load_settings(self.environ(**changes), NEEDS_WORKER)

    def avatar(
        self, request_id: str, status: str = "training", kind: str | None = "portrait", **more: Any
    ) -> str:
        """Add an avatar in the table's spelling; returns its id."""
        spell = str.upper if self.upper else str
        user, avatar = uuid.uuid4(), uuid.uuid4()
        self.connection.execute("insert into users values (%s, '1')", (user,))
        values = {"status": spell(status), "training_type": spell(kind) if kind else None, **more}
        names = ", ".join(values)
        marks = ", ".join("%s" for _ in values)
        self.connection.execute(
            f"insert into avatars (id, user_id, fal_request_id, {names}) values (%s, %s, %s, {marks})",  # type: ignore[call-overload]
            (avatar, user, request_id, *values.values()),
        )
        return str(avatar)

    def row(self, request_id: str) -> dict[str, Any]:
        """The avatar as it stands."""
        cursor = self.connection.execute("select * from avatars where fal_request_id = %s", (request_id,))
        row = cursor.fetchone()
        assert row is not None
        return dict(zip([column.name for column in cursor.description or ()], row, strict=True))

    def deliver(
        self,
        body: dict[str, Any] | bytes,
        status: str,
        *,
        source: str = "fal",
        probe: bool = False,
        hint: str | None = None,
    ) -> int:
        """Put a delivery into the inbox, as intake does; returns its id."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        digest = hashlib.sha256(raw).hexdigest()
        request_id = body["request_id"] if isinstance(body, dict) else f"raw-{digest[:8]}"
        row = self.connection.execute(
            """
            insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256, headers, probe,
                training_type_hint, account_id, edge_request_id)
            values (%s, %s, %s, %s, %s, %s, '{"X-Fal-Webhook-Signature": "00"}', %s, %s, 'account', 'edge') returning id
            """,
            (source, request_id, dedup_key(status, digest), status, raw, digest, probe, hint),
        ).fetchone()
        assert row is not None
        return int(row[0])

    def deliver_styles(self, request_ids: list[str], mark: str = "ft") -> list[int]:
        """Many finished style trainings at once, each with an avatar that waits for it; returns their ids in order."""
        with self.connection.transaction():
            for request_id in request_ids:
                self.avatar(request_id, kind="style")
            return [
                self.deliver(
                    {
                        "request_id": request_id,
                        "status": "OK",
                        "payload": {"finetune_id": f"{mark}-{request_id}"},
                    },
                    "completed",
                )
                for request_id in request_ids
            ]

    def count_changes(self) -> None:
        """From now on, note each committed change of an avatar in the table `changes`."""
        self.connection.execute(
            "create table changes (request text); create function note() returns trigger language plpgsql as "
            "$$ begin insert into changes values (new.fal_request_id); return new; end $$; "
            "create trigger note before update on avatars for each row execute function note()"
        )

    def store(self) -> ObjectStore:
        """The bucket, as the worker uses it."""
        return ObjectStore(minio_client(self.settings()), self.bucket)

    def must_have_happened_once(self, identifiers: list[int], request_ids: list[str]) -> None:
        """Every effect of every delivery is there exactly once (needs `count_changes`)."""
        states = self.connection.execute(
            "select state, count(*) from webhook.deliveries where id = any(%s) group by state", (identifiers,)
        ).fetchall()
        assert states == [("done", len(identifiers))]
        changes = self.connection.execute("select request, count(*) from changes group by request").fetchall()
        assert dict(changes) == dict.fromkeys(request_ids, 1)
        told = [int(entry["delivery_id"]) for entry in self.entries()]
        assert sorted(told) == sorted(identifiers)
        store = self.store()
        details = self.connection.execute(
            "select delivery_id, detail from webhook.effects where name = 'raw_archive' and state = 'done'"
        ).fetchall()
        segments: dict[str, bytes] = {}
        for identifier, detail in details:
            data = segments.setdefault(detail["key"], store.read(detail["key"]) or b"")
            line = data[detail["offset"] : detail["offset"] + detail["length"]]
            assert hashlib.sha256(line).hexdigest() == detail["sha256"]
            assert json.loads(line)["delivery_id"] == identifier
        assert {identifier for identifier, _ in details} == set(identifiers)

    def delivery(self, identifier: int) -> dict[str, Any]:
        """The row in the inbox."""
        cursor = self.connection.execute("select * from webhook.deliveries where id = %s", (identifier,))
        row = cursor.fetchone()
        assert row is not None
        return dict(zip([column.name for column in cursor.description or ()], row, strict=True))

    def effects(self, identifier: int) -> dict[str, dict[str, Any]]:
        """The effects recorded for a delivery, by name."""
        cursor = self.connection.execute(
            "select * from webhook.effects where delivery_id = %s", (identifier,)
        )
        names = [column.name for column in cursor.description or ()]
        return {row[1]: dict(zip(names, row, strict=True)) for row in cursor.fetchall()}

    def wait_state(self, identifier: int, *states: str, seconds: float = 120.0) -> dict[str, Any]:
        """The delivery once it is in one of `states`."""
        try:
            wait_for(lambda: self.delivery(identifier)["state"] in states, "", seconds)
        except AssertionError:
            found = self.delivery(identifier)
            raise AssertionError(
                f"delivery is {found['state']}, not {states}: {found['last_error']}\n{self.effects(identifier)}"
            ) from None
        return self.delivery(identifier)

    def hurry(self) -> None:
        """Make every waiting delivery due now: tests don't wait for backoffs."""
        self.connection.execute(
            "update webhook.deliveries set next_attempt_at = now() "
            "where state in ('retry', 'parked') and next_attempt_at > now()"
        )
        self.connection.execute("notify webhook_deliveries")

    def entries(self, probe: bool = False) -> list[dict[str, str]]:
        """The stream."""
        name = f"{self.stream}:probe" if probe else self.stream
        return [fields for _, fields in self.redis.xrange(name)]  # type: ignore[union-attr]

    def objects(self) -> dict[str, bytes]:
        """All that stands in the bucket."""
        if not self.minio.bucket_exists(self.bucket):
            return {}
        found = {}
        for entry in self.minio.list_objects(self.bucket, recursive=True):
            response = self.minio.get_object(self.bucket, entry.object_name)
            found[str(entry.object_name)] = response.read()
            response.close()
            response.release_conn()
        return found

    @contextmanager
    def worker(self, **changes: str) -> Iterator[Worker]:
        """A worker in this process."""
        worker = Worker(self.settings(**changes), self.tmp_path / f"heartbeat-{uuid.uuid4().hex[:6]}")
        thread = threading.Thread(target=worker.run, name="worker")
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(120)
            assert not thread.is_alive(), "the worker did not stop"

    def spawn(self, **changes: str) -> subprocess.Popen[bytes]:
        """A worker in a process of its own."""
        environment = {**os.environ, "PYTHONPATH": str(REPO / "webhook"), **self.environ(**changes)}
        heartbeat = str(self.tmp_path / "heartbeat")
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, heartbeat],
            env=environment,
            stderr=subprocess.DEVNULL,
            cwd=self.tmp_path,
        )


@contextmanager
def process(bench: Lab, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker's process, killed at the end if it still runs."""
    child = bench.spawn(**changes)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(10)


@contextmanager
def lab(superuser_url: str, redis_url: str, s3: Bucket, tmp_path: Path) -> Iterator[Lab]:
    """A migrated database without the bot's tables, removed at the end."""
    with migrated_database(superuser_url) as url:
        made = Lab(url, redis_url, s3, tmp_path)
        try:
            yield made
        finally:
            made.close()
