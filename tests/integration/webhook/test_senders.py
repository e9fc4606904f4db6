"""Senders against a running service: what is kept aside, named sources, samples of refusals, the learned account."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from nacl.signing import SigningKey
from webhook_api import acceptance
from webhook_api.auth import AuthError, Claims, Verified
from webhook_api.auth.accounts import Budget
from webhook_api.auth.samples import BODY_MAX, REASONS, SLOTS, Samples
from webhook_api.auth.standard import message, read_secret, sign_symmetric
from webhook_api.bodies import aside_key, dedup_key, identity
from webhook_api.inbox.statement import store_one

from tests.support.apiservice import PACKAGE, ApiService, running
from tests.support.databases import migrated_database
from tests.support.falfake import ACCOUNT, SECRET, JwksServer, fal_body, jwks, jwks_server, new_key, signed
from tests.support.workerlab import lab

pytestmark = pytest.mark.backends
WHSEC = "whsec_" + base64.b64encode(bytes(range(32))).decode()
ROTATED = "whsec_" + base64.b64encode(bytes(range(1, 33))).decode()


@dataclass
class Site:
    """What services of a test share."""

    environment: dict[str, str]
    url: str
    key: SigningKey
    jwks: JwksServer
    ed25519: SigningKey = field(default_factory=new_key)
    made_at: float = field(default_factory=time.monotonic)

    def rows(self, columns: str, where: str = "true", table: str = "deliveries") -> list[Any]:
        with psycopg.connect(self.url) as connection:
            query = f"select {columns} from webhook.{table} where {where} order by 1"
            return connection.execute(query.encode()).fetchall()


@contextmanager
def made(database_url: str, tmp_path: Path) -> Iterator[Site]:
    key = new_key()
    (tmp_path / "whsec").write_text(f"{WHSEC}\n{ROTATED}\n")
    (tmp_path / "secret").write_text(SECRET)
    with migrated_database(database_url) as url, jwks_server(key) as keys:
        site = Site({}, url, key, keys)
        public = "whpk_" + base64.b64encode(bytes(site.ed25519.verify_key)).decode()
        table = {
            "replicate": {
                "scheme": "standard", "shape": "replicate", "secrets": [{"file": str(tmp_path / "whsec")}],
                "public_keys": [public],
            }
        }  # fmt: skip
        site.environment = {
            # Neither Redis nor the object store is there: nothing here may need them.
            "DATABASE_URL": url, "REDIS_URL": "redis://127.0.0.1:1", "MINIO_ENDPOINT": "127.0.0.1:1",
            "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b", "FAL_WEBHOOK_SECRET_FILE": str(tmp_path / "secret"),
            "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_URL": keys.url, "ENVIRONMENT": "test",
            "FAL_JWKS_CACHE_FILE": str(tmp_path / "jwks.json"), "WEBHOOK_SOURCES": json.dumps(table),
            "INSTANCE_ID": "senders-1",
        }  # fmt: skip
        yield site


@contextmanager
def accepting(environment: dict[str, str], log: Path) -> Iterator[ApiService]:
    with running(environment, log) as service:
        service.wait_for(lambda: service.get("/health")[0] == 200, "deliveries are accepted", 60)
        yield service


@pytest.fixture
def own_site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    """A site of the test's own."""
    with made(database_url, tmp_path) as site:
        yield site


@pytest.fixture(scope="module")
def shared(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, ApiService]]:
    place = tmp_path_factory.mktemp("senders")
    with made(database_url, place) as site, accepting(site.environment, place / "api.log") as service:
        yield site, service


@pytest.fixture
def site(shared: tuple[Site, ApiService]) -> Site:
    """The site of this file, with nothing in its tables."""
    site, _ = shared
    with psycopg.connect(site.url) as connection:
        connection.execute("truncate webhook.deliveries, webhook.samples cascade")
    return site


@pytest.fixture
def service(shared: tuple[Site, ApiService]) -> ApiService:
    return shared[1]


def fal(site: Site, body: bytes, *, ago: float = 0, **changes: Any) -> dict[str, str]:
    return signed(changes.pop("key", site.key), body, timestamp=int(time.time() - ago), **changes)


