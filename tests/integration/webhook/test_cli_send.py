"""`webhook-api send` against a real service: every shape gets the answer that its list promises, and leaves its row."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from nacl.signing import SigningKey
from webhook_api.shapes import SHAPES

from tests.support.apiservice import PATH, ApiService, running
from tests.support.console import lines, typed
from tests.support.databases import migrated_database
from tests.support.falfake import ACCOUNT, SECRET, jwks

pytestmark = pytest.mark.backends


@dataclass
class Sending:
    """A service, and the files that `send` reads."""

    service: ApiService
    database: str
    files: Path

    def send(self, shape: str, *options: str | int) -> tuple[int, list[dict[str, Any]]]:
        path = "/api/v1/sources/replicate" if SHAPES[shape].needs == "standard" else PATH
        result = typed(
            {}, "send", self.service.url + path, "--shape", shape, "--key-file", self.files / "key",
            "--secret-file", self.files / "secret", "--standard-secret-file", self.files / "standard",
            "--user-id", ACCOUNT, *options,
        )  # fmt: skip
        assert result.exit_code in {0, 1}, f"{shape}: {result.output}"
        return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()]

    def rows(self, query: str) -> list[Any]:
        with psycopg.connect(self.database) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def sending(
    database_url: str, redis_url: str, s3: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sending]:
    files, key = tmp_path_factory.mktemp("send"), SigningKey.generate()
    (files / "key").write_text(bytes(key).hex())
    (files / "secret").write_text(SECRET)
    (files / "jwks.json").write_bytes(jwks(key))
    (files / "standard").write_text("whsec_" + base64.b64encode(b"k" * 32).decode() + "\n")
    sender = {"scheme": "standard", "shape": "replicate", "secrets": [{"file": str(files / "standard")}]}
    with migrated_database(database_url) as url:
        environment = {
            "DATABASE_URL": url, "REDIS_URL": redis_url, "MINIO_ENDPOINT": s3.endpoint,
            "MINIO_ACCESS_KEY": s3.access_key, "MINIO_SECRET_KEY": s3.secret_key, "MINIO_BUCKET_NAME": s3.bucket,
            "FAL_WEBHOOK_SECRET_FILE": str(files / "secret"), "FAL_ACCOUNT_IDS": ACCOUNT, "ENVIRONMENT": "test",
            "FAL_JWKS_FILE": str(files / "jwks.json"), "WEBHOOK_SOURCES": json.dumps({"replicate": sender}),
        }  # fmt: skip
        with running(environment, files / "api.log") as service:
            yield Sending(service, url, files)


def test_every_shape_gets_the_answer_that_is_listed(sending: Sending) -> None:
    listed = lines({}, "send", "--list")
    assert {item["shape"] for item in listed} == set(SHAPES)
    for item in listed:
        code, [result] = sending.send(item["shape"])
        assert (code, result["as_expected"]) == (0, True), result
        [[count]] = sending.rows(
            f"select count(*) from webhook.deliveries where request_id = '{result['request_id']}'"
        )
        assert count <= 1
        if result["http_status"] == 200:
            assert result["answer"]["status"] == "received"
            known = sending.rows(
                f"select 1 from webhook.deliveries where id = {result['answer']['delivery_id']}"
            )
            assert known == [(1,)], item
        else:
            assert count == 0, item


@pytest.mark.parametrize(("shape", "rows"), [("duplicates", 1), ("gateway-retry", 1), ("another-result", 12)])
def test_copies_of_one_request(sending: Sending, shape: str, rows: int) -> None:
    code, results = sending.send(shape, "--count", 12, "--concurrency", 6)
    assert code == 0
    [identity] = {result["request_id"] for result in results}
    found = sending.rows(
        f"select sum(attempts), count(*) from webhook.deliveries where request_id = '{identity}'"
    )
    assert found == [(12, rows)]


def test_many_large_bodies_are_not_built_at_once(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they signed long before they are sent."""
    from webhook_api import sender

    built, most, gone = 0, 0, 0
    prepare, send = sender._prepare, sender._plain

    def counting(*arguments: Any) -> Any:
        nonlocal built, most
        built += 1
        most = max(most, built - gone)
        return prepare(*arguments)

    def sent(*arguments: Any) -> Any:
        nonlocal gone
        try:
            return send(*arguments)
        finally:
            gone += 1

    monkeypatch.setattr(sender, "_prepare", counting)
    monkeypatch.setitem(sender._TRANSPORTS, "plain", sent)
    code, results = sending.send("style-ok", "--count", 40, "--concurrency", 2)
    assert (code, len(results), most <= 4) == (0, 40, True)


def test_wrong_files_are_named(tmp_path: Path, sending: Sending) -> None:
    (tmp_path / "bad").write_text("hello")
    url = sending.service.url + PATH
    for option, shape in (("--standard-secret-file", "standard-ok"), ("--key-file", "portrait-ok")):
        result = typed({}, "send", url, "--shape", shape, option, tmp_path / "bad")
        assert result.exit_code == 1
        assert str(tmp_path / "bad") in result.stderr
        assert "hello" not in result.output
    for shape in ("portrait-ok", "old-queued", "standard-ok"):
        assert typed({}, "send", url, "--shape", shape).exit_code == 2
