"""The HTTP interface, with the inbox in memory: what is answered, and what is handed on to be stored."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from nacl.signing import SigningKey
from prometheus_client import REGISTRY
from webhook_api import errors, intake
from webhook_api.app import create_app
from webhook_api.auth.signing import FAL_HEADERS
from webhook_api.bodies import dedup_key, identity
from webhook_api.config import load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.inbox import Delivery, Stored
from webhook_api.services import Services
from webhook_api.shapes import SHAPES
from werkzeug.test import TestResponse

from tests.support.falfake import ACCOUNT, SECRET, delivery, fal_body, jwks, new_key, signed

URL = "/api/v1/avatar/status_update"
TEST_URL = "/api/v1/avatar/test_webhook"
MANUAL = {"X-Webhook-Secret": SECRET, "Content-Type": "application/json"}
LIMIT = 131072


class MemoryInbox:
    """Keeps what it is given, as the real one does by identity."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[Delivery]] = {}
        self.error: Exception | None = None
        self.available = True

    def store(self, arrived: Delivery, *, until: float | None = None) -> Stored:
        if self.error:
            raise self.error
        seen = self.rows.setdefault((arrived.source, arrived.request_id, arrived.dedup_key), [])
        seen.append(arrived)
        return Stored(len(self.rows), len(seen) == 1, len(seen), seen[0].body_sha256 != arrived.body_sha256)

    @property
    def only(self) -> Delivery:
        (rows,) = self.rows.values()
        return rows[0]


@pytest.fixture
def key() -> SigningKey:
    return new_key()


@pytest.fixture
def inbox() -> MemoryInbox:
    return MemoryInbox()


@pytest.fixture
def app(tmp_path: Path, key: SigningKey, inbox: MemoryInbox) -> Flask:
    (tmp_path / "jwks.json").write_bytes(jwks(key))
    settings = load_settings(
        {
            "DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1",
            "MINIO_ENDPOINT": "127.0.0.1:1", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b",
            "FAL_WEBHOOK_SECRET": SECRET, "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_FILE": str(tmp_path / "jwks.json"),
            "WEBHOOK_BODY_LIMIT_BYTES": str(LIMIT), "WEBHOOK_VERSION": "v-test", "INSTANCE_ID": "unit-1",
        }
    )  # fmt: skip
    services = Services(settings)
    services.inbox = inbox  # type: ignore[assignment]
    return create_app(settings, services)


@pytest.fixture
def client(app: Flask) -> Iterator[FlaskClient]:
    with app.test_client() as client:
        yield client


def post(client: FlaskClient, body: bytes, headers: dict[str, str], url: str = URL) -> TestResponse:
    return client.post(url, data=body, headers=headers)


def manual(client: FlaskClient, document: Any, **headers: str) -> TestResponse:
    return post(client, json.dumps(document).encode(), {**MANUAL, **headers})


PLAIN = [
    name for name, shape in SHAPES.items()
    if shape.transport == "plain" and not shape.large and shape.needs != "standard"
]  # fmt: skip
"""The others are sent to a real service: tests/integration/webhook/test_cli_send.py."""


@pytest.mark.parametrize("name", PLAIN)
def test_each_shape_gets_its_answer(
    client: FlaskClient, inbox: MemoryInbox, key: SigningKey, name: str
) -> None:
    sent = delivery(name, key)
    answer = post(client, sent.body, sent.headers)
    assert answer.status_code == SHAPES[name].expect, answer.text
    assert len(inbox.rows) == (1 if answer.status_code == 200 else 0)
    if answer.status_code == 200:
        assert answer.json["status"] == "received"
        assert answer.json["request_id"] == sent.request_id
        assert answer.json["message"]
        assert inbox.only.body == sent.body
        assert inbox.only.source == ("manual" if "X-Webhook-Secret" in sent.headers else "fal")


