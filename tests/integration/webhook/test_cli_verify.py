"""`webhook-api verify`: what was kept is proven again, wherever it stands, and what was altered is not."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey
from webhook_api.acceptance import kept_headers
from webhook_api.auth.signing import STANDARD_HEADERS, sign
from webhook_api.auth.standard import sign_symmetric

from tests.support.console import lines, typed
from tests.support.falfake import ACCOUNT, jwks, jwks_server
from tests.support.workerlab import Lab

pytestmark = pytest.mark.backends


@pytest.fixture
def bench(bare_bench: Lab) -> Lab:
    return bare_bench


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
def env(bench: Lab, key: SigningKey, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "jwks.json").write_bytes(jwks(key))
    (tmp_path / "whsec").write_text("whsec_" + base64.b64encode(b"k" * 32).decode())
    sender = {"scheme": "standard", "shape": "replicate", "secrets": [{"file": str(tmp_path / "whsec")}]}
    return {
        "DATABASE_URL": bench.database_url, "MINIO_ENDPOINT": bench.s3.endpoint, "MINIO_BUCKET_NAME": bench.bucket,
        "MINIO_ACCESS_KEY": bench.s3.access_key, "MINIO_SECRET_KEY": bench.s3.secret_key, "ENVIRONMENT": "test",
        "FAL_JWKS_FILE": str(tmp_path / "jwks.json"), "WEBHOOK_SOURCES": json.dumps({"replicate": sender}),
    }  # fmt: skip


def keep(
    bench: Lab, key: SigningKey, request_id: str, *, age: int = 0, source: str = "fal", **more: str
) -> int:
    """A delivery as intake keeps it, signed `age` seconds before it arrived."""
    body = json.dumps({"request_id": request_id, "status": "OK", "payload": {"finetune_id": "x"}}).encode()
    at = int(time.time()) - age
    if source == "replicate":
        signature = sign_symmetric(b"k" * 32, request_id, at, body)
        headers = dict(zip(STANDARD_HEADERS, (request_id, str(at), signature), strict=True))
    else:
        headers = sign(key, request_id, ACCOUNT, at, body)
    identifier = bench.deliver(body, "completed", source=source)
    bench.connection.execute(
        "update webhook.deliveries set headers = %s, request_id = %s where id = %s",
        (json.dumps(kept_headers(headers)), request_id, identifier),
    )
    for name, value in more.items():
        bench.connection.execute(
            f"update webhook.deliveries set {name} = %s where id = %s", (value, identifier)
        )  # type: ignore[call-overload]
    return identifier


def test_what_the_worker_has_archived_is_proven_from_the_archive(
    bench: Lab, env: dict[str, str], key: SigningKey
) -> None:
    bench.make_bot_tables()
    ids = [keep(bench, key, f"r-{index}") for index in range(3)] + [
        keep(bench, key, "rep-1", source="replicate")
    ]
    for index in range(3):
        bench.avatar(f"r-{index}", kind="style")
    bench.avatar("rep-1", kind="style")
    with bench.worker():
        for identifier in ids:
            bench.wait_state(identifier, "done", "dead")
    for identifier in ids:
        [report] = lines(env, "verify", identifier)
        assert (report["valid"], report["where"], report["signature"], report["sha256"]) == (
            True,
            "archive",
            True,
            True,
        )
        assert report["delivery_id"] == identifier
        assert report["age_seconds"] < 60
    [report] = lines(env, "verify", "r-1")
    assert report["account_id"] == ACCOUNT
    # The whole segment, by its key and from a file.
    place = bench.effects(ids[0])["raw_archive"]["detail"]["key"]
    assert ids[0] in {report["delivery_id"] for report in lines(env, "verify", "--key", place)}
    # What somebody altered in the bucket is not taken for the delivery.
    data = bench.objects()[place]
    damaged = data.replace(b'"delivery_id"', b'"delivery_iD"')
    bench.minio.put_object(bench.bucket, place, io.BytesIO(damaged), len(damaged))
    result = typed(env, "verify", ids[0])
    assert result.exit_code == 1, result.stderr
    assert "raw_archive_damaged" in result.stderr
    bench.minio.remove_object(bench.bucket, place)
    result = typed(env, "verify", ids[0])
    assert result.exit_code == 1, result.stderr
    assert "raw_archive_missing" in result.stderr


def test_what_is_not_archived_is_proven_from_the_inbox(
    bench: Lab, env: dict[str, str], key: SigningKey
) -> None:
    fresh = keep(bench, key, "r-1")
    [report] = lines(env, "verify", fresh)
    assert (report["valid"], report["where"]) == (True, "database")
    stale = keep(bench, key, "r-2", age=4000, state="dead", aside="stale")
    [report] = lines(env, "verify", stale)
    assert (report["valid"], report["signature"], report["aside"]) == (True, True, "stale")
    assert report["age_seconds"] > 3900
    admitted = keep(bench, key, "r-5", age=4000, replayed_at="now")
    [report] = lines(env, "verify", admitted)
    assert (report["valid"], report["aside"]) == (True, "stale"), "somebody decided to have it processed"
    unmarked = keep(bench, key, "r-3", age=4000)
    result = typed(env, "verify", unmarked, "--json")
    assert (result.exit_code, json.loads(result.stdout)["reason"]) == (1, "stale")
    bench.connection.execute("update webhook.deliveries set body = body || ' ' where id = %s", (fresh,))
    result = typed(env, "verify", fresh, "--json")
    assert (result.exit_code, json.loads(result.stdout)["sha256"]) == (1, False)
    assert "NOT VALID" in typed(env, "verify", fresh).stdout
    manual = bench.deliver({"request_id": "r-4"}, "queued", source="manual")
    [report] = lines(env, "verify", manual)
    assert (report["valid"], report["signature"]) == (True, None)


def test_other_keys_prove_nothing_and_those_of_the_time_do(
    bench: Lab, env: dict[str, str], key: SigningKey, tmp_path: Path
) -> None:
    identifier = keep(bench, key, "r-1")
    (tmp_path / "jwks.json").write_bytes(jwks(SigningKey.generate()))
    (tmp_path / "then.json").write_bytes(jwks(key))
    result = typed(env, "verify", identifier, "--json")
    assert (result.exit_code, json.loads(result.stdout)["reason"]) == (1, "bad_signature")
    assert "--jwks" in json.loads(result.stdout)["message"]
    [report] = lines(env, "verify", identifier, "--jwks", tmp_path / "then.json")
    assert report["valid"]


def test_a_file_is_enough(bench: Lab, env: dict[str, str], key: SigningKey, tmp_path: Path) -> None:
    identifier = keep(bench, key, "r-1")
    [exported] = lines(env, "events", "export", "--body")
    archived = {**exported, "delivery_id": identifier, "received_at": exported["first_seen_at"]}
    for indent in (None, 1):
        (tmp_path / "kept.json").write_text(json.dumps(archived, indent=indent))
        [report] = lines({}, "verify", "--file", tmp_path / "kept.json", "--jwks", tmp_path / "jwks.json")
        assert (report["valid"], report["where"]) == (True, "file")


def test_keys_that_cannot_be_had_are_69_and_not_a_verdict(
    bench: Lab, env: dict[str, str], key: SigningKey
) -> None:
    identifier = keep(bench, key, "r-1")
    with jwks_server(key) as server:
        server.status = 500
        without = {name: value for name, value in env.items() if name != "FAL_JWKS_FILE"}
        result = typed({**without, "FAL_JWKS_URL": server.url}, "verify", identifier)
    assert result.exit_code == 69
    assert "keys" in result.stderr


def test_an_object_store_that_is_away_is_69(bench: Lab, env: dict[str, str], key: SigningKey) -> None:
    identifier = keep(bench, key, "r-1")
    detail = json.dumps({"key": "k", "offset": 0, "length": 1, "sha256": "0"})
    bench.connection.execute(
        "insert into webhook.effects (delivery_id, name, state, detail) values (%s, 'raw_archive', 'done', %s)",
        (identifier, detail),
    )
    away = {**env, "MINIO_ENDPOINT": "127.0.0.1:1"}
    assert typed(away, "verify", identifier).exit_code == 69
    assert typed(away, "verify", "--key", "x").exit_code == 69


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a":1}', b"[" * 100_000, b"\xff\xfe",
                                     b'{"headers":{},"body_base64":"?","body_sha256":"x","source":"fal"}',
                                     b'{"headers":{},"body_base64":"","body_sha256":"x","source":"nobody"}'])  # fmt: skip
def test_what_is_no_delivery_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "jwks.json").write_bytes(jwks(SigningKey.generate()))
    result = typed({}, "verify", "--file", tmp_path / "x", "--jwks", tmp_path / "jwks.json")
    assert result.exit_code == 1
    assert result.stderr


def test_wrong_usage(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "b").write_text("{}")
    for arguments in ([], ["1", "--key", "k"], ["--body-file", tmp_path / "b"]):
        assert typed(env, "verify", *arguments).exit_code == 2
    missing: list[Any] = ["99999", "no-such"]
    for which in missing:
        assert typed(env, "verify", which).exit_code == 1
    assert typed(env, "verify", "--key", "no/such").exit_code == 1
    assert typed(env, "verify", "--key", "../../etc/passwd").exit_code == 1