def process(environment: dict[str, str]) -> dict[str, str]:
    return {"PYTHONPATH": str(PACKAGE), "PATH": os.environ["PATH"], **environment}


def metric(service: ApiService, name: str) -> float:
    text = service.get("/metrics")[1]
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_a_stale_delivery_is_kept_aside_and_its_fresh_copy_processed(site: Site, service: ApiService) -> None:
    request_id = str(uuid.uuid4())
    body = fal_body(request_id, payload={"seed": 1})
    stale = fal(site, body, ago=4000, request_id=request_id)
    buckets = ['webhook_kept_aside_total{reason="stale",source="fal"}']
    buckets += [
        f'webhook_delivery_age_seconds_bucket{{le="{le}",source="fal"}}' for le in ("3600.0", "7200.0")
    ]
    before = [metric(service, name) for name in buckets]
    for _ in range(2):
        status, answer, _, _ = service.post(body, stale)
        assert (status, answer["request_id"]) == (200, request_id)
        assert "kept aside" in answer["message"]
    key = dedup_key("completed", identity(body))
    assert site.rows("dedup_key, state, aside, attempts") == [(aside_key("stale", key), "dead", "stale", 2)]
    status, answer, _, _ = service.post(body, fal(site, body, request_id=request_id))
    assert (status, answer["duplicate"]) == (200, False)
    assert site.rows("state, aside, dedup_key", "aside is null") == [("pending", None, key)]
    assert len(site.rows("id")) == 2
    # The alarm, and the age of each attempt: two beyond an hour, one fresh.
    after = [metric(service, name) for name in buckets]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 3]


def test_a_delivery_of_the_future_is_kept_aside(site: Site, service: ApiService) -> None:
    body = fal_body("req-1")
    assert service.post(body, fal(site, body, ago=-4000))[0] == 200
    assert site.rows("state, aside") == [("dead", "future")]


MALFORMED = (
    b"{not json", b"[" * 100_000, b'\xef\xbb\xbf{"request_id":"x","status":"OK"}', b"\xff", b"[]", b"",
    '{"request_id":"x","status":"O\u212a"}'.encode(), b'{"request_id":"x","status":"COMPLETE"}',
)  # fmt: skip


def test_signed_but_malformed_is_200_and_kept_aside(site: Site, service: ApiService) -> None:
    name = 'webhook_kept_aside_total{reason="malformed",source="fal"}'
    before = metric(service, name)
    for number, body in enumerate(MALFORMED):
        request_id = "x" if b'"x"' in body and not body.startswith(b"\xef") else f"req-{number}"
        for _ in range(2):
            status, answer, _, _ = service.post(body, fal(site, body, request_id=request_id))
            assert (status, answer["request_id"]) == (200, request_id)
            assert "kept aside" in answer["message"]
    rows = site.rows("id, state, aside, status, attempts, body")
    assert {row[1:5] for row in rows} == {("dead", "malformed", "unknown", 2)}
    assert [bytes(row[5]) for row in rows] == list(MALFORMED)
    assert metric(service, name) - before == 2 * len(MALFORMED)


def prediction(status: str = "succeeded") -> bytes:
    return json.dumps(
        {"id": "p-1", "status": status, "output": ["https://replicate.delivery/x.png"]}
    ).encode()


def standard(body: bytes, secret: str = WHSEC, *, ago: int = 0) -> dict[str, str]:
    at = int(time.time()) - ago
    return {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(at),
        "Webhook-Signature": sign_symmetric(read_secret(secret), "msg_1", at, body),
    }


PATH = "/api/v1/sources/"


