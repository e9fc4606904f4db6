"""The command line: exit codes, messages that help, and no tracebacks."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from nacl.signing import SigningKey
from webhook_api.auth import FalVerifier, KeyStore, SecretVerifier
from webhook_api.auth.keys import FileSource
from webhook_api.cli import main
from webhook_api.config import Settings

from tests.support.falfake import ACCOUNT, SECRET, jwks, signed


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    clean = {
        name: None for name in os.environ if name.startswith(("DATABASE", "REDIS", "MINIO", "FAL", "WEBHOOK"))
    }
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={**clean, **(env or {})})


@contextmanager
def server(status: int, body: bytes) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that answers everything alike and remembers what it got."""
    got: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(
                {
                    "headers": dict(self.headers),
                    "body": self.rfile.read(int(self.headers["Content-Length"] or 0)),
                }
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = False
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", got
    finally:
        made.shutdown()
        made.server_close()
        thread.join(5)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    assert run("keys", "generate", "--out", path).exit_code == 0
    return path


@pytest.mark.parametrize("command", ["serve", "worker", "migrate", "config"])
def test_a_bad_configuration_is_78_and_names_all_faults(command: str) -> None:
    result = run(command, env={"PORT": "x", "LOG_LEVEL": "y"})
    assert result.exit_code == 78
    for name in ("DATABASE_URL", "PORT", "LOG_LEVEL"):
        assert name in result.stderr
    assert "Traceback" not in result.output


def test_trace_with_a_bad_configuration_is_78() -> None:
    assert run("trace", "r-1").exit_code == 78


def test_migrate_without_a_server_is_69() -> None:
    result = run("migrate", env={"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/d"})
    assert result.exit_code == 69
    assert "cannot be reached" in result.stderr
    assert "hunter2" not in result.output


def test_health_of_the_api() -> None:
    with server(200, b'{"status":"healthy"}') as (url, _):
        assert run("health", "--url", url).exit_code == 0
    with server(503, b'{"status":"unhealthy"}') as (url, _):
        result = run("health", "--url", url)
        assert result.exit_code == 1
        assert "unhealthy" in result.stdout
    assert run("health", "--url", "http://127.0.0.1:1/health").exit_code == 69
    assert run("health", "--url", "file:///etc/passwd").exit_code == 2


def test_health_of_the_worker(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    assert run("health", "--worker", "--heartbeat", beat).exit_code == 1
    beat.touch()
    assert run("health", "--worker", "--heartbeat", beat).exit_code == 0
    old = time.time() - 31
    os.utime(beat, (old, old))
    result = run("health", "--worker", "--heartbeat", beat)
    assert result.exit_code == 1
    assert "stuck" in result.stderr


def test_a_key_is_private_and_never_overwritten(tmp_path: Path, key_file: Path) -> None:
    assert key_file.stat().st_mode & 0o777 == 0o600
    before = key_file.read_text()
    assert run("keys", "generate", "--out", key_file).exit_code == 1
    assert key_file.read_text() == before
    assert run("keys", "generate", "--out", tmp_path / "no" / "dir").exit_code == 1


def test_the_jwks_verifies_what_the_key_signs(tmp_path: Path, key_file: Path) -> None:
    out = tmp_path / "jwks.json"
    assert run("keys", "jwks", "--key-file", key_file, "--out", out).exit_code == 0
    key = SigningKey(bytes.fromhex(key_file.read_text().strip()))
    assert json.loads(out.read_text()) == json.loads(jwks(key))
    assert key_file.read_text().strip() not in out.read_text()


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no-key"
    path.write_text("hello")
    result = run("keys", "jwks", "--key-file", path)
    assert result.exit_code == 1
    assert "64 hexadecimal digits" in result.stderr


def test_send_signs_as_fal_does(tmp_path: Path, key_file: Path) -> None:
    out = tmp_path / "jwks.json"
    run("keys", "jwks", "--key-file", key_file, "--out", out)
    with server(200, b"{}") as (url, got):
        result = run(
            "send", url, "--key-file", key_file, "--user-id", ACCOUNT, "--count", "5", "--concurrency", "3"
        )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len({line["request_id"] for line in lines}) == 5
    verifier = FalVerifier(KeyStore(FileSource(out)), frozenset({ACCOUNT}))
    for request in got:
        assert verifier.verify(verifier.claims(request["headers"]), request["body"]).account_id == ACCOUNT


def test_send_uses_the_secret_for_the_bots_own_bodies(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET + "\n")
    with server(200, b"{}") as (url, got):
        result = run("send", url, "--shape", "old-completed", "--secret-file", secret, "--request-id", "r-1")
    assert result.exit_code == 0
    assert SecretVerifier(SECRET).claims(got[0]["headers"]).source == "manual"
    assert json.loads(got[0]["body"])["request_id"] == "r-1"
    assert SECRET not in result.output


def test_send_tells_answers_apart(key_file: Path) -> None:
    with server(401, b'{"error":"bad_signature"}') as (url, _):
        assert run("send", url, "--shape", "forged").exit_code == 0
        assert run("send", url, "--key-file", key_file).exit_code == 1
        assert run("send", url, "--key-file", key_file, "--expect", "401").exit_code == 0
    result = run("send", "http://127.0.0.1:1/", "--key-file", key_file)
    assert result.exit_code == 69
    assert json.loads(result.stdout)["http_status"] is None


@pytest.mark.parametrize("arguments", [[], ["ftp://x"], ["http://x", "--shape", "nonsense"], ["http://x"],
                                       ["http://x", "--shape", "old-completed"], ["http://x", "--count", "0"]])  # fmt: skip
def test_send_used_wrongly_is_2(arguments: list[str]) -> None:
    result = run("send", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_shapes_are_listed() -> None:
    result = run("send", "--list")
    assert result.exit_code == 0
    for shape in ("portrait-ok", "style-ok", "error-422", "ok-null-payload", "old-completed", "old-progress",
                  "cancelled", "forged", "stale", "missing-header"):  # fmt: skip
        assert shape in result.stdout


def test_verify_says_which_rule_fails(tmp_path: Path) -> None:
    key = SigningKey.generate()
    (tmp_path / "jwks.json").write_bytes(jwks(key))
    (tmp_path / "body").write_bytes(b'{"a":1}')
    given = signed(key, b'{"a":1}', timestamp=1_700_000_000)
    names = ("--request-id", "--user-id", "--timestamp", "--signature")
    values = [given[name] for name in list(given)[:4]]

    def verify(*more: str, **changes: str) -> Result:
        pairs = dict(zip(names, values, strict=True)) | {
            f"--{name.replace('_', '-')}": v for name, v in changes.items()
        }
        options = [part for pair in pairs.items() for part in pair]
        return run(
            "verify", "--jwks", tmp_path / "jwks.json", "--body-file", tmp_path / "body", *options, *more
        )

    assert verify().exit_code == 0
    assert json.loads(verify("--now", "1700000400").stdout)["reason"] == "stale"
    assert json.loads(verify(user_id="other").stdout)["reason"] == "bad_signature"
    assert json.loads(verify(timestamp="soon").stdout)["reason"] == "malformed_header"
    (tmp_path / "body").write_bytes(b'{"a": 1}')
    result = verify()
    assert (result.exit_code, json.loads(result.stdout)["reason"]) == (1, "bad_signature")


def test_config_shows_every_setting_but_no_secret() -> None:
    from tests.unit.webhook.test_config import GOOD

    result = run("config", env=GOOD)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["port"] == 8000
    assert not {"database_url", "minio_secret_key", "fal_webhook_secret", "redis_password"} & set(shown)
    assert set(shown) < set(Settings.__slots__)
    for secret in ("pw", "s3-secret-key", GOOD["FAL_WEBHOOK_SECRET"]):
        assert secret not in result.stdout
