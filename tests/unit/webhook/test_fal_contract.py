"""What fal documents and what receivers get wrong, line by line: docs/receiver/fal-contract.md names these tests.

Here stands the core of each line that needs no server; the page names the tests against real servers beside it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import inspect
import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from nacl.signing import SigningKey
from webhook_api import bodies, db, health, outlets
from webhook_api.app import create_app
from webhook_api.auth import FalVerifier, KeyStore
from webhook_api.auth.keys import KeySourceError, parse_jwks
from webhook_api.auth.signing import FAL_HEADERS, SIGNATURE_HEADER, TIMESTAMP_HEADER, USER_ID_HEADER, sign
from webhook_api.config import ConfigError, load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.inbox import Delivery, Stored
from webhook_api.migrate import packaged
from webhook_api.services import Services
from webhook_api.shapes import SEED
from werkzeug.test import TestResponse

from tests.support.falfake import ACCOUNT, SECRET, fal_body, new_key, signed
from tests.support.keysource import Source

URL = "/api/v1/avatar/status_update"
LIMIT = 100_000
ENVIRONMENT = {
    "DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1", "MINIO_ENDPOINT": "127.0.0.1:1",
    "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b", "FAL_WEBHOOK_SECRET": SECRET, "FAL_ACCOUNT_IDS": ACCOUNT,
    "WEBHOOK_BODY_LIMIT_BYTES": str(LIMIT),
}  # fmt: skip


class Inbox:
    """Rows by identity; ``error`` stands for a database that is away."""

    available = True

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[Delivery]] = {}
        self.error: Exception | None = None

    def store(self, arrived: Delivery, **_: Any) -> Stored:
        if self.error:
            raise self.error
        seen = self.rows.setdefault((arrived.source, arrived.request_id, arrived.dedup_key), [])
        seen.append(arrived)
        return Stored(len(self.rows), len(seen) == 1, len(seen), seen[0].body_sha256 != arrived.body_sha256)

    def store_many(self, deliveries: Sequence[Delivery], until: float) -> list[Stored | None]:
        return [None] * len(deliveries)

    @property
    def all(self) -> list[Delivery]:
        return [rows[0] for rows in self.rows.values()]


class Receiver:
    """The service without sockets, its keys and its inbox."""

    def __init__(self, client: FlaskClient, key: SigningKey, source: Source, inbox: Inbox) -> None:
        self.client, self.key, self.source, self.inbox = client, key, source, inbox
        self.services: Services = client.application.extensions["services"]

    def post(self, body: bytes, headers: dict[str, str] | None = None, **options: Any) -> TestResponse:
        given = self.headers(body) if headers is None else headers
        return self.client.post(URL, data=body, headers=given, **options)

    def headers(
        self, body: bytes, *, key: SigningKey | None = None, account: str = ACCOUNT, ago: int = 0
    ) -> dict[str, str]:
        return signed(key or self.key, body, account=account, timestamp=int(time.time()) - ago)

    def refused(self, body: bytes, headers: dict[str, str], status: int, reason: str) -> None:
        answer = self.post(body, headers)
        assert (answer.status_code, answer.json["error"]) == (status, reason)
        assert self.inbox.rows == {}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    key, inbox = new_key(), Inbox()
    source = Source(key)
    services = Services(load_settings(ENVIRONMENT | {"FAL_JWKS_URL": "https://127.0.0.1:1/jwks"}))
    services.inbox = inbox  # type: ignore[assignment]
    services.keys = KeyStore(source, wait=30)
    services.authenticator.fal._keys = services.keys  # type: ignore[attr-defined]
    with create_app(services.settings, services).test_client() as client:
        yield Receiver(client, key, source, inbox)


BODY = fal_body("req-1", payload={"seed": SEED})


# What implementers get wrong


def test_wrong_01_fal_has_no_shared_secret(receiver: Receiver) -> None:
    """An HMAC is no signature of fal, and our own secret does not stand in for one."""
    headers = receiver.headers(BODY)
    text = "\n".join([*(headers[name] for name in FAL_HEADERS[:3]), hashlib.sha256(BODY).hexdigest()])
    for digest in (hashlib.sha256, hashlib.sha512):
        mac = hmac.new(SECRET.encode(), text.encode(), digest).hexdigest()
        forged = headers | {SIGNATURE_HEADER: mac.ljust(128, "0"), "X-Webhook-Secret": SECRET}
        receiver.refused(BODY, forged, 401, "bad_signature")


def test_wrong_02_the_raw_bytes_are_signed(receiver: Receiver) -> None:
    """The same JSON in other bytes is another message, both ways round."""
    spaced = json.dumps(json.loads(BODY), indent=2).encode()
    receiver.refused(spaced, receiver.headers(BODY), 401, "bad_signature")
    assert receiver.post(spaced).status_code == 200
    assert receiver.inbox.all[0].body == spaced


def test_wrong_03_only_our_account_may_deliver(receiver: Receiver) -> None:
    """The keys are the same for all of fal: another customer's valid signature is refused, late ones too."""
    for ago in (0, 4000, -4000):
        receiver.refused(BODY, receiver.headers(BODY, account="other", ago=ago), 403, "account_not_allowed")
    headers = receiver.headers(BODY, account="other") | {USER_ID_HEADER: ACCOUNT}
    receiver.refused(BODY, headers, 401, "bad_signature")
    with pytest.raises(ConfigError, match="FAL_ACCOUNT_IDS"):
        load_settings(ENVIRONMENT | {"FAL_ACCOUNT_IDS": ""})


