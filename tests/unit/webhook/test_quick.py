"""The quick way and Flask's: the same requests through both, and nothing may tell them apart."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from nacl.signing import SigningKey
from prometheus_client import REGISTRY
from webhook_api import quick as quick_module
from webhook_api.app import create_app
from webhook_api.config import load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.inbox import Delivery, Stored
from webhook_api.quick import Quick
from webhook_api.server import wsgi
from webhook_api.server.request import Fault, Reader, Request
from webhook_api.services import Services
from webhook_api.shapes import SHAPES

from tests.support.falfake import ACCOUNT, SECRET, delivery, fal_body, jwks, new_key, signed

URL = "/api/v1/avatar/status_update"
LIMIT = 131_072


class MemoryInbox:
    """An inbox that decides as the real one does, by identity. ``error``: the database is away."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, str], list[Delivery]] = {}
        self.error: Exception | None = None
        self.undecided = False
        self.batches: list[int] = []
        self.available = True

    def store(self, arrived: Delivery, *, until: float | None = None) -> Stored:
        assert until is None or until > time.monotonic() - 60
        if self.error:
            raise self.error
        known = self.seen.setdefault(arrived.identity, [])
        known.append(arrived)
        other = known[0].body_sha256 != arrived.body_sha256
        return Stored(len(self.seen), len(known) == 1, len(known), other)

    def store_many(
        self, deliveries: Sequence[Delivery], until: float
    ) -> Sequence[Stored | DatabaseUnavailable | None]:
        self.batches.append(len(deliveries))
        if self.undecided:
            return [None] * len(deliveries)
        if isinstance(self.error, DatabaseUnavailable):
            return [self.error] * len(deliveries)
        return [self.store(arrived) for arrived in deliveries]


@dataclass
class Lab:
    """One service without sockets, and both ways through it."""

    app: Flask
    inbox: MemoryInbox
    key: SigningKey

    @property
    def quick(self) -> Quick:
        found = self.app.extensions["quick"]
        assert isinstance(found, Quick)
        return found

    def request(self, raw: bytes) -> Request:
        reader = Reader(self.quick.gate)
        reader.feed(raw)
        assert reader.fault is None, reader.fault
        return reader.ready.popleft()

    def ordinary(self, raw: bytes) -> bytes:
        request = self.request(raw)
        environ = wsgi.environ(request, ("127.0.0.1", 1), ("127.0.0.1", 2))
        return wsgi.run(self.app, environ, keep_alive=request.keep_alive)

    def quickly(self, raw: bytes) -> bytes | None:
        """None: not taken."""
        request = self.request(raw)
        if request.refused:
            return None
        ticket = object()
        taken = self.quick.take(request, request.keep_alive, ticket)
        if not isinstance(taken, bool):
            return taken
        if not taken:
            return None
        self.quick.flush()
        (found,) = self.decided(1)
        assert found[0] is ticket
        return found[1]

    def decided(self, count: int) -> list[tuple[Any, bytes]]:
        deadline, found = time.monotonic() + 30, self.quick.finished()
        while len(found) < count:
            assert time.monotonic() < deadline, "nothing was decided"
            time.sleep(0.001)
            found += self.quick.finished()
        return found


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    # A busy machine must not make a delivery late.
    monkeypatch.setattr(quick_module, "INTAKE_DEADLINE", 60)
    key, inbox = new_key(), MemoryInbox()
    (tmp_path / "jwks.json").write_bytes(jwks(key))
    settings = load_settings(
        {
            "DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1",
            "MINIO_ENDPOINT": "127.0.0.1:1", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b",
            "FAL_WEBHOOK_SECRET": SECRET, "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_FILE": str(tmp_path / "jwks.json"),
            "WEBHOOK_BODY_LIMIT_BYTES": str(LIMIT), "INSTANCE_ID": "unit-1",
        }
    )  # fmt: skip
    services = Services(settings)
    services.inbox = inbox
    services.keys.warm()
    made = Lab(create_app(settings, services), inbox, key)
    made.quick.start()
    yield made
    made.quick.stop()


