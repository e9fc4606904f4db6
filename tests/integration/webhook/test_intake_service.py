"""The API as a process, between real backends that are taken away in each of the ways in which backends go away."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import urllib3
from minio import Minio
from nacl.signing import SigningKey

from tests.support.apiservice import PACKAGE, PATH, PATIENCE, ApiService, running
from tests.support.databases import migrated_database, with_address
from tests.support.falfake import ACCOUNT, SECRET, JwksServer, delivery, jwks_server, new_key
from tests.support.gate import Gate, gate

pytestmark = pytest.mark.backends
LIMIT = 200_000
IN_TIME = "2.0"
"""Seconds in which the sender has its answer, whatever is down: a bucket of the service's histogram."""


@dataclass
class Lab:
    """A service and what stands around it."""

    service: ApiService
    key: SigningKey
    jwks: JwksServer
    postgres: Gate
    redis: Gate
    url: str

    def send(
        self, request_id: str | None = None, shape: str = "portrait-ok"
    ) -> tuple[int, dict[str, Any], float]:
        sent = delivery(shape, self.key, request_id=request_id)
        status, document, seconds, headers = self.service.post(sent.body, sent.headers)
        if status == 503:
            assert int(headers["Retry-After"]) > 0
        return status, document, seconds

    def accept(self, request_id: str | None = None, shape: str = "portrait-ok") -> dict[str, Any]:
        """Send until it is taken, as fal does; what was answered then."""
        sent = delivery(shape, self.key, request_id=request_id)
        status, document, _, _ = self.service.deliver(sent.body, sent.headers)
        assert status == 200, document
        return document

    def rows(self, query: str = "select request_id from webhook.deliveries") -> list[Any]:
        with psycopg.connect(self.url) as connection:
            return [row[0] for row in connection.execute(query.encode())]

    def recovers(self, seconds: float = PATIENCE) -> None:
        self.service.wait_for(lambda: self.send()[0] == 200, "deliveries are taken again", seconds)


@dataclass
class Parts:
    """What makes a Lab, for tests that start the service themselves."""

    environment: dict[str, str]
    key: SigningKey
    jwks: JwksServer
    postgres: Gate
    redis: Gate
    url: str

    def lab(self, service: ApiService) -> Lab:
        return Lab(service, self.key, self.jwks, self.postgres, self.redis, self.url)


@pytest.fixture(scope="session")
def bucket(s3: Any) -> str:
    client = Minio(
        s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False, region="us-east-1"
    )
    if not client.bucket_exists(s3.bucket):
        client.make_bucket(s3.bucket)
    client._http.clear()
    return str(s3.bucket)


@pytest.fixture
def parts(database_url: str, redis_url: str, s3: Any, bucket: str, tmp_path: Path) -> Iterator[Parts]:
    with made_parts(database_url, redis_url, s3, bucket, tmp_path) as made:
        yield made


@contextmanager
def made_parts(database_url: str, redis_url: str, s3: Any, bucket: str, directory: Path) -> Iterator[Parts]:
    """A database, keys and gates of its own, for as long as somebody wants them."""
    address, key = urlsplit(redis_url), new_key()
    (directory / "secret").write_text(SECRET)
    with migrated_database(database_url) as url, jwks_server(key) as keys:
        server = urlsplit(url)
        with (
            gate(server.hostname or "", server.port or 5432) as postgres,
            gate(address.hostname or "", address.port or 6379) as redis,
        ):
            environment = {
                "DATABASE_URL": with_address(url, "127.0.0.1", postgres.port),
                "REDIS_URL": with_address(redis_url, "127.0.0.1", redis.port),
                "MINIO_ENDPOINT": s3.endpoint, "MINIO_ACCESS_KEY": s3.access_key, "MINIO_SECRET_KEY": s3.secret_key,
                "MINIO_BUCKET_NAME": bucket, "FAL_WEBHOOK_SECRET_FILE": str(directory / "secret"),
                "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_URL": keys.url, "ENVIRONMENT": "test",
                "FAL_JWKS_CACHE_FILE": str(directory / "jwks-cache.json"),
                "WEBHOOK_BODY_LIMIT_BYTES": str(LIMIT), "INSTANCE_ID": "it-1", "WEBHOOK_VERSION": "v1",
            }  # fmt: skip
            yield Parts(environment, key, keys, postgres, redis, url)