def test_wrong_04_keys_are_not_fetched_for_each_request(receiver: Receiver) -> None:
    """One fetch for all, at most one more for any amount of garbage, and none that stops deliveries."""
    for _ in range(20):
        assert receiver.post(BODY).status_code == 200
    assert receiver.source.fetches == 1
    receiver.source.error = KeySourceError("unreachable", "down")
    forged = receiver.headers(BODY, key=new_key())
    for _ in range(50):
        assert receiver.post(BODY, forged).status_code == 401
        assert receiver.post(BODY, {}).status_code == 401
    assert receiver.source.fetches <= 2
    assert receiver.post(BODY).status_code == 200


@pytest.mark.parametrize("padded", [True, False])
def test_wrong_05_padding_of_a_key_does_not_matter(padded: bool) -> None:
    """`x` comes with and without padding; neither makes a signature invalid."""
    key = new_key()
    x = base64.urlsafe_b64encode(bytes(key.verify_key)).decode()
    document = json.dumps({"keys": [{"x": x if padded else x.rstrip("=")}]}).encode()
    assert parse_jwks(document) == (key.verify_key,)


@pytest.mark.parametrize(
    "written", [" {}", "+{}", "{} ", "{}.0", "0{}", "-{}", "{:,}", "{:_}", "{}e0", "٣{}"]
)
def test_wrong_06_lenient_timestamps_are_refused(receiver: Receiver, written: str) -> None:
    """What int() would take and fal never sends, although the signature over the number is right."""
    verifier = FalVerifier(receiver.services.keys, frozenset({ACCOUNT}))
    headers = receiver.headers(BODY)
    headers[TIMESTAMP_HEADER] = written.format(int(headers[TIMESTAMP_HEADER]))
    with pytest.raises(Exception, match=r"Timestamp does not have the documented form"):
        verifier.claims(headers)


@pytest.mark.parametrize("written", ["{} ", " {}", "0x{}", "{}\t", "{}00", "{}\n"])
def test_wrong_06_lenient_signatures_are_refused(receiver: Receiver, written: str) -> None:
    """What bytes.fromhex() would take, and what is too long."""
    verifier = FalVerifier(receiver.services.keys, frozenset({ACCOUNT}))
    headers = receiver.headers(BODY)
    spaced = {**headers, SIGNATURE_HEADER: " ".join(re.findall("..", headers[SIGNATURE_HEADER]))}
    for given in (spaced, {**headers, SIGNATURE_HEADER: written.format(headers[SIGNATURE_HEADER])}):
        with pytest.raises(Exception, match=r"Signature does not have the documented form"):
            verifier.claims(given)


def test_wrong_07_fal_says_ok_and_error_and_payload() -> None:
    """Statuses and payload as fal sends them."""
    ok, failed = (
        bodies.parse(fal_body("r", "OK", {"seed": SEED})),
        bodies.parse(fal_body("r", "ERROR", {"detail": "no"})),
    )
    assert (ok.status, ok.payload, ok.shape) == ("completed", {"seed": SEED}, "fal")
    assert (failed.status, failed.error) == ("failed", "no")