def raw(body: bytes, headers: dict[str, str], target: str = URL, method: str = "POST") -> bytes:
    named = {"Host": "x", "X-Request-Id": "edge-1", **headers}
    named.setdefault("Content-Length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


def manual(document: Any, target: str = URL, **headers: str) -> bytes:
    body = json.dumps(document).encode()
    return raw(body, {"X-Webhook-Secret": SECRET, "Content-Type": "application/json", **headers}, target)


def shaped(name: str) -> Callable[[Lab], bytes]:
    def build(lab: Lab) -> bytes:
        sent = delivery(name, lab.key, request_id="same")
        return raw(sent.body, sent.headers)

    return build


def fal(body: bytes, **extra: Any) -> Callable[[Lab], bytes]:
    def build(lab: Lab) -> bytes:
        target = extra.pop("target", URL)
        headers = signed(lab.key, body, request_id="same", timestamp=int(time.time())) | extra
        return raw(body, headers, target)

    return build


PLAIN = [
    name for name, shape in SHAPES.items()
    if shape.transport == "plain" and not shape.large and shape.needs != "standard"
]  # fmt: skip
REQUESTS: dict[str, Callable[[Lab], bytes]] = {
    **{f"shape {name}": shaped(name) for name in PLAIN},
    "a type in the query": fal(fal_body("same"), target=f"{URL}?training_type=Portrait&x=1"),
    "an odd query": fal(fal_body("same"), target=f"{URL}?&&=;%00training_type&a=%ff"),
    "a quote in the id": lambda _: manual({"request_id": 'quo"te\\', "status": "completed"}),
    "fal and a secret": fal(fal_body("same"), **{"X-Webhook-Secret": SECRET}),
    "compressed": lambda _: manual({"request_id": "z", "status": "queued"}, **{"Content-Encoding": "gzip"}),
    "identity coding": lambda _: manual({"request_id": "z", "status": "queued"}, **{"Content-Encoding": "identity"}),
    "nonsense for an edge id": lambda _: manual({"request_id": "z", "status": "queued"}, **{"X-Request-Id": "edge-1"}),
    "a connection that ends": lambda _: manual({"request_id": "z", "status": "queued"}, Connection="close"),
    "an unknown source": lambda _: manual({"request_id": "z", "status": "queued"}, "/api/v1/sources/nobody"),
    "the manual source": lambda _: manual({"request_id": "z", "status": "queued"}, "/api/v1/sources/manual"),
    "fal by name": lambda lab: fal(fal_body("same"), target="/api/v1/sources/fal")(lab),
    "a source with a slash": lambda _: manual({"request_id": "z", "status": "queued"}, "/api/v1/sources/fal/"),
    "the path encoded": lambda _: manual({"request_id": "z", "status": "queued"}, URL.replace("_", "%5F")),
    "the test": lambda _: manual({"request_id": "z", "status": "queued"}, "/api/v1/avatar/test_webhook"),
    "another method": lambda lab: raw(b"{}", {"X-Webhook-Secret": SECRET}, method="PUT"),
    "a body above what is read at once": lambda _: manual({"request_id": "z", "status": "queued", "x": "y" * 70_000}),
    "NaN of fal": fal(b'{"request_id":"same","status":"OK","payload":{"loss":NaN,"n":' + b"9" * 5000 + b"}}"),
    "NaN of a person": lambda _: raw(b'{"request_id":"z","status":"queued","x":NaN}', {"X-Webhook-Secret": SECRET}),
    "another id in the header": fal(fal_body("other")),
    "the gateway's id in the header": fal(fal_body("other", gateway_request_id="same")
                                          if False else b'{"request_id":"a","gateway_request_id":"same","status":"OK"}'),
    "a probe": lambda _: manual({"request_id": "probe-1", "status": "completed"}),
}  # fmt: skip


def parsed(answer: bytes) -> tuple[str, dict[str, str], Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    headers.pop("date")
    return lines[0], headers, json.loads(body)


def counters() -> dict[Any, float]:
    """Every counter and the count of every histogram; not their times."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for metric in REGISTRY.collect() if metric.name.startswith("webhook_")
        for sample in metric.samples if sample.name.endswith(("_total", "_count"))
    }  # fmt: skip


def observed(
    call: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> tuple[Any, dict[Any, float], list[Any]]:
    """What a call returns, by how much it moves the metrics, and what it logs."""
    caplog.clear()
    before = counters()
    result = call()
    moved = {
        name: value - before.get(name, 0)
        for name, value in counters().items()
        if value != before.get(name, 0)
    }
    plain = logging.makeLogRecord({}).__dict__
    lines = [
        (record.levelname, record.getMessage(), {
            name: value for name, value in record.__dict__.items()
            if name not in plain and name not in {"duration_ms", "age_seconds", "message", "taskName", "asctime"}
        })
        for record in caplog.records
    ]  # fmt: skip
    return result, moved, lines


@pytest.mark.parametrize("name", REQUESTS)
def test_both_ways_are_the_same(lab: Lab, caplog: pytest.LogCaptureFixture, name: str) -> None:
    caplog.set_level(logging.INFO)
    request = REQUESTS[name](lab)
    ordinary, moved, lines = observed(lambda: lab.ordinary(request), caplog)
    stored = {key: [(row, row.headers) for row in rows] for key, rows in lab.inbox.seen.items()}
    again = lab.ordinary(request)
    lab.inbox.seen.clear()
    quick, moved_quickly, lines_quickly = observed(lambda: lab.quickly(request), caplog)
    if quick is None:
        # Nothing may have been stored or said before the ordinary way decides.
        assert not lab.inbox.seen
        assert not lines_quickly
        return
    assert parsed(quick) == parsed(ordinary)
    assert moved_quickly == moved
    assert lines_quickly == lines
    assert {key: [(row, row.headers) for row in rows] for key, rows in lab.inbox.seen.items()} == stored
    # And a second time: the same answer to a duplicate.
    assert parsed(lab.quickly(request) or b"") == parsed(again)


def test_what_is_ordinary_goes_the_quick_way(lab: Lab) -> None:
    """Were all of it left to Flask, the test above would hold as well."""
    accepted = [name for name in PLAIN if SHAPES[name].expect == 200 and name not in {"empty", "too-deep"}]
    assert len(accepted) > 10
    for name in accepted:
        assert lab.quickly(shaped(name)(lab)) is not None, name
    for name in ("forged", "tampered", "missing-header", "wrong-secret", "unauthenticated", "other-account"):
        assert lab.quickly(shaped(name)(lab)) is None, name


@pytest.mark.parametrize("undecided", [False, True])
def test_deliveries_at_once_share_a_batch(lab: Lab, undecided: bool) -> None:
    lab.inbox.undecided = undecided
    for number in range(20):
        assert lab.quick.take(
            lab.request(manual({"request_id": f"r{number}", "status": "queued"})), True, number
        )
    lab.quick.flush()
    found = dict(lab.decided(20))
    assert lab.inbox.batches == [20]
    assert {parsed(answer)[2]["request_id"] for answer in found.values()} == {f"r{n}" for n in range(20)}
    for number, answer in found.items():
        assert parsed(answer)[2]["request_id"] == f"r{number}"


@pytest.mark.parametrize("undecided", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (DatabaseUnavailable("no_connection", "down"), "503 SERVICE UNAVAILABLE", "no_connection"),
        (RuntimeError("secret detail"), "500 INTERNAL SERVER ERROR", "internal"),
    ],
)
def test_a_failed_write_is_answered_as_flask_answers_it(
    lab: Lab, caplog: pytest.LogCaptureFixture, error: Exception, status: str, reason: str, undecided: bool
) -> None:
    lab.inbox.error, lab.inbox.undecided = error, undecided
    request = manual({"request_id": "r", "status": "queued"})
    ordinary, moved, lines = observed(lambda: lab.ordinary(request), caplog)
    quick, moved_quickly, lines_quickly = observed(lambda: lab.quickly(request), caplog)
    line, headers, document = parsed(quick)
    assert (headers, document) == parsed(ordinary)[1:]
    assert line.upper() == f"HTTP/1.1 {status}"
    assert document["error"] == reason
    assert b"secret detail" not in quick
    assert moved_quickly == moved
    assert [line[:2] for line in lines_quickly] == [line[:2] for line in lines if line[1] != "request"]


def test_too_many_waiting_is_a_fast_503(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_module, "WAITING", 3)
    held = threading.Event()
    monkeypatch.setattr(
        lab.inbox, "store_many", lambda deliveries, until: held.wait(30) and [None] * len(deliveries)
    )
    for number in range(3):
        assert (
            lab.quick.take(
                lab.request(manual({"request_id": f"r{number}", "status": "queued"})), True, number
            )
            is True
        )
    lab.quick.flush()
    answer = lab.quick.take(lab.request(manual({"request_id": "r4", "status": "queued"})), True, 4)
    assert isinstance(answer, bytes)
    line, headers, document = parsed(answer)
    assert line.startswith("HTTP/1.1 503")
    assert (document["error"], document["request_id"]) == ("busy", "edge-1")
    assert int(headers["retry-after"]) > 0
    held.set()
    assert len(lab.decided(3)) == 3
    assert lab.quickly(manual({"request_id": "r5", "status": "queued"})) is not None


def test_whose_time_went_by_before_its_turn_is_a_503_and_is_not_tried(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a queue of late ones would keep everyone behind it waiting too."""
    held, began = threading.Event(), threading.Event()
    tried: list[str] = []

    def store_many(deliveries: list[Any], until: float) -> list[Any]:
        tried.extend(delivery.request_id for delivery in deliveries)
        began.set()
        held.wait(30)
        return [DatabaseUnavailable("no_connection", "away")] * len(deliveries)

    monkeypatch.setattr(lab.inbox, "store_many", store_many)

    def send(name: str, seconds: float) -> None:
        monkeypatch.setattr(quick_module, "INTAKE_DEADLINE", seconds)
        assert lab.quick.take(lab.request(manual({"request_id": name, "status": "queued"})), True, name)
        lab.quick.flush()

    send("first", 60)
    assert began.wait(30)
    send("late", 0)
    send("punctual", 60)
    held.set()
    found = {name: parsed(answer)[2]["error"] for name, answer in lab.decided(3)}
    assert found == {"first": "no_connection", "late": "timeout", "punctual": "no_connection"}
    assert tried == ["first", "punctual"]


def test_unknown_keys_are_left_to_who_may_wait(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = lab.quick._intake.authenticator.fal._keys  # type: ignore[attr-defined]
    monkeypatch.setattr(keys, "_known", None)
    monkeypatch.setattr(keys, "_fetch", lambda *_, **__: pytest.fail("the loop would wait"))
    assert lab.quickly(shaped("portrait-ok")(lab)) is None


def gate(lab: Lab, head: bytes) -> Reader:
    reader = Reader(lab.quick.gate)
    reader.feed(head)
    return reader


def test_a_large_body_that_will_be_refused_is_not_read(lab: Lab) -> None:
    for headers in (
        "X-Webhook-Secret: wrong",
        "X-Other: x",
        f"X-Webhook-Secret: {SECRET}\r\nContent-Encoding: gzip",
    ):
        reader = gate(
            lab, f"POST {URL} HTTP/1.1\r\nHost: x\r\n{headers}\r\nContent-Length: 100000\r\n\r\n{{".encode()
        )
        assert reader.turned_away
        assert reader.ready[0].refused
    reader = gate(
        lab,
        f"POST {URL} HTTP/1.1\r\nX-Webhook-Secret: {SECRET}\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode(),
    )
    assert reader.turned_away
    reader = gate(
        lab, f"POST {URL} HTTP/1.1\r\nX-Webhook-Secret: {SECRET}\r\nContent-Length: {LIMIT}\r\n\r\n".encode()
    )
    assert not reader.turned_away
    assert reader.fault is None


def test_a_path_in_other_words_has_the_limit_of_deliveries_as_well(lab: Lab) -> None:
    encoded = URL.replace("_", "%5F")
    reader = gate(
        lab,
        f"POST {encoded} HTTP/1.1\r\nX-Webhook-Secret: {SECRET}\r\nContent-Length: 100000\r\n\r\n".encode(),
    )
    assert not reader.turned_away


def test_a_delivery_without_any_length_is_411(lab: Lab) -> None:
    reader = gate(lab, f"POST {URL} HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: {SECRET}\r\n\r\n".encode())
    assert isinstance(reader.fault, Fault)
    assert reader.fault.reason == "length_required"