@pytest.fixture
def lab(parts: Parts, tmp_path: Path) -> Iterator[Lab]:
    with running(parts.environment, tmp_path / "api.log") as service:
        service.wait_health("healthy")
        yield parts.lab(service)


def at_once(lab: Lab, count: int) -> list[tuple[int, dict[str, Any], float]]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: lab.send(), range(count)))


def accept_at_once(lab: Lab, count: int) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: lab.accept(), range(count)))


def test_a_hundred_copies_at_once_are_one_row(lab: Lab) -> None:
    sent = delivery("portrait-ok", lab.key, request_id="same")
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: lab.service.deliver(sent.body, sent.headers), range(100)))
    assert {answer[0] for answer in answers} == {200}
    (attempts,) = lab.rows("select attempts from webhook.deliveries")
    assert 100 <= attempts <= 100 + len(lab.service.resent)


def test_forged_deliveries_leave_nothing(lab: Lab) -> None:
    for shape in (
        "forged",
        "tampered",
        "missing-header",
        "wrong-secret",
        "unauthenticated",
        "other-account",
    ):
        assert lab.send(shape=shape)[0] in {401, 403}
    assert lab.rows() == []


def test_a_database_that_refuses_is_a_503_in_time(lab: Lab) -> None:
    lab.accept()
    lab.postgres.cut()
    for status, document, _ in at_once(lab, 40):
        assert status == 503, document
    lab.service.answered_within(IN_TIME)
    lab.service.wait_health("unhealthy")
    lab.postgres.open()
    lab.recovers()
    lab.service.wait_health("healthy")


def test_a_database_that_is_silent_is_a_503_in_time(lab: Lab) -> None:
    lab.accept()
    lab.postgres.silence()
    for _ in range(3):
        for status, document, _ in at_once(lab, 40):
            assert status == 503, document
    lab.service.answered_within(IN_TIME)
    lab.service.wait_health("unhealthy")
    lab.postgres.open()
    lab.recovers()
    lab.service.wait_health("healthy")


def test_a_table_that_is_locked_is_a_503_in_time(lab: Lab) -> None:
    with psycopg.connect(lab.url) as blocker:
        blocker.execute("lock table webhook.deliveries in access exclusive mode")
        for status, document, _ in at_once(lab, 20):
            # On a busy machine the deadline may come before the lock's own bound.
            assert status == 503
            assert document["error"] in {"locked", "timeout"}
    lab.service.answered_within(IN_TIME)
    lab.recovers()


def test_a_database_without_writes_or_schema_says_so(lab: Lab) -> None:
    lab.accept()
    with psycopg.connect(lab.url, autocommit=True) as admin:
        admin.execute("alter schema webhook rename to elsewhere")
        assert lab.send()[1]["error"] == "not_migrated"
        assert lab.service.wait_health("unhealthy")["checks"]["database"]["error"] in {
            "not_migrated",
            "last_store_failed",
        }
        admin.execute("alter schema elsewhere rename to webhook")
        lab.recovers()
        name = urlsplit(lab.url).path[1:]
        admin.execute(f'alter database "{name}" set default_transaction_read_only = on'.encode())
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        lab.service.wait_for(lambda: lab.send()[1].get("error") == "read_only", "the refusal says read_only")
        admin.execute("set default_transaction_read_only = off")
        admin.execute(f'alter database "{name}" reset default_transaction_read_only'.encode())
        admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
    lab.recovers()


def test_redis_is_not_in_the_way(lab: Lab) -> None:
    lab.redis.silence()
    document = lab.service.wait_health("degraded")
    assert not document["checks"]["redis"]["ok"]
    assert document["checks"]["database"]["ok"]
    assert lab.service.get("/health")[0] == 200
    lab.accept()
    lab.redis.open()
    lab.service.wait_health("healthy")


def test_health_is_fast_whatever_hangs(lab: Lab) -> None:
    lab.postgres.silence()
    lab.redis.silence()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        lab.service.get("/health")
    lab.service.wait_health("unhealthy")
    lab.service.answered_within("0.5", "status.health")