@pytest.mark.parametrize("error", [DatabaseUnavailable("no_connection", "down"), RuntimeError("defect")])
def test_wrong_08_a_failed_write_is_neither_a_rejection_nor_a_success(
    receiver: Receiver, error: Exception
) -> None:
    """5xx, so that fal comes again; and what it then brings is new, not `seen`."""
    receiver.inbox.error = error
    assert receiver.post(BODY).status_code in {500, 503}
    receiver.inbox.error = None
    answer = receiver.post(BODY)
    assert (answer.status_code, answer.json["duplicate"]) == (200, False)


def test_wrong_09_nothing_is_downloaded_before_the_answer(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A media address that would hang delays nothing: the intake opens no connection at all."""
    assert receiver.post(BODY).status_code == 200  # the keys are known now

    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("the intake must connect to nobody")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    file = {"url": "https://v3.fal.media/files/x", "content_type": "x", "file_name": "x", "file_size": 1}
    body = fal_body("req-2", payload={"diffusers_lora_file": file})
    assert receiver.post(body).status_code == 200


def test_wrong_10_webhooks_are_not_trusted_alone() -> None:
    """With a key of fal's API the worker asks for what waits too long."""
    assert load_settings(ENVIRONMENT).fal_api_key is None
    settings = load_settings(ENVIRONMENT | {"FAL_API_KEY": "fal-id:0123456789abcdef"})
    assert settings.fal_api_key == "fal-id:0123456789abcdef"


@pytest.mark.parametrize(
    "payload",
    ['"\\u0000"', "NaN", "Infinity", '"\\ud800"', '{"\\udfff": 1}', '{"a": 1, "a": 2}', "9" * 5000, "1e999"],
    ids=["nul", "nan", "infinity", "surrogate", "surrogate-key", "double-key", "digits", "overflow"],
)
def test_wrong_11_odd_json_is_taken_and_its_bytes_kept(receiver: Receiver, payload: str) -> None:
    """What breaks a jsonb insert or a parser: the raw bytes are the record, what is handed on is clean."""
    body = f'{{"request_id":"req-1","status":"OK","payload":{payload}}}'.encode()
    assert receiver.post(body).status_code == 200
    (stored,) = receiver.inbox.all
    assert (stored.body, stored.state, stored.aside) == (body, "pending", None)
    event = bodies.parse(body)
    assert event.anomalies
    handed_on = json.dumps(event.payload, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert b"\\u0000" not in handed_on


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_wrong_11_nested_lists_are_no_crash(receiver: Receiver, depth: int) -> None:
    """100,000 nested lists raise RecursionError in a naive reader."""
    body = (
        b'{"request_id":"req-1","status":"OK","payload":' + b"[" * (depth // 2) + b"]" * (depth // 2) + b"}"
    )
    assert receiver.post(body[:LIMIT]).status_code == 200
    assert [row.aside for row in receiver.inbox.all] == ["malformed"]


def test_wrong_12_a_chunked_body_is_never_cut_off(receiver: Receiver) -> None:
    """Valid JSON, then more than the limit: cut at the limit it would still be valid JSON, and answered 200."""
    body = BODY + b" " * LIMIT
    environ = {"wsgi.input_terminated": True, "CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    answer = receiver.client.post(
        URL, input_stream=io.BytesIO(body), headers=receiver.headers(body), environ_overrides=environ
    )
    assert (answer.status_code, answer.json["error"]) == (413, "too_large")
    assert receiver.inbox.rows == {}


def test_wrong_12_a_compressed_body_is_refused(receiver: Receiver) -> None:
    """The signature covers the bytes on the wire; nothing is decompressed."""
    body = gzip.compress(BODY)
    receiver.refused(body, receiver.headers(body) | {"Content-Encoding": "gzip"}, 415, "content_encoding")


def test_wrong_13_no_partition_ends_deduplication() -> None:
    """The identity is one unique constraint over one table, and nothing partitions it."""
    schema = "\n".join(migration.sql.lower() for migration in packaged())
    assert "partition by" not in schema
    removed = schema.rfind("drop constraint deliveries_identity")
    assert schema.rfind("constraint deliveries_identity unique") > removed


def test_wrong_14_pools_open_after_the_fork_and_every_wait_is_bounded() -> None:
    """Making the application opens no pool; waits end long before fal's 15 s; S3 has a time limit."""
    services = Services(load_settings(ENVIRONMENT))
    assert services.database._pool.closed
    assert db.INTAKE_DEADLINE < 2
    for module in (outlets, health):
        assert "timeout=urllib3.Timeout(" in inspect.getsource(module)


# The right answer to each fault


def test_fault_keys_unreachable_and_known(receiver: Receiver) -> None:
    """As usual."""
    assert receiver.post(BODY).status_code == 200
    receiver.source.error = KeySourceError("unreachable", "down")
    assert receiver.post(BODY).status_code == 200
    receiver.services.keys.refresh(30)
    assert receiver.post(BODY).status_code == 200
    assert receiver.services.keys.status()["error"] == "unreachable"


def test_fault_keys_unreachable_and_unknown(receiver: Receiver) -> None:
    """503, never 401."""
    receiver.source.error = KeySourceError("unreachable", "down")
    for headers in (None, receiver.headers(BODY, key=new_key())):
        answer = receiver.post(BODY, headers)
        assert (answer.status_code, answer.json["error"]) == (503, "keys_unknown")
        assert int(answer.headers["Retry-After"]) > 0


def test_fault_no_key_matches(receiver: Receiver) -> None:
    """401 after at most one refresh, counted by reason, with a sample; a key that the refresh brings is taken."""
    assert receiver.post(BODY).status_code == 200
    answer = receiver.post(BODY, receiver.headers(BODY, key=new_key()))
    assert (answer.status_code, answer.json["error"]) == (401, "bad_signature")
    assert receiver.services.samples._queue.qsize() == 1


def test_fault_a_duplicate(receiver: Receiver) -> None:
    """200, one row, attempts counted; another result under the same id is flagged."""
    answers = [receiver.post(BODY) for _ in range(3)]
    assert [answer.json["duplicate"] for answer in answers] == [False, True, True]
    assert [len(rows) for rows in receiver.inbox.rows.values()] == [3]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[1]", b'{"status":"OK"}', b'{"request_id":"r","status":"DONE"}']
)
def test_fault_signed_but_malformed(receiver: Receiver, body: bytes) -> None:
    """200 and kept aside: a 4xx would be retried 31 times for nothing."""
    answer = receiver.post(body)
    assert answer.status_code == 200
    (row,) = receiver.inbox.all
    assert (row.state, row.aside, row.status, row.body) == ("dead", "malformed", "unknown", body)


@pytest.mark.parametrize("ago", [4000, -4000])
def test_fault_signed_but_out_of_its_time(receiver: Receiver, ago: int) -> None:
    """Kept aside with 200; the fresh copy of the same event is a row of its own and is processed."""
    assert receiver.post(BODY, receiver.headers(BODY, ago=ago)).status_code == 200
    assert receiver.post(BODY).status_code == 200
    aside, fresh = receiver.inbox.all
    assert (aside.state, aside.aside) == ("dead", "stale" if ago > 0 else "future")
    assert (fresh.state, fresh.aside) == ("pending", None)
    assert bodies.normal_key(aside.dedup_key) == fresh.dedup_key


def test_fault_a_body_over_the_limit(receiver: Receiver) -> None:
    """413, to the byte."""
    body = BODY + b" " * (LIMIT - len(BODY))
    assert receiver.post(body).status_code == 200
    assert receiver.post(body + b" ").status_code == 413


def test_fault_nginx_and_the_app_agree_on_the_limit() -> None:
    """Both take it from one variable."""
    roles = Path(__file__).resolve().parents[3] / "roles"
    nginx = (roles / "edge" / "templates" / "nginx.conf.j2").read_text()
    settings = (roles / "stack" / "templates" / "prod.env.j2").read_text()
    assert "client_max_body_size" in nginx
    assert "site_body_limit_bytes" in nginx
    assert "WEBHOOK_BODY_LIMIT_BYTES={{ site_body_limit_bytes }}" in settings


def test_the_header_and_the_body_may_name_different_requests(receiver: Receiver) -> None:
    """Both are signed: the body's id is the request's, the difference is counted."""
    headers = sign(receiver.key, "other-id", ACCOUNT, int(time.time()), BODY)
    answer = receiver.post(BODY, headers)
    assert (answer.status_code, answer.json["request_id"]) == (200, "req-1")
    assert receiver.inbox.all[0].headers[FAL_HEADERS[0].lower()] == "other-id"
    metrics = receiver.client.get("/metrics").text
    assert 'webhook_body_anomalies_total{anomaly="other_id_in_header"}' in metrics
