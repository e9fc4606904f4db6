"""`webhook-api doctor` and `migrate` between real backends: well, and wrong in each way that it claims to notice."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import psycopg
import pytest
from nacl.signing import SigningKey
from psycopg.conninfo import make_conninfo
from webhook_api.doctor import Finding, examine, ok

from tests.support.console import document, typed
from tests.support.falfake import ACCOUNT, SECRET, jwks
from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends


@pytest.fixture
def env(bench: Lab, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "jwks.json").write_bytes(jwks(SigningKey.generate()))
    (tmp_path / "cache").mkdir()
    bench.minio.make_bucket(bench.bucket)
    return {
        **bench.environ(), "FAL_JWKS_FILE": str(tmp_path / "jwks.json"), "FAL_WEBHOOK_SECRET": SECRET,
        "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_CACHE_FILE": str(tmp_path / "cache" / "jwks.json"), "PORT": "1",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run beside others on a busy machine."""
    monkeypatch.setattr("webhook_api.doctor.SECONDS", 60.0)


def examined(env: dict[str, str], *options: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit code, and the findings by check."""
    result = typed(env, "doctor", "--json", *options)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(result.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
        assert finding["remedy"] or finding["verdict"] in {"ok", "skip"}, finding
    return result.exit_code, found


def verdicts(found: dict[str, list[dict[str, Any]]], check: str) -> set[str]:
    return {finding["verdict"] for finding in found[check]}


def said(found: dict[str, list[dict[str, Any]]], check: str, verdict: str) -> str:
    return "\n".join(item["message"] for item in found[check] if item["verdict"] == verdict)


@contextmanager
def connected_worker(bench: Lab) -> Iterator[None]:
    """A worker that the database knows of: starting takes its time."""
    with bench.worker():
        wait_for(
            lambda: bench.connection.execute(
                "select 1 from pg_stat_activity where application_name like 'webhook-worker %listener' "
                "and datname = current_database()"
            ).fetchone(),
            "the worker's listener",
            60,
        )
        yield


def test_a_site_that_is_well(bench: Lab, env: dict[str, str]) -> None:
    with connected_worker(bench):
        code, found = examined(env)
    assert code == 0, found
    for check in ("database", "schema", "rights", "deliveries", "worker", "clock", "redis", "stream", "object store",
                  "keys", "disk"):  # fmt: skip
        assert "fail" not in verdicts(found, check), found[check]
        assert "ok" in verdicts(found, check), found[check]
    assert not [key for key in bench.objects() if key.startswith("doctor/")], "it leaves nothing behind"
    text = typed(env, "doctor").stdout
    assert "->" in text
    for secret in (SECRET, bench.s3.secret_key):
        assert secret not in text


def test_what_is_stuck_is_named(bench: Lab, env: dict[str, str]) -> None:
    for number, change in enumerate(
        ("next_attempt_at = now() - interval '20 minutes'",
         "state = 'leased', lease_owner = 'w', lease_until = now() - interval '1 hour'",
         "state = 'dead'", "state = 'dead', aside = 'stale'", "state = 'dead', discarded_at = now()")
    ):  # fmt: skip
        identifier = bench.deliver({"request_id": f"r-{number}"}, "completed")
        bench.connection.execute(f"update webhook.deliveries set {change} where id = %s", (identifier,))  # type: ignore[call-overload]
    bench.redis.xadd(bench.stream, {"a": "b"})
    code, found = examined(env)
    assert code == 1
    assert "due for" in said(found, "deliveries", "fail")
    warnings = said(found, "deliveries", "warn")
    assert "1 lease" in warnings
    assert "1 dead letter" in warnings, "neither what was kept aside nor what was discarded is one"
    assert "1 authentic" in warnings
    assert "no worker" in said(found, "worker", "fail")
    assert "no consumer group" in said(found, "stream", "warn")


def test_rights_and_schema(bench: Lab, env: dict[str, str]) -> None:
    role = f"limited_{bench.bucket[-8:]}"
    run = bench.connection.execute
    run(f"create role {role} login password 'x'")  # type: ignore[call-overload]
    try:
        run(
            f"grant usage on schema webhook to {role}; grant select on all tables in schema webhook to {role}"
        )  # type: ignore[call-overload]
        run(f"grant select on public.avatars to {role}; grant update (status) on public.avatars to {role}")  # type: ignore[call-overload]
        limited = {**env, "DATABASE_URL": make_conninfo(bench.database_url, user=role, password="x")}
        code, found = examined(limited)
        assert code == 1
        lacking = said(found, "rights", "fail")
        assert "insert" in lacking
        assert "webhook.deliveries" in lacking
        assert "training_progress" in lacking
        assert "status," not in lacking
    finally:
        run(f"drop owned by {role}; drop role {role}")  # type: ignore[call-overload]
    last = run("delete from webhook.schema_migrations where version = (select max(version) from webhook.schema_migrations) "
               "returning name").fetchone()  # fmt: skip
    run("drop table avatars")
    code, found = examined(env)
    assert (code, last is not None and last[0] in said(found, "schema", "fail")) == (1, True)
    assert "public.avatars is not there" in said(found, "rights", "fail")


def test_each_backend_that_is_away_has_its_own_verdict(
    bench: Lab, env: dict[str, str], tmp_path: Path
) -> None:
    away = {
        **env, "DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1/0",
        "MINIO_ENDPOINT": "127.0.0.1:1", "FAL_JWKS_CACHE_FILE": str(tmp_path / "nowhere" / "jwks.json"),
        "SPOOL_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    away.pop("FAL_JWKS_FILE")
    started = time.monotonic()
    code, found = examined({**away, "FAL_JWKS_URL": "http://127.0.0.1:1/jwks"})
    assert time.monotonic() - started < 40
    assert code == 1
    for check in ("database", "redis", "object store", "keys", "disk"):
        assert "fail" in verdicts(found, check), check
    for check in ("schema", "rights", "deliveries", "worker", "clock", "stream"):
        assert verdicts(found, check) == {"skip"}, check
    assert "hunter2" not in json.dumps(found)


@contextmanager
def clock_server(shift: float) -> Iterator[str]:
    """A key server whose clock is wrong."""
    document = jwks(SigningKey.generate())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", formatdate(time.time() + shift, usegmt=True))
            self.send_header("Content-Length", str(len(document)))
            self.end_headers()
            self.wfile.write(document)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/jwks.json"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "ok"), (-20.0, "warn"), (120.0, "fail")])
def test_a_wrong_clock_is_told(bench: Lab, env: dict[str, str], shift: float, verdict: str) -> None:
    env = {name: value for name, value in env.items() if name != "FAL_JWKS_FILE"}
    with clock_server(shift) as url:
        _, found = examined({**env, "FAL_JWKS_URL": url})
    assert {item["verdict"] for item in found["clock"] if "127.0.0.1" in item["message"]} == {verdict}


def test_a_check_that_hangs_or_breaks_costs_its_own_verdict_only(bench: Lab, env: dict[str, str]) -> None:
    release = threading.Event()

    def hangs(_: Any) -> list[Finding]:
        release.wait(60)
        return []

    def breaks(_: Any) -> list[Finding]:
        raise RuntimeError("a defect")

    checks = [("hangs", hangs), ("breaks", breaks), ("works", lambda _: [ok("works", "well")])]
    try:
        findings = examine(bench.settings(), checks, seconds=5)
    finally:
        release.set()
    assert [(item.check, item.verdict.value) for item in findings] == [
        ("hangs", "fail"), ("breaks", "fail"), ("works", "ok"),
    ]  # fmt: skip
    assert all(item.remedy for item in findings[:2])


def test_warnings_count_when_asked(bench: Lab, env: dict[str, str]) -> None:
    with connected_worker(bench):
        assert typed(env, "doctor").exit_code == 0
        assert typed(env, "doctor", "--strict").exit_code == 1, "the environment is called test"


def test_bad_settings_are_78() -> None:
    assert typed({"PORT": "x"}, "doctor").exit_code == 78


def test_migrate_says_where_the_schema_stands(bench: Lab, env: dict[str, str]) -> None:
    now = document(env, "migrate", "--status")
    assert (now["missing"], now["version"]) == ([], now["packaged"])
    bench.connection.execute("drop schema webhook cascade")
    result = typed(env, "migrate", "--status", "--json")
    assert (result.exit_code, json.loads(result.stdout)["version"]) == (1, 0)
    assert len(document(env, "migrate", "--dry-run")["missing"]) == now["packaged"]
    with psycopg.connect(bench.database_url) as connection:
        assert connection.execute("select to_regclass('webhook.deliveries')").fetchone() == (None,)
    assert document(env, "migrate")["version"] == now["packaged"]
    assert document(env, "migrate")["applied"] == []