def test_it_starts_without_its_database_and_takes_deliveries_when_it_comes(
    parts: Parts, tmp_path: Path
) -> None:
    parts.postgres.cut()
    with running(parts.environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        assert service.get("/health")[0] == 503
        assert lab.send()[0] == 503
        parts.postgres.open()
        lab.recovers()
        service.wait_health("healthy")


def test_unknown_keys_are_a_503_and_known_ones_survive_a_restart(parts: Parts, tmp_path: Path) -> None:
    parts.jwks.status = 500
    with running(parts.environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        status, document, _ = lab.send()
        assert (status, document["error"]) == (503, "keys_unknown")
        lab.accept(shape="old-completed")
        assert service.wait_health("degraded")["checks"]["keys"] == {
            "ok": False,
            "keys": 0,
            "error": "status",
        }
    parts.jwks.status = 200
    with running(parts.environment, tmp_path / "api.log") as service:
        parts.lab(service).accept()
    parts.jwks.status = 500
    with running(parts.environment, tmp_path / "api.log") as service:
        parts.lab(service).accept()


def raw(lab: Lab, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", lab.service.port), timeout=10) as connection:
        connection.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            part = connection.recv(65536)
            if not part:
                break
            answer += part
        return answer


def chunked(body: bytes) -> bytes:
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: {SECRET}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    pieces = [body[start : start + 8192] for start in range(0, len(body), 8192)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_a_chunked_body_is_taken_whole_or_not_at_all(lab: Lab) -> None:
    small = b'{"request_id":"chunked","status":"queued"}'
    assert raw(lab, chunked(small)).startswith(b"HTTP/1.1 200")
    # Cut at the limit this would be valid JSON.
    assert raw(lab, chunked(small.replace(b"chunked", b"cut") + b" " * LIMIT)).startswith(b"HTTP/1.1 413")
    assert lab.rows() == ["chunked"]


@pytest.mark.parametrize("header", ["X-Webhook-Secret: wrong", "X-Other: x", "Content-Encoding: gzip"])
def test_a_refused_sender_of_a_large_body_hears_why(parts: Parts, tmp_path: Path, header: str) -> None:
    environment = {**parts.environment, "WEBHOOK_BODY_LIMIT_BYTES": str(10_000_000)}
    with running(environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        for size in (5_000_000, 9_000_000, 12_000_000):
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: {size}\r\n\r\n"
            # A reset while it is sent or read fails the test.
            assert raw(lab, head.encode() + b"x" * size).split()[1] in {b"401", b"413", b"415"}


def test_a_sender_that_hangs_up_leaves_nothing(lab: Lab) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: {SECRET}\r\nContent-Length: 500\r\n\r\n"
    with socket.create_connection(("127.0.0.1", lab.service.port), timeout=10) as connection:
        connection.sendall(head.encode() + b'{"request_id":"half","status":"queued"}')
    lab.accept()
    assert "half" not in lab.rows()


def test_what_was_answered_200_survives_a_kill(lab: Lab) -> None:
    accepted: list[str] = []
    stop = threading.Event()

    def sender() -> None:
        while not stop.is_set():
            request_id = str(uuid.uuid4())
            try:
                if lab.send(request_id)[0] == 200:
                    accepted.append(request_id)
            except urllib3.exceptions.HTTPError:
                stop.wait(0.01)

    threads = [threading.Thread(target=sender) for _ in range(8)]
    for thread in threads:
        thread.start()
    lab.service.wait_for(lambda: len(accepted) > 100, "deliveries are under way")
    lab.service.kill_all()
    stop.set()
    for thread in threads:
        thread.join(20)
    assert set(accepted) <= set(lab.rows())
    lab.service.start()
    lab.recovers()
    assert lab.accept(accepted[0])["duplicate"]


def test_a_stop_finishes_what_is_under_way(lab: Lab) -> None:
    with psycopg.connect(lab.url) as blocker, ThreadPoolExecutor(1) as pool:
        blocker.execute("lock table webhook.deliveries in exclusive mode")
        answer = pool.submit(lab.send, "slow")
        with psycopg.connect(lab.url, autocommit=True) as watch:
            lab.service.wait_for(
                lambda: watch.execute(
                    "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
                ).fetchone(),
                "the insert waits",
            )
        assert lab.service.process is not None
        lab.service.process.send_signal(signal.SIGTERM)
        blocker.rollback()
        assert answer.result(10)[0] == 200
    assert lab.service.stop() == 0
    assert lab.rows() == ["slow"]


def test_logs_are_json_and_tell_no_secret(lab: Lab) -> None:
    for shape in ("portrait-ok", "old-failed", "forged", "not-json"):
        lab.send(shape=shape)
    lab.service.stop()
    lines = [json.loads(line) for line in lab.service.log.read_text().splitlines()]
    assert {"delivery_stored", "delivery_refused", "delivery_kept_aside"} <= {line["event"] for line in lines}
    stored = [line for line in lines if line["event"] == "delivery_stored"]
    assert all(line["request_id"] and line["instance"] == "it-1" for line in stored)
    text = lab.service.log.read_text()
    for secret in (SECRET, "media.test", "CUDA out of memory"):
        assert secret not in text


def test_several_processes_count_together(parts: Parts, tmp_path: Path) -> None:
    environment = {**parts.environment, "WEBHOOK_WORKERS": "2", "TMPDIR": str(tmp_path)}
    with running(environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        lab.recovers()
        accept_at_once(lab, 20)

        def count() -> float:
            lines = str(service.get("/metrics")[1]).splitlines()
            return sum(
                float(line.split()[-1]) for line in lines if line.startswith("webhook_deliveries_total")
            )

        assert count() == 21


def test_the_status_page_counts(lab: Lab) -> None:
    lab.accept()
    lab.send(shape="not-json")
    document = lab.service.get("/api/v1/webhook/status")[1]
    assert document["inbox"]["states"] == {
        "pending": 1,
        "leased": 0,
        "retry": 0,
        "parked": 0,
        "dead": 0,
        "aside": 1,
    }
    assert document["accounts"] == "pinned"


def command(parts: Parts, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), **parts.environment}
    return subprocess.run(
        [sys.executable, "-m", "webhook_api", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_trace_follows_and_removes_only_probes(parts: Parts, lab: Lab) -> None:
    probe, real = f"probe-{uuid.uuid4()}", str(uuid.uuid4())
    for request_id in (probe, real):
        lab.accept(request_id)
    shown = command(parts, "trace", probe, "--json")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert (document["found"], document["deliveries"][0]["state"]) == (True, "pending")
    assert f"request {real}" in command(parts, "trace", real).stdout

    refused = command(parts, "trace", real, "--remove")
    assert refused.returncode == 1
    assert "only probes" in refused.stderr
    removed = command(parts, "trace", probe, "--remove", "--json")
    assert removed.returncode == 0, removed.stderr
    assert json.loads(removed.stdout)["removed"]["deliveries"] == 1
    assert lab.rows() == [real]

    gone = command(parts, "trace", probe, "--json")
    assert gone.returncode == 1
    assert json.loads(gone.stdout)["found"] is False
    parts.postgres.cut()
    away = command(parts, "trace", real)
    assert away.returncode == 69
    for result in (refused, gone, away):
        assert "Traceback" not in result.stderr


def test_trace_waits_and_removes_a_probe_that_nobody_works_on(parts: Parts, lab: Lab) -> None:
    held, probe, real = f"probe-{uuid.uuid4()}", f"probe-{uuid.uuid4()}", str(uuid.uuid4())
    for request_id in (held, probe, real):
        lab.accept(request_id)
    early = command(parts, "trace", real, "--wait", "0.3", "--json")
    assert (early.returncode, json.loads(early.stdout)["found"]) == (1, True)
    assert "not done everywhere after 0.3 s" in early.stderr
    removed = command(parts, "trace", probe, "--wait", "0.3", "--remove", "--json")
    assert removed.returncode == 0, removed.stderr
    document = json.loads(removed.stdout)
    assert (document["deliveries"][0]["state"], document["removed"]["deliveries"]) == ("pending", 1)

    with psycopg.connect(lab.url) as holder:
        holder.execute(
            "update webhook.deliveries set state = 'leased', lease_owner = 'w', lease_until = now() + interval '1 min' "
            "where request_id = %s",
            (held,),
        )
    busy = command(parts, "trace", held, "--wait", "0.3", "--remove", "--json")
    assert busy.returncode == 1
    assert "a worker holds" in busy.stderr
    document = json.loads(busy.stdout)
    assert (document["deliveries"][0]["state"], "removed" in document) == ("leased", False)
    refused = command(parts, "trace", real, "--wait", "30", "--remove", "--json")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert sorted(lab.rows()) == sorted([held, real])


def test_migrate_command_says_what_it_did(parts: Parts) -> None:
    done = command(parts, "migrate")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["applied"] == []
