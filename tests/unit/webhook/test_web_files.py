"""Files of a delivery without an object store: what is named, what arrives, what is refused, and who may."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from minio.error import S3Error
from webhook_api.config import NEEDS_CONSOLE, ConfigError, load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.web import deeds, files, lists
from webhook_api.web.accounts import Who
from webhook_api.web.app import create_app
from webhook_api.web.files import FileFault, Files, Stored, find, harmless_delivery, stored, whole

BASE = "https://localhost"
DATA = b"lora" * 100
KEY = "webhooks/fal/r-1/payload.lora/pytorch_lora.safetensors"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def row(**artifact: Any) -> dict[str, Any]:
    entry = {"key": KEY, "state": "stored", "size": len(DATA), "sha256": digest(DATA), **artifact}
    missing = {"key": "webhooks/fal/r-1/payload.config/config.json", "state": "missing"}
    return {
        "id": 7,
        "effects": [
            {"name": "archive", "detail": {"artifacts": [entry, missing]}},
            {"name": "raw_archive", "detail": {"key": "deliveries/segments/s.ndjson", "offset": 10, "length": 20,
                                               "sha256": "0" * 64}},
            {"name": "stream", "detail": {"entry": "1-0"}},
        ],
    }  # fmt: skip


class Coming:
    """An object on its way, in pieces."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = pieces
        self.closed = self.released = 0

    def stream(self, _: int | None = None, decode_content: bool | None = None) -> Iterator[bytes]:
        assert decode_content is False
        for piece in self._pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def close(self) -> None:
        self.closed += 1

    def release_conn(self) -> None:
        self.released += 1