def test_what_is_stored_of_a_fal_delivery(client: FlaskClient, inbox: MemoryInbox, key: SigningKey) -> None:
    body = fal_body("req-7", payload={"x": 1})
    answer = client.post(
        f"{URL}?training_type=portrait", data=body,
        headers=signed(key, body, request_id="req-7", timestamp=int(time.time()))
        | {"X-Request-Id": "edge-1", "X-Webhook-Secret": SECRET},
    )  # fmt: skip
    assert answer.status_code == 200
    assert answer.headers["X-Request-Id"] == "edge-1"
    stored = inbox.only
    assert (stored.request_id, stored.status) == ("req-7", "completed")
    assert stored.dedup_key == dedup_key("completed", identity(body))
    assert (stored.account_id, stored.training_type_hint, stored.state) == (ACCOUNT, "portrait", "pending")
    assert stored.edge_request_id == "edge-1"
    assert {name.lower() for name in FAL_HEADERS} <= set(stored.headers)
    assert SECRET not in json.dumps(dict(stored.headers))


def test_another_result_of_a_request_is_an_event_of_its_own(client: FlaskClient, inbox: MemoryInbox) -> None:
    for payload in (None, {"finetune_id": "ft"}):
        answer = manual(client, {"status": "completed", "request_id": "r", "result": payload})
        assert answer.json["duplicate"] is False
    assert len(inbox.rows) == 2


def test_large_bodies_wait_for_room_and_then_are_asked_to_come_again(
    app: Flask, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "LARGE_BYTES", 100)
    monkeypatch.setattr(intake, "ROOM_SECONDS", 0.05)
    room = app.extensions["intake"].large
    for _ in range(intake.LARGE_AT_ONCE):
        assert room.acquire(blocking=False)
    large = {"status": "queued", "request_id": "large", "message": "x" * 200}
    refused = manual(client, large)
    assert (refused.status_code, refused.json["error"]) == (503, "busy")
    assert refused.headers["Retry-After"]
    assert manual(client, {"status": "queued", "request_id": "small"}).status_code == 200
    room.release()
    assert manual(client, large).status_code == 200
    assert manual(client, {**large, "status": "nonsense"}).status_code == 400
    assert room.acquire(blocking=False), "a refused one gives its room back"


def test_a_hint_of_nonsense_is_no_hint(client: FlaskClient, inbox: MemoryInbox) -> None:
    answer = client.post(
        f"{URL}?training_type='; drop", json={"request_id": "r", "status": "queued"}, headers=MANUAL
    )
    assert answer.status_code == 200
    assert inbox.only.training_type_hint is None


def test_the_command_of_the_old_guide(client: FlaskClient, inbox: MemoryInbox) -> None:
    answer = manual(client, {"status": "completed", "request_id": "test-123"})
    assert answer.status_code == 200
    assert answer.json["request_id"] == "test-123"
    assert inbox.only.status == "completed"