def post(service: ApiService, source: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
    answer = service.http.request("POST", service.url + PATH + source, body=body, headers=headers)
    return answer.status, json.loads(answer.data)


def test_a_sender_added_by_configuration(site: Site, service: ApiService) -> None:
    assert post(service, "replicate", prediction("starting"), standard(prediction("starting")))[0] == 200
    assert post(service, "replicate", prediction(), standard(prediction(), ROTATED))[0] == 200
    again = {"webhook-id": "msg_1", "webhook-timestamp": str(int(time.time()))}
    text = message("msg_1", again["webhook-timestamp"], prediction())
    again["webhook-signature"] = "v1a," + base64.b64encode(site.ed25519.sign(text).signature).decode()
    status, answer = post(service, "replicate", prediction(), again)
    assert (status, answer["duplicate"]) == (200, True)
    assert site.rows("status, source, request_id, state, account_id, attempts") == [
        ("completed", "replicate", "p-1", "pending", None, 2),
        ("queued", "replicate", "p-1", "pending", None, 1),
    ]
    (headers,) = site.rows("headers", "status = 'queued'")[0]
    assert set(headers) >= {"webhook-id", "webhook-timestamp", "webhook-signature"}
    assert post(service, "replicate", prediction("failed"), standard(prediction("failed"), ago=900))[0] == 200
    assert site.rows("aside, source", "aside is not null") == [("stale", "replicate")]


def test_an_unknown_source_is_404_and_a_wrong_proof_401(site: Site, service: ApiService) -> None:
    headers = standard(prediction())
    for name in ("stripe", "reconcile", "Replicate", "replicate2", "x" * 200):
        status, answer = post(service, name, prediction(), headers)
        assert (status, answer["error"]) == (404, "unknown_source")
    other = "whsec_" + base64.b64encode(bytes(24)).decode()
    for source, given, reason in (
        ("replicate", standard(prediction(), other), "bad_signature"),
        ("replicate", {}, "missing_header"), ("replicate", {"X-Webhook-Secret": SECRET}, "missing_header"),
        ("replicate", fal(site, prediction()), "missing_header"), ("fal", headers, "missing_header"),
        ("manual", headers, "missing_header"), ("manual", {"X-Webhook-Secret": "wrong"}, "bad_secret"),
    ):  # fmt: skip
        status, answer = post(service, source, prediction(), given)
        assert (status, answer["error"]) == (401, reason), source
    assert site.rows("id") == []
    body = fal_body("req-1")
    assert post(service, "fal", body, fal(site, body))[0] == 200
    assert post(service, "manual", body, {"X-Webhook-Secret": SECRET})[0] == 200
    assert site.rows("source") == [("fal",), ("manual",)]


def test_an_unknown_scheme_refuses_to_start(site: Site) -> None:
    table = json.loads(site.environment["WEBHOOK_SOURCES"])
    table["replicate"]["scheme"] = "hmac-of-my-own"
    for command in ("serve", "worker"):
        ended = subprocess.run(
            [sys.executable, "-m", "webhook_api", command], capture_output=True, text=True, timeout=60, check=False,
            env=process(site.environment | {"WEBHOOK_SOURCES": json.dumps(table)}),
        )  # fmt: skip
        assert ended.returncode == 78, ended.stderr[-2000:]
        assert "hmac-of-my-own" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_what_is_refused_leaves_a_sample_and_no_delivery(site: Site, service: ApiService) -> None:
    body = fal_body("req-1", payload={"x": "y" * 100_000})
    assert service.post(body, fal(site, body, key=new_key()) | {"X-Webhook-Secret": SECRET})[0] == 401
    assert service.post(body, fal(site, body, account="somebody-else"))[0] == 403
    ours = f"body_bytes = {len(body)}"
    service.wait_for(lambda: len(site.rows("slot", ours, table="samples")) == 2, "samples are there", 30)
    columns = "reason, source, instance, body_bytes, octet_length(body), headers, body = %s"
    rows = site.rows(columns.replace("%s", f"'\\x{body[:BODY_MAX].hex()}'::bytea"), ours, table="samples")
    assert [row[0] for row in rows] == ["account_not_allowed", "bad_signature"]
    for row in rows:
        assert row[1:5] == ("fal", "senders-1", len(body), BODY_MAX)
        assert row[6] is True
        assert "x-fal-webhook-signature" in row[5]
        assert SECRET not in json.dumps(row[5])
    assert site.rows("id") == []
    for reason in REASONS:
        told = subprocess.run(
            [sys.executable, "-m", "webhook_api", "keys", "samples", "--reason", reason, "--limit", "1", "--json"],
            capture_output=True, text=True, timeout=60, check=True, env=process(site.environment),
        )  # fmt: skip
        (sample,) = json.loads(told.stdout)
        assert (sample["reason"], base64.b64decode(sample["body"])) == (reason, body[:BODY_MAX])
        assert sample["headers"]["x-fal-webhook-request-id"] == "req-1"


def test_a_flood_of_forgeries_is_sampled_at_a_rate(site: Site, service: ApiService) -> None:
    body = fal_body("req-1")
    headers = fal(site, body, key=new_key())
    limited = metric(service, 'webhook_samples_total{outcome="limited"}')
    for _ in range(60):
        assert service.post(body, headers)[0] == 401
    assert metric(service, 'webhook_samples_total{outcome="limited"}') - limited >= 40
    service.wait_for(lambda: len(site.rows("slot", table="samples")) > 0, "samples are there", 30)
    assert len(site.rows("slot", table="samples")) < 20
    # One fetch at the start; forgeries may cause one more a minute.
    assert site.jwks.requests <= 2 + (time.monotonic() - site.made_at) / 60


def offered(samples: Samples, reason: str, body: bytes) -> None:
    samples.offer(AuthError(reason, "said"), Claims("fal"), {"Content-Type": "application/json"}, body)


def test_samples_never_fill_the_disk(site: Site) -> None:
    endless = {reason: Budget(1e9, 1.0) for reason in REASONS}
    samples = Samples(site.url, "it", budgets=endless)
    count = SLOTS + 40
    for number in range(count):
        offered(samples, "bad_signature", b"%d" % number)
        taken = samples._queue.get_nowait()
        assert taken is not None
        samples.store(taken)
    offered(samples, "account_not_allowed", b"kept whatever the others are")
    taken = samples._queue.get_nowait()
    assert taken is not None
    samples.store(taken)
    samples._forget()
    bodies = {bytes(row[0]) for row in site.rows("body", table="samples")}
    # The service of this file may still have written some that others had sent: by number, not by content.
    assert len(site.rows("slot", "reason = 'bad_signature'", table="samples")) == SLOTS
    # The oldest made room.
    assert b"0" not in bodies
    assert b"%d" % (count - 1) in bodies
    assert b"kept whatever the others are" in bodies


def test_samples_neither_wait_nor_fail_without_a_database() -> None:
    endless = {reason: Budget(1e9, 1.0) for reason in REASONS}
    samples = Samples("postgresql://u@127.0.0.1:1/d", "it", budgets=endless)
    started = time.monotonic()
    for _ in range(2000):
        offered(samples, "bad_signature", b"x" * 1000)
    samples.start()
    for _ in range(2000):
        offered(samples, "bad_signature", b"x" * 1000)
    assert time.monotonic() - started < 10
    assert samples._queue.qsize() <= samples._queue.maxsize
    samples.stop()


def test_the_first_account_is_learned_over_instances_and_restarts(own_site: Site, tmp_path: Path) -> None:
    site = own_site
    environment = site.environment | {"FAL_ACCOUNT_IDS": "", "FAL_ACCOUNT_MODE": "learn"}

    def deliver(service: ApiService, account: str, number: int) -> tuple[int, str]:
        body = fal_body(f"req-{number}")
        status, answer, _, _ = service.post(
            body, fal(site, body, account=account, request_id=f"req-{number}")
        )
        return status, answer["message"]

    with accepting(environment, tmp_path / "a.log") as one, accepting(environment, tmp_path / "b.log") as two:
        assert deliver(one, "user-mine", 1) == (200, "the delivery is stored")
        status, said = deliver(two, "user-other", 2)
        assert status == 200
        assert "kept aside" in said
        shown = two.get("/api/v1/webhook/status")[1]["fal_account"]
        assert (shown["mode"], shown["learned"], shown["persisted"]) == ("learning", "user-mine", True)
    with accepting(environment, tmp_path / "c.log") as again:
        assert "kept aside" in deliver(again, "user-other", 3)[1]
        assert deliver(again, "user-mine", 4)[1] == "the delivery is stored"
    assert site.rows("request_id, state, aside, account_id") == [
        ("req-1", "pending", None, "user-mine"), ("req-2", "dead", "account", "user-other"),
        ("req-3", "dead", "account", "user-other"), ("req-4", "pending", None, "user-mine"),
    ]  # fmt: skip


def test_garbage_at_the_key_server_changes_nothing(own_site: Site, tmp_path: Path) -> None:
    with accepting(own_site.environment, tmp_path / "api.log") as service:
        garbage_at_the_key_server(own_site, service)


def garbage_at_the_key_server(site: Site, service: ApiService) -> None:
    site.jwks.document = b"<html>we are moving</html>"
    body = fal_body("req-1")
    assert service.post(body, fal(site, body, key=new_key()))[0] == 401
    assert service.post(body, fal(site, body))[0] == 200
    # Rotated: the new key is not known yet, and the last fetch has just failed. Not for ever.
    new = new_key()
    site.jwks.document = jwks(site.key, new)
    console = subprocess.run(
        [sys.executable, "-m", "webhook_api", "keys", "refresh"],
        capture_output=True, text=True, timeout=60, check=False, env=process(site.environment),
    )  # fmt: skip
    assert console.returncode == 0, console.stderr
    service.wait_for(
        lambda: service.post(body, fal(site, body, key=new))[0] == 200, "the rotated key is known", 60
    )


def test_the_previous_release_works_on_this_schema(site: Site) -> None:
    """Expand and contract: the statement of the first release, which knows no `aside`, still stores."""
    old = """insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256, headers, state)
             values (%s, 'r', 'completed:1', 'completed', '', repeat('0', 64), '{}', 'pending')"""
    with psycopg.connect(site.url, autocommit=True) as connection:
        for source in ("fal", "manual", "replicate"):
            connection.execute(old.encode(), (source,))
        for source in ("", "Fal", "a b", "x" * 33):
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute(old.encode(), (source,))
        unvalidated = """select conname from pg_constraint
                         where not convalidated and conname in ('deliveries_source', 'deliveries_aside_reason')"""
        assert connection.execute(unvalidated.encode()).fetchall() == []


def test_the_identity_is_unique_over_one_whole_table(site: Site) -> None:
    """Over a table that is partitioned by time the same constraint would have to hold the time, and end deduplication."""
    identity_of = """
        select c.relkind::text, i.indisvalid and i.indpred is null,
               array(select a.attname::text from unnest(k.conkey) as n (number)
                     join pg_attribute a on a.attrelid = k.conrelid and a.attnum = n.number order by 1)
        from pg_constraint k join pg_class c on c.oid = k.conrelid join pg_index i on i.indexrelid = k.conindid
        where k.conname = 'deliveries_identity' and k.contype = 'u'"""
    with psycopg.connect(site.url) as connection:
        assert connection.execute(identity_of.encode()).fetchall() == [
            ("r", True, ["dedup_key", "request_id", "source"])
        ]


def test_a_worker_reads_the_bodies_of_a_configured_sender(
    database_url: str, redis_url: str, s3: Any, tmp_path: Path
) -> None:
    """Its status and its result are those of its own shape; the table's secret files are not the worker's business."""
    table = {"replicate": {"scheme": "standard", "shape": "replicate", "secrets": [{"file": "/nowhere"}]}}
    with lab(database_url, redis_url, s3, tmp_path) as bench:
        bench.make_bot_tables()
        bench.avatar("p-1", kind="style")
        with bench.worker(WEBHOOK_SOURCES=json.dumps(table)):
            document = {"id": "p-1", "status": "succeeded", "output": {"finetune_id": "ft-replicate"}}
            verified = Verified("replicate", "msg_1", age=1.0, shape="replicate")
            row = acceptance.delivery(verified, json.dumps(document).encode(), {}, edge_request_id="e")
            identifier = store_one(bench.connection, row).id
            assert identifier is not None
            bench.connection.execute("notify webhook_deliveries")
            bench.wait_state(identifier, "done")
        avatar = bench.row("p-1")
        assert (avatar["status"], avatar["finetune_id"]) == ("completed", "ft-replicate")
        assert [entry["source"] for entry in bench.entries()] == ["replicate"]