class Store:
    """A client that only reads: anything else is an AttributeError."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self.data = data
        self.read: list[tuple[str, int, int]] = []

    def stat_object(self, _: str, key: str) -> Any:
        if key not in self.data:
            raise S3Error(SimpleNamespace(status=404), "NoSuchKey", "no", key, "", "")  # type: ignore[arg-type]
        return SimpleNamespace(size=len(self.data[key]))

    def get_object(self, _: str, key: str, offset: int = 0, length: int = 0) -> Any:
        self.read.append((key, offset, length))
        return Coming(self.data[key][offset : offset + length])


def files_of(data: dict[str, bytes], most: int = 10**6) -> Files:
    return Files(Store(data), "bucket", most)  # type: ignore[arg-type]


# What is named


def test_the_delivery_comes_first_and_only_what_is_stored() -> None:
    found = stored(row())
    assert [(item.name, item.delivery, item.part) for item in found] == [
        ("delivery-7.json", True, (10, 20)),
        ("pytorch_lora.safetensors", False, None),
    ]
    assert find(row(), found[1].mark) == found[1]
    assert find(row(), "0" * 16) is None
    assert find(row(), KEY) is None


def test_records_of_older_releases_name_no_place() -> None:
    old = {"id": 1, "effects": [{"name": "raw_archive", "detail": {"key": "deliveries/fal/r/1.json"}}]}
    (item,) = stored(old)
    assert (item.part, item.size, item.sha256) == (None, None, None)


@pytest.mark.parametrize(("key", "name"), [
    ('a/b"\r\nSet-Cookie: x', "b_Set-Cookie_x"), ("a/..", "file"), ("a/", "file"), ("a/\u202egpj.exe", "_gpj.exe"),
    ("a/" + "x" * 500, "x" * 120),
])  # fmt: skip
def test_a_name_is_safe_in_a_header_and_on_a_disk(key: str, name: str) -> None:
    assert stored(row(key=key))[1].name == name


# What arrives


def test_what_was_stored_arrives_whole() -> None:
    pieces = [DATA[:100], DATA[100:250], DATA[250:]]
    assert b"".join(whole(Coming(*pieces), len(DATA), digest(DATA), lambda: 0.0)) == DATA
    assert list(whole(Coming(), 0, digest(b""), lambda: 0.0)) == []


@pytest.mark.parametrize("pieces", [
    (DATA[:100], DATA[100:-1] + b"x"), (DATA[:100], DATA[100:-1]), (DATA[:100], DATA[100:], b"more"), (),
    (DATA[:100], OSError("cut off")),
])  # fmt: skip
def test_what_was_changed_does_not_arrive_whole(pieces: tuple[Any, ...]) -> None:
    came = taken(whole(Coming(*pieces), len(DATA), digest(DATA), lambda: 0.0))
    assert len(came) < len(DATA)


def taken(pieces: Iterator[bytes]) -> bytes:
    """What came before it was cut off."""
    came: list[bytes] = []

    def take() -> None:
        for piece in pieces:
            came.append(piece)

    with pytest.raises(FileFault):
        take()
    return b"".join(came)


def test_the_last_piece_waits_for_the_digest() -> None:
    assert taken(whole(Coming(b"a" * 10, b"b" * 10), 20, digest(b"other"), lambda: 0.0)) == b"a" * 10


def test_a_download_that_takes_for_ever_ends() -> None:
    times = iter([0.0, 1.0, files.SECONDS + 1])
    with pytest.raises(FileFault):
        list(whole(Coming(DATA[:9], DATA[9:]), len(DATA), digest(DATA), lambda: next(times)))


def test_a_delivery_keeps_its_bytes_unless_a_header_is_withheld() -> None:
    data = json.dumps({"headers": {"x-fal-webhook-signature": "ab"}, "body_base64": "e30="}).encode() + b"\n"
    assert harmless_delivery(data) == data
    secret = json.dumps({"headers": {"X-Webhook-Secret": "s3cr3t", "A": "b"}, "body_base64": "e30="}).encode()
    shown = harmless_delivery(secret)
    assert b"s3cr3t" not in shown
    assert json.loads(shown) == {"headers": {"X-Webhook-Secret": "***", "A": "b"}, "body_base64": "e30="}
    for odd in (b"", b"[1]", b'{"headers": 5}', b"[" * 100_000):
        with pytest.raises(FileFault):
            harmless_delivery(odd)


# What is read


def test_only_the_deliverys_own_line_of_a_segment_is_read() -> None:
    lines = [json.dumps({"headers": {}, "delivery_id": number}).encode() + b"\n" for number in range(3)]
    item = Stored(
        "s", "d.json", len(lines[1]), digest(lines[1]), (len(lines[0]), len(lines[1])), delivery=True
    )
    reader = files_of({"s": b"".join(lines)})
    found = reader.open(item)
    assert b"".join(found.pieces) == lines[1]
    assert found.size == len(lines[1])
    assert reader._client.read == [("s", len(lines[0]), len(lines[1]))]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("data", "item", "reason"), [
    ({}, Stored(KEY, "x"), "file_missing"),
    ({KEY: DATA}, Stored(KEY, "x", 5), "file_differs"),
    ({KEY: b"x" * 2000}, Stored(KEY, "x"), "file_large"),
    ({KEY: DATA}, Stored(KEY, "x", 20, None, (len(DATA), 20), delivery=True), "file_differs"),
    ({KEY: b"x" * 20}, Stored(KEY, "x", 20, "0" * 64, (0, 20), delivery=True), "file_differs"),
])  # fmt: skip
def test_what_cannot_be_given_is_refused_by_reason(data: dict[str, bytes], item: Stored, reason: str) -> None:
    with pytest.raises(FileFault) as caught:
        files_of(data, most=1000).open(item)
    assert caught.value.reason == reason


def test_a_large_delivery_is_not_taken_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "DELIVERY_MOST", 10)
    with pytest.raises(FileFault, match="has 11 bytes"):
        files_of({"s": b"x" * 11}).open(Stored("s", "d.json", 11, None, (0, 11), delivery=True))


# Settings


def test_files_are_given_only_with_the_stores_keys() -> None:
    base = {"DATABASE_URL": "postgresql://u@h/d", "MINIO_ENDPOINT": "s3:9000"}
    assert files.reader(load_settings(base, NEEDS_CONSOLE)) is None
    keys = {**base, "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b"}
    assert files.reader(load_settings(keys, NEEDS_CONSOLE)) is not None
    with pytest.raises(ConfigError, match="MINIO_SECRET_KEY"):
        load_settings({**base, "MINIO_SECRET_KEY_FILE": "/nonexistent/key"}, NEEDS_CONSOLE)


# HTTP


class Lent:
    """Connections that nobody needs, and what was recorded."""

    def __init__(self, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded: list[tuple[Any, ...]] = []
        self.away = False
        self.services = app.extensions["services"]
        self.services.files = files_of({KEY: DATA})

        @contextmanager
        def lend() -> Iterator[Any]:
            if self.away:
                raise DatabaseUnavailable("connection_lost", "x")
            yield None

        monkeypatch.setattr(self.services, "write", lend)
        monkeypatch.setattr(self.services, "read", contextmanager(lambda: iter([None])))
        monkeypatch.setattr(
            lists, "delivery", lambda _, identifier, bodies: row() if identifier == 7 else None
        )
        monkeypatch.setattr(deeds, "fetched", lambda *values: self.recorded.append(values[1:]))

    def be(self, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def recognise() -> None:
            from flask import g

            g.who, g.token = Who("maria", role), "t"

        monkeypatch.setattr("webhook_api.web.gate.recognise", recognise)

    @property
    def free(self) -> int:
        return int(self.services.downloads._value)


@pytest.fixture
def app() -> Flask:
    return create_app(load_settings({"DATABASE_URL": "postgresql://u@127.0.0.1:1/d"}, NEEDS_CONSOLE))


@pytest.fixture
def lent(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Lent:
    made = Lent(app, monkeypatch)
    made.be("operator", monkeypatch)
    return made


@pytest.fixture
def client(app: Flask, lent: Lent) -> FlaskClient:
    return app.test_client()


ADDRESS = f"/deliveries/7/files/{stored(row())[1].mark}"


def test_a_file_is_recorded_and_sent_as_bytes_that_no_browser_opens(client: FlaskClient, lent: Lent) -> None:
    before = lent.free
    answer = client.get(ADDRESS, base_url=BASE)
    assert answer.status_code == 200
    assert answer.data == DATA
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == 'attachment; filename="pytorch_lora.safetensors"'
    assert answer.headers["Content-Length"] == str(len(DATA))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"
    assert lent.recorded == [
        (Who("maria", "operator"), lent.services.settings.instance_id, 7, KEY, len(DATA))
    ]
    answer.close()
    assert lent.free == before


def test_viewers_get_no_files(client: FlaskClient, lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    lent.be("viewer", monkeypatch)
    assert client.get(ADDRESS, base_url=BASE).status_code == 403
    assert lent.recorded == []
    assert lent.services.files._client.read == []


def test_what_is_not_recorded_has_no_address(client: FlaskClient, lent: Lent) -> None:
    mark = stored(row())[1].mark
    for path in (f"/deliveries/8/files/{mark}", "/deliveries/7/files/0000000000000000", f"/deliveries/{2**70}/files/{mark}",
                 "/deliveries/7/files/..%2f..%2fother", f"/deliveries/7/files/{KEY}"):  # fmt: skip
        assert client.get(path, base_url=BASE).status_code == 404, path
    lent.services.files = None
    assert client.get(ADDRESS, base_url=BASE).status_code == 404
    assert lent.recorded == []


def test_a_file_that_is_gone_says_so_and_is_not_recorded(client: FlaskClient, lent: Lent) -> None:
    before = lent.free
    lent.services.files = files_of({})
    answer = client.get(ADDRESS, base_url=BASE)
    assert answer.status_code == 404
    assert "does not have this file" in answer.text
    assert (lent.recorded, lent.free) == ([], before)


def test_nothing_is_sent_that_cannot_be_recorded(client: FlaskClient, lent: Lent) -> None:
    before, lent.away = lent.free, True
    answer = client.get(ADDRESS, base_url=BASE)
    assert answer.status_code == 503
    assert DATA not in answer.data
    assert lent.free == before


def test_downloads_at_once_are_bounded(client: FlaskClient, lent: Lent) -> None:
    while lent.services.downloads.acquire(blocking=False):
        pass
    answer = client.get(ADDRESS, base_url=BASE)
    assert answer.status_code == 503
    assert "Too many files" in answer.text
    lent.services.downloads.release()
    with client.get(ADDRESS, base_url=BASE) as answer:
        assert answer.status_code == 200


def test_programs_get_files_with_an_operators_token(
    client: FlaskClient, lent: Lent, monkeypatch: pytest.MonkeyPatch
) -> None:
    for role, status in (("operator", 200), ("viewer", 403)):
        monkeypatch.setattr("webhook_api.web.gate.bearer", lambda role=role: Who("token:ci", role))
        with client.get("/api/v1/console" + ADDRESS, base_url=BASE) as answer:
            assert answer.status_code == status
            assert (answer.data == DATA) == (status == 200)
    assert [values[0].name for values in lent.recorded] == ["token:ci"]
