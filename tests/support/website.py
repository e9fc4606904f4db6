"""The console as it runs in its container, over a database of a test's own; and deliveries of every kind in it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
from webhook_api.audit import Operation
from webhook_api.bodies import dedup_key
from webhook_api.rollups import count
from webhook_api.web import accounts

from tests.support.apiservice import PACKAGE, free_port
from tests.support.falfake import delivery, jwks, new_key
from tests.support.workerlab import bot_tables

PASSWORD = "correct horse battery"
EVIL = "<script>alert(1)</script>\u202egpj.exe\u202c\"'><img src=x onerror=alert(2)>"
KEY = new_key()
"""fal's key, as the console knows it."""
OPERATION = Operation("tester", "test", "accounts.add")


class Inbox:
    """A migrated database, filled as a test needs it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.connection = psycopg.connect(url, autocommit=True)

    def empty(self) -> None:
        """Nothing but the schema."""
        self.connection.execute(
            "truncate webhook.deliveries, webhook.audit, webhook.accounts, webhook.sessions, webhook.api_tokens, "
            "webhook.rollups, webhook.deployments restart identity cascade"
        )
        self.connection.execute("drop table if exists avatars, users")

    def account(self, name: str, role: str) -> None:
        """An account with the password of all."""
        accounts.add(self.connection, name, role, PASSWORD, OPERATION)

    def token(self, name: str, role: str) -> str:
        """A token for the API."""
        return accounts.add_token(self.connection, name, role, OPERATION)

    def deliver(self, request_id: str, status: str = "completed", state: str = "done", *, ago: float = 60.0,
                error: str | None = None, aside: str | None = None, body: Any = None, source: str = "fal",
                headers: dict[str, str] | None = None) -> int:  # fmt: skip
        """A delivery that arrived ``ago`` seconds ago; returns its number."""
        raw = (
            body
            if isinstance(body, bytes)
            else json.dumps(body or {"request_id": request_id, "status": "OK"}).encode()
        )
        digest, seen = hashlib.sha256(raw).hexdigest(), datetime.now(UTC) - timedelta(seconds=ago)
        row = self.connection.execute(
            """
            insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256, headers, state, tries,
                first_seen_at, last_seen_at, last_error, aside, done_at, next_attempt_at)
            values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, now() + interval '1 hour') returning id
            """,
            (source, request_id, dedup_key(status, digest), status, raw, digest, json.dumps(headers or {}), state,
             0 if state == "pending" else 1, seen, seen, error, aside,
             seen + timedelta(seconds=0.4) if state == "done" else None),
        ).fetchone()  # fmt: skip
        assert row is not None
        return int(row[0])

    def effect(
        self, identifier: int, name: str, state: str = "done", error: str | None = None, **detail: Any
    ) -> None:
        """What was done for a delivery."""
        self.connection.execute(
            "insert into webhook.effects (delivery_id, name, state, tries, detail, last_error, updated_at) "
            "select id, %s, %s, 1, %s, %s, coalesce(done_at, last_seen_at) from webhook.deliveries where id = %s",
            (name, state, json.dumps(detail), error, identifier),
        )

    def one(self, sql: str, *values: Any) -> Any:
        """The first value of a query."""
        row = self.connection.execute(sql, values).fetchone()  # type: ignore[call-overload]
        return row[0] if row else None


def show_case(inbox: Inbox) -> dict[str, int]:
    """A day as operators see it, with text of attackers in it; returns the numbers of some deliveries."""
    inbox.account("maria", "operator")
    inbox.account("viktor", "viewer")
    inbox.connection.execute(bot_tables(False, False))  # type: ignore[call-overload]
    for index in range(140):
        failed = index % 17 == 0
        inbox.deliver(f"7f3a{index:04x}-58c1-4d0e-9b1a-{index:012x}", "failed" if failed else "completed",
                      ago=(140 - index) * 600.0)  # fmt: skip
    found = {
        "dead": inbox.deliver("b1946ac9-2f54-4a8e-a7e1-5a1d0c2e7f10", state="dead", ago=5400,
                              error="archive: object_refused: v3.fal.media answered 403"),
        "evil": inbox.deliver("evil-" + EVIL, "failed", "dead", ago=4000, error=f"avatar: {EVIL}",
                              body={"request_id": "evil", "error": EVIL},
                              headers={"X-Evil": EVIL, "X-Webhook-Secret": "s3cr3t"}),
        "aside": inbox.deliver("stale-5d41402a", state="dead", ago=3000, aside="stale", error="signed 3600 s ago"),
        "parked": inbox.deliver("c4ca4238-a0b9-4382-8dcc-509a6f75849b", state="parked", ago=900,
                                error="avatar: not_there: no avatar has this request"),
        "retry": inbox.deliver("eccbc87e-4b5c-42fe-a830-8fd9f2a7baf3", state="retry", ago=300, error="stream: unreachable"),
        "done": _signed(inbox),
    }  # fmt: skip
    avatar, user = str(uuid.uuid4()), uuid.uuid4()
    inbox.connection.execute("insert into users values (%s, '1')", (user,))
    for index, name in enumerate(["Aigerim", EVIL, "Тимур"]):
        inbox.connection.execute(
            "insert into avatars (id, user_id, name, training_type, status, fal_request_id, training_progress, "
            "training_started_at) values (%s, %s, %s, 'portrait', 'training', %s, %s, now() - make_interval(mins => %s))",
            (
                avatar if index == 0 else uuid.uuid4(),
                user,
                name[:100],
                f"req-{index}",
                20 * index,
                9 + 31 * index,
            ),
        )
    inbox.effect(found["done"], "avatar", avatar_id=avatar)
    inbox.effect(
        found["done"],
        "raw_archive",
        key="deliveries/2026/11/29/segment-0001.ndjson",
        offset=0,
        length=512,
        sha256="0" * 64,
    )
    inbox.effect(found["done"], "stream", entry="1-0")
    inbox.effect(
        found["dead"],
        "archive",
        "failed",
        "object_refused: v3.fal.media answered 403",
        reason="object_refused",
    )
    _deployments(inbox)
    for _ in range(30):
        count(inbox.connection, datetime.now(UTC))  # type: ignore[arg-type]
    return found


def _signed(inbox: Inbox) -> int:
    """A result as fal sends it, two minutes ago."""
    request_id = "a87ff679-a2f3-471d-9181-a67b7542122c"
    sent = delivery("portrait-ok", KEY, request_id=request_id, media="https://v3.fal.media")
    kept = {name: value for name, value in sent.headers.items() if name.lower() != "content-type"}
    return inbox.deliver(request_id, ago=1.0, body=sent.body, headers=kept)


def _deployments(inbox: Inbox) -> None:
    for index, result in enumerate(["done", "rolled_back", "done"]):
        inbox.connection.execute(
            "insert into webhook.deployments (id, host, kind, started_at, ended_at, who, from_release, to_release, "
            "result, record) "
            "values (%s, 'webhook-1', 'deploy', now() - make_interval(hours => %s), now() - make_interval(hours => %s, "
            "secs => -41), 'aisha', %s, %s, %s, %s)",
            (f"run-{index}", 30 - index * 9, 30 - index * 9, f"r-{index:03}", f"r-{index + 1:03}", result,
             json.dumps({"reason": EVIL if result == "rolled_back" else None})),
        )  # fmt: skip


@contextmanager
def instances() -> Iterator[str]:
    """Two API instances that say how they are; the value of CONSOLE_INSTANCES."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            document = {
                "status": "healthy", "instance": names[self.server.server_port], "version": "1.0.0",
                "release": "r-003",
                "checks": {"keys": {"ok": True, "age_seconds": 4210}, "spool": {"ok": True, "rows": 0}},
            }  # fmt: skip
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            return

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    names = {server.server_port: f"api-{number}" for number, server in enumerate(servers, start=1)}
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ",".join(f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        server.shutdown()
        server.server_close()


class Website:
    """A running console."""

    def __init__(self, url: str, log: Path, **settings: str) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._log = log
        keys = log.with_suffix(".jwks")
        keys.write_bytes(jwks(KEY))
        self._environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1", "HOST": "127.0.0.1",
            "PORT": str(self.port), "DATABASE_URL": url, "INSTANCE_ID": "console", "TZ": "Asia/Almaty",
            "WEBHOOK_VERSION": "1.0.0", "WEBHOOK_RELEASE": "r-003",
            "FAL_JWKS_FILE": str(keys), **settings,
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait for the health check."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webhook_api", "console"],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def log(self) -> str:
        """What it has logged."""
        return self._log.read_text()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.address + "/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.HTTPError):
            return False


@contextmanager
def website(url: str, log: Path, **settings: str) -> Iterator[Website]:
    """A console for the length of a test."""
    site = Website(url, log, **settings)
    try:
        site.start()
        yield site
    finally:
        site.stop()