def test_duplicates_and_variants_are_200(client: FlaskClient) -> None:
    answers = [
        manual(client, {"request_id": "r", "gateway_request_id": f"g-{n}", "status": "completed"})
        for n in (1, 1, 2)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert [answer.json["duplicate"] for answer in answers] == [False, True, True]
    assert "another body" in answers[2].json["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"status":"OK","payload":null}', b"[" * 50_000]
)
def test_a_signed_but_malformed_delivery_is_kept_aside(
    client: FlaskClient, inbox: MemoryInbox, key: SigningKey, body: bytes
) -> None:
    answer = post(client, body, signed(key, body, request_id="req-m", timestamp=int(time.time())))
    assert answer.status_code == 200, answer.text
    stored = inbox.only
    assert (stored.request_id, stored.status, stored.state) == ("req-m", "unknown", "dead")
    assert stored.last_error
    assert stored.last_error.startswith("malformed body")
    assert stored.body == body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"), (b"{", "not_json"), (b"[]", "not_an_object"), (b"\xff", "not_utf8"), (b"{}", "missing_id"),
        (b"[" * 50_000, "too_deep"), (b'{"request_id":"r"}', "invalid_status"),
        (b'{"request_id":"r","status":"OK","n":NaN}', "not_json"),
        (b'{"request_id":"r","status":"OK","status":"ERROR"}', "not_json"),
    ],
)  # fmt: skip
def test_a_manual_call_that_is_wrong_is_told_so(
    client: FlaskClient, inbox: MemoryInbox, body: bytes, reason: str
) -> None:
    answer = post(client, body, MANUAL)
    assert answer.status_code == 400
    assert answer.json["error"] == reason
    assert not inbox.rows


def test_fals_nan_does_not_lose_the_result(client: FlaskClient, inbox: MemoryInbox, key: SigningKey) -> None:
    body = b'{"request_id":"r","status":"OK","payload":{"loss":NaN,"n":' + b"9" * 5000 + b"}}"
    assert post(client, body, signed(key, body, timestamp=int(time.time()))).status_code == 200
    assert inbox.only.state == "pending"


def test_the_limit_holds_to_the_byte(client: FlaskClient, inbox: MemoryInbox) -> None:
    def body(size: int) -> bytes:
        head = b'{"request_id":"r","status":"queued","x":"'
        return head + b"x" * (size - len(head) - 2) + b'"}'

    assert post(client, body(LIMIT), MANUAL).status_code == 200
    answer = post(client, body(LIMIT + 1), MANUAL)
    assert (answer.status_code, answer.json["error"]) == (413, "too_large")


def test_a_body_without_a_length_is_never_cut(client: FlaskClient, inbox: MemoryInbox) -> None:
    # Valid JSON, then more than the limit: cut at the limit it would still be valid.
    body = b'{"request_id":"r","status":"queued"}' + b" " * LIMIT
    environ = {"wsgi.input_terminated": True, "CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    answer = client.post(URL, input_stream=io.BytesIO(body), headers=MANUAL, environ_overrides=environ)
    assert (answer.status_code, answer.json["error"]) == (413, "too_large")
    assert not inbox.rows


def test_a_body_shorter_than_announced_is_refused(client: FlaskClient, inbox: MemoryInbox) -> None:
    body = b'{"request_id":"r","status":"queued"}'
    answer = client.post(
        URL,
        input_stream=io.BytesIO(body),
        headers=MANUAL,
        environ_overrides={"CONTENT_LENGTH": str(len(body) + 5)},
    )
    assert (answer.status_code, answer.json["error"]) == (400, "incomplete_body")
    assert not inbox.rows


@pytest.mark.parametrize("length", ["-1", "1_0", "+5", "ten", "9" * 30])
def test_an_odd_content_length_is_refused(client: FlaskClient, length: str) -> None:
    answer = client.post(
        URL, input_stream=io.BytesIO(b"{}"), headers=MANUAL, environ_overrides={"CONTENT_LENGTH": length}
    )
    assert answer.status_code == 400


def test_a_body_without_credentials_is_taken_in_pieces_and_forgotten(client: FlaskClient) -> None:
    class Watched(io.BytesIO):
        largest = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size > 0
            self.largest = max(self.largest, size)
            return super().read(size)

    for headers in ({}, {"X-Webhook-Secret": "wrong"}, {FAL_HEADERS[0]: "r"}):
        body = Watched(b"x" * LIMIT)
        answer = client.post(
            URL, input_stream=body, headers=headers, environ_overrides={"CONTENT_LENGTH": str(LIMIT)}
        )
        assert answer.status_code == 401
        assert body.largest < LIMIT
        # All of it: a sender whose connection is reset sees no answer.
        assert body.tell() == LIMIT


@pytest.mark.parametrize(
    "reason", ["no_connection", "timeout", "connection_lost", "read_only", "not_migrated", "resources"]
)
def test_a_failed_write_is_never_a_2xx_nor_a_4xx(
    client: FlaskClient, inbox: MemoryInbox, reason: str
) -> None:
    inbox.error = DatabaseUnavailable(reason, "down")
    answer = manual(client, {"request_id": "r", "status": "completed"})
    assert (answer.status_code, answer.json["error"]) == (503, reason)
    assert int(answer.headers["Retry-After"]) > 0


def test_a_defect_is_500_in_the_one_shape(client: FlaskClient, inbox: MemoryInbox) -> None:
    inbox.error = RuntimeError("secret detail")
    answer = manual(client, {"request_id": "r", "status": "completed"})
    assert (answer.status_code, answer.json["error"]) == (500, "internal")
    assert "secret detail" not in answer.text


def test_every_error_has_one_shape(client: FlaskClient) -> None:
    answers = [
        client.get(URL), client.put(URL), client.get("/nowhere"), client.post("/health"), client.post(URL),
        post(client, b"{", MANUAL), post(client, b"{", {**MANUAL, "Content-Encoding": "gzip"}),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [405, 405, 404, 405, 401, 400, 415]
    for answer in answers:
        assert answer.mimetype == "application/json"
        assert set(answer.json) == {"error", "message", "request_id"}
        assert re.fullmatch(r"[a-z0-9_]+", answer.json["error"])
        assert answer.json["request_id"] == answer.headers["X-Request-Id"]
    assert "POST" in answers[0].headers["Allow"]


def test_a_request_id_of_nonsense_is_replaced(client: FlaskClient) -> None:
    answer = client.get("/", headers={"X-Request-Id": "a b<script>"})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_the_test_endpoint_stores_nothing(client: FlaskClient, inbox: MemoryInbox, key: SigningKey) -> None:
    sent = delivery("error-422", key)
    answer = post(client, sent.body, sent.headers, TEST_URL)
    assert answer.status_code == 200
    assert answer.json["understood"]["status"] == "failed"
    assert "field required" in answer.json["understood"]["error"]
    sent = delivery("forged", key)
    assert post(client, sent.body, sent.headers, TEST_URL).status_code == 401
    assert not inbox.rows


def test_only_authenticated_probes_are_probes(client: FlaskClient, inbox: MemoryInbox) -> None:
    manual(client, {"request_id": "probe-1", "status": "completed"})
    manual(client, {"request_id": "not-a-probe-1", "status": "completed"})
    assert [rows[0].probe for rows in inbox.rows.values()] == [True, False]


def test_refusals_are_counted_by_reason(client: FlaskClient, key: SigningKey) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("webhook_rejected_total", {"reason": "bad_signature"}) or 0

    before = count()
    sent = delivery("forged", key)
    post(client, sent.body, sent.headers)
    assert count() == before + 1
    assert b"webhook_rejected_total" in client.get("/metrics").data


def test_no_log_line_holds_a_body_or_a_secret(
    client: FlaskClient, key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        for name in ("portrait-ok", "old-failed", "forged", "not-json", "wrong-secret"):
            sent = delivery(name, key, media="http://media.test/do-not-log")
            post(client, sent.body, sent.headers)
        client.get("/health?token=do-not-log")
    text = "\n".join(str(record.__dict__) for record in caplog.records)
    assert "delivery_stored" in text
    for secret in (SECRET, "do-not-log", "CUDA out of memory", "diffusers_lora_file"):
        assert secret not in text


def test_health_is_503_while_nothing_can_be_accepted(client: FlaskClient) -> None:
    answer = client.get("/health")
    assert answer.status_code == 503
    assert (answer.json["status"], answer.json["version"], answer.json["instance"]) == (
        "unhealthy",
        "v-test",
        "unit-1",
    )
    assert set(answer.json["checks"]) == {"database", "redis", "object_store", "keys"}


def test_the_front_page_names_the_endpoints(client: FlaskClient) -> None:
    assert client.get("/").json["endpoints"]["deliveries"] == f"POST {URL}"


def test_every_reason_has_a_status() -> None:
    """A reason without a status would be a 500 for the sender. Reasons are written as literals in the code."""
    package = Path(errors.__file__).parent
    sources = [*package.glob("auth/*.py"), package / "bodies.py", package / "intake.py", package / "db.py"]
    pattern = re.compile(r'(?:AuthError|BodyError|Refusal|DatabaseUnavailable)\(\s*"([a-z_0-9]+)"')
    reasons = {reason for path in sources for reason in pattern.findall(path.read_text())}
    assert len(reasons) > 20
    assert reasons <= set(errors.HTTP_STATUS)
