"""What the service keeps outside PostgreSQL, written to a stream and read back into another place."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from minio import Minio
from webhook_api.backup import BackupError, objects, state, streams
from webhook_api.inbox import Delivery
from webhook_api.inbox.spoolfile import Entry, SpoolFile

from tests.support.workerlab import Bucket

pytestmark = pytest.mark.backends
MARK = f"backup-{uuid.uuid4().hex[:12]}"
HERE, THERE = f"{MARK}-a", f"{MARK}-b"
STREAM, OTHER = f"{MARK}:[test]:events", f"{MARK}:other"


@pytest.fixture
def store(s3: Bucket) -> Iterator[Minio]:
    client = Minio(
        s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False, region="us-east-1"
    )
    yield client
    for bucket in (HERE, THERE):
        if client.bucket_exists(bucket):
            for found in client.list_objects(bucket, recursive=True):
                client.remove_object(bucket, str(found.object_name))
            client.remove_bucket(bucket)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    made = streams.client_of(redis_url, None)
    made.delete(*[*made.keys(f"*{MARK}*"), b"none"])
    yield made
    made.delete(*[*made.keys(f"*{MARK}*"), b"none"])
    made.close()


def digests(client: Minio, bucket: str) -> dict[str, tuple[str, str, str | None]]:
    """Digest, type and recorded digest of each object."""
    found = {}
    for entry in client.list_objects(bucket, recursive=True):
        key = str(entry.object_name)
        answer: Any = client.get_object(bucket, key)
        data = answer.read()
        headers = {name.lower(): value for name, value in answer.headers.items()}
        found[key] = (
            hashlib.sha256(data).hexdigest(),
            headers["content-type"],
            headers.get("x-amz-meta-sha256"),
        )
        answer.close()
        answer.release_conn()
    return found


def exported(export: Any, *arguments: Any) -> io.BytesIO:
    stream = io.BytesIO()
    export(*arguments, stream)
    stream.seek(0)
    return stream


def test_every_object_comes_back_with_its_type_and_metadata(store: Minio) -> None:
    store.make_bucket(HERE)
    large = os.urandom(11 * 1024 * 1024)
    for key, data in {"a/b.json": b"{}", "a/leer": b"", "ä ö/ü+%.bin": b"x", "groß.bin": large}.items():
        digest = hashlib.sha256(data).hexdigest()
        kind = "application/json" if key.endswith("json") else "application/octet-stream"
        store.put_object(
            HERE, key, io.BytesIO(data), len(data), content_type=kind, metadata={"sha256": digest}
        )
    stream = exported(objects.export, store, HERE)
    assert objects.measure(store, HERE).count == 4
    assert objects.restore(store, THERE, stream).count == 4
    assert digests(store, THERE) == digests(store, HERE)


def test_a_stream_that_was_cut_off_is_told(store: Minio, client: redis.Redis, tmp_path: Path) -> None:
    store.make_bucket(HERE)
    for number in range(5):
        store.put_object(HERE, f"{number}", io.BytesIO(b"x" * 2000), 2000)
    whole = exported(objects.export, store, HERE).getvalue()
    for length in (0, 3000, 9000, len(whole) - 10240 - 1024):
        with pytest.raises(BackupError) as caught:
            objects.restore(store, THERE, io.BytesIO(whole[:length]))
        assert caught.value.reason == "truncated", length
    with pytest.raises(BackupError) as caught:
        streams.restore(client, io.BytesIO(whole))
    assert caught.value.reason == "foreign"


def test_the_stream_keeps_groups_and_markers(client: redis.Redis) -> None:
    marker = f"{{{STREAM}}}:sent:0123"
    for number in range(3):
        client.xadd(STREAM, {"delivery_id": number})
    client.xgroup_create(STREAM, "bot", id="0")
    client.xreadgroup("bot", "one", {STREAM: ">"}, count=2)
    client.set(marker, "1-1", ex=1000)
    client.set(OTHER, "not ours")
    entries, groups = client.xrange(STREAM), client.xinfo_groups(STREAM)
    stream = exported(streams.export, client, STREAM)
    client.delete(STREAM, marker, OTHER)
    assert streams.restore(client, stream).count == 2
    assert client.xrange(STREAM) == entries
    assert client.xinfo_groups(STREAM) == groups
    assert client.get(marker) == b"1-1"
    assert 0 < client.ttl(marker) <= 1000
    assert not client.exists(OTHER)


def delivery(request_id: str) -> Delivery:
    body = request_id.encode()
    return Delivery(
        source="fal", request_id=request_id, dedup_key="completed", status="completed", body=body,
        body_sha256=hashlib.sha256(body).hexdigest(), headers={}, edge_request_id="e",
    )  # fmt: skip


def test_the_spool_is_copied_whole_while_it_is_written_to(tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b"
    (here / "spool").mkdir(parents=True)
    there.mkdir()
    (here / "fal-jwks.json").write_text("{}")
    file = SpoolFile.create(here / "spool")
    for number in range(50):
        file.append([Entry(delivery(f"before-{number}"), 1.0)])
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            file.append([Entry(delivery(f"during-{number}"), 2.0)])
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        stream = exported(state.export, here)
    finally:
        stop.set()
        writer.join()
    assert not list(here.glob(".backup-*"))
    assert state.restore(there, stream).count == 2
    copy = SpoolFile.adopt(next((there / "spool").glob("*.spool")))
    assert copy is not None
    assert copy.id == file.id
    found = set(copy.request_ids())
    assert {f"before-{number}" for number in range(50)} <= found
    assert found <= set(file.request_ids())
    copy.close()
    file.close()


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    for name in ("state/../../evil", "state//etc/evil", "state/a/b/c"):
        stream = io.BytesIO()
        with tarfile.open(mode="w", fileobj=stream) as tar:
            tar.addfile(tarfile.TarInfo(name))
        stream.seek(0)
        with pytest.raises(BackupError) as caught:
            state.restore(tmp_path, stream)
        assert caught.value.reason == "foreign"
    assert list(tmp_path.iterdir()) == []
