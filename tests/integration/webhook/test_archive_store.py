"""The archive against a real object store and a media host that misbehaves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from time import monotonic, sleep
from typing import Any

import pytest
from minio.error import MinioException
from webhook_api import trace
from webhook_api.effects import archive
from webhook_api.media import MediaPolicy
from webhook_api.outlets import PART_BYTES, ObjectStore, minio_client
from webhook_api.states import EffectError, Failure
from webhook_api.worker import loop

from tests.support.apiservice import PACKAGE
from tests.support.mediahost import File, MediaHost
from tests.support.proxy import Proxy
from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends


def result(request_id: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"request_id": request_id, "status": "OK", "payload": payload}


def finished(
    bench: Lab, media: MediaHost, payload: dict[str, Any], state: str = "done", **changes: str
) -> int:
    """Deliver a result and wait until it is in `state`, hurrying its retries; returns the delivery's id."""
    bench.avatar("r-1")
    identifier = bench.deliver(result("r-1", payload), "completed")
    with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address, **changes):

        def there() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["state"] == state)

        wait_for(there, f"state {state}", 60)
    return identifier


def test_a_portraits_files_arrive_byte_for_byte(bench: Lab, media: MediaHost) -> None:
    lora, config = os.urandom(2 * PART_BYTES + 4711), b'{"rank": 16}\n'
    media.files = {
        "/f/lora.safetensors": File(lora),
        "/f/c.json": File(config, content_type="application/json"),
    }
    payload = {
        "diffusers_lora_file": {
            "url": media.url("/f/lora.safetensors"),
            "content_type": "application/octet-stream",
            "file_name": "pytorch_lora_weights.safetensors",
            "file_size": len(lora),
        },
        "config_file": {
            "url": media.url("/f/c.json"),
            "file_name": "../../etc/config.json",
            "file_size": None,
        },
        "images": [
            {"url": f"data:image/png;base64,{base64.b64encode(b'png').decode()}", "content_type": "image/png"}
        ],
    }
    identifier = finished(bench, media, payload)
    stored = bench.objects()
    prefix = "webhooks/fal/r-1"
    assert stored[f"{prefix}/diffusers_lora_file/pytorch_lora_weights.safetensors"] == lora
    assert stored[f"{prefix}/config_file/config.json"] == config
    assert stored[f"{prefix}/images.0/file.png"] == b"png"
    assert len(stored) == 4
    found = bench.minio.stat_object(
        bench.bucket, f"{prefix}/diffusers_lora_file/pytorch_lora_weights.safetensors"
    )
    assert found.metadata is not None
    assert found.metadata["x-amz-meta-sha256"] == hashlib.sha256(lora).hexdigest()
    detail = bench.effects(identifier)["archive"]["detail"]["artifacts"]
    assert [entry["sha256"] for entry in detail] == [
        hashlib.sha256(x).hexdigest() for x in (lora, config, b"png")
    ]
    archive = json.loads(bench.entries()[0]["archive"])
    assert [entry["state"] for entry in archive["artifacts"]] == ["stored"] * 3
    assert bench.row("r-1")["diffusers_lora_file_url"] == media.url("/f/lora.safetensors")


def test_a_retry_fetches_only_what_is_missing(bench: Lab, media: MediaHost) -> None:
    media.files = {"/lora": File(b"lora"), "/config": File(b"", status=503)}
    payload = {
        "diffusers_lora_file": {"url": media.url("/lora")},
        "config_file": {"url": media.url("/config")},
    }
    bench.avatar("r-1")
    identifier = bench.deliver(result("r-1", payload), "completed")
    with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address):
        assert "media_http_503" in bench.wait_state(identifier, "retry")["last_error"]
        # The bot is told at once, and told what is missing.
        archive = json.loads(bench.entries()[0]["archive"])
        assert [entry["state"] for entry in archive["artifacts"]] == ["stored", "missing"]
        media.files["/config"] = File(b"config")
        bench.hurry()
        bench.wait_state(identifier, "done")
    assert media.hits["/lora"] == 1
    assert bench.objects()[archive["artifacts"][1]["key"]] == b"config"
    assert len(bench.entries()) == 1


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (File(b"x" * 5000, stop_after=3000), "media_length_differs"),
        (File(b"x" * (PART_BYTES * 2), stop_after=PART_BYTES + 5), "media_length_differs"),
        (File(b"x" * 5000, chunked=True, stop_after=3000), "media_broken"),
        (File(b"x" * 5000, length=False), "media_length_unknown"),
        (File(b"", status=302, headers={"Location": "http://169.254.169.254/"}), "media_redirect"),
        (File(b"gone", status=404), "media_http_404"),
        (File(b"x", headers={"Content-Encoding": "gzip"}), "media_encoded"),
    ],
    ids=["short", "short in the second part", "short chunked", "no length", "redirect", "404", "encoded"],
)
def test_a_broken_file_is_never_stored(bench: Lab, media: MediaHost, file: File, reason: str) -> None:
    media.files = {"/lora": file}
    identifier = finished(bench, media, {"diffusers_lora_file": {"url": media.url("/lora")}}, "dead")
    effect = bench.effects(identifier)["archive"]
    assert reason in effect["last_error"]
    assert effect["tries"] == 3
    assert [key for key in bench.objects() if key.startswith("webhooks/")] == []


def test_a_file_beyond_the_limit_is_refused_at_once(bench: Lab, media: MediaHost) -> None:
    media.files = {"/announced": File(b"x" * 2000), "/chunked": File(b"x" * 2000, chunked=True)}
    payload = {"a": {"url": media.url("/announced")}, "b": {"url": media.url("/chunked")}}
    identifier = finished(bench, media, payload, "dead", ARCHIVE_MAX_BYTES="1000")
    assert "media_too_large" in bench.effects(identifier)["archive"]["last_error"]
    assert media.hits == {"/announced": 1, "/chunked": 1}
    assert [key for key in bench.objects() if key.startswith("webhooks/")] == []


def test_hosts_that_are_not_allowed_are_never_asked(bench: Lab, media: MediaHost) -> None:
    media.files = {"/lora": File(b"lora"), "/secret": File(b"secret")}
    payload = {
        "good": {"url": media.url("/lora")},
        "other_name": {"url": f"http://localhost:{media.port}/secret"},
        "secure": {"url": f"https://{media.address}/secret"},
        "login": {"url": f"http://v3.fal.media@{media.address}/secret"},
        "file": {"url": "file:///etc/passwd"},
    }
    identifier = finished(bench, media, payload, "dead")
    assert media.hits == {"/lora": 1}
    assert [key for key in bench.objects() if key.startswith("webhooks/")] == ["webhooks/fal/r-1/good/lora"]
    assert "not in ARCHIVE_ALLOWED_HOSTS" in bench.effects(identifier)["archive"]["last_error"]


def test_a_slow_download_is_ended(bench: Lab, media: MediaHost) -> None:
    media.files = {"/lora": File(b"x" * 1000, gate=threading.Event(), headers={"Connection": "close"})}
    started = monotonic()
    identifier = finished(
        bench,
        media,
        {"a": {"url": media.url("/lora")}},
        "dead",
        ARCHIVE_MAX_SECONDS="1",
        EVENT_MAX_ATTEMPTS="1",
    )
    assert "media_timeout" in bench.effects(identifier)["archive"]["last_error"]
    # Before a silence of the host would have ended it.
    assert monotonic() - started < MediaPolicy(https_hosts=()).read_seconds - 5


def test_an_unreachable_media_host_does_not_use_up_the_attempts(bench: Lab, media: MediaHost) -> None:
    payload = {"a": {"url": "http://127.0.0.1:9/never"}}
    bench.avatar("r-1")
    identifier = bench.deliver(result("r-1", payload), "completed")
    with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS="127.0.0.1:9", EVENT_MAX_ATTEMPTS="2"):

        def tried() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["tries"] >= 5)

        wait_for(tried, "more tries than EVENT_MAX_ATTEMPTS")
        bench.wait_state(identifier, "retry", "leased")
        assert bench.delivery(identifier)["state"] != "dead"

        # A day later it is given up. An attempt in hand may write the beginning back that it had read.
        def dead() -> bool:
            bench.connection.execute(
                "update webhook.effects set detail = detail || "
                "jsonb_build_object('since', extract(epoch from now()) - 172800)"
            )
            bench.hurry()
            return bool(bench.delivery(identifier)["state"] == "dead")

        wait_for(dead, "given up")


_UPLOAD = """
import re, sys
from pathlib import Path
from webhook_api.config import NEEDS_WORKER, load_settings
from webhook_api.media import MediaClient, MediaPolicy
from webhook_api.outlets import ObjectStore, minio_client
address, bucket = sys.argv[1:]
def peak(): # of this program: getrusage's stays what it was before the exec
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
store = ObjectStore(minio_client(load_settings(needs=NEEDS_WORKER)), bucket)
client = MediaClient(MediaPolicy(frozenset(), frozenset({address})))
before = peak()
with client.open(f"http://{address}/big") as stream:
    assert store.upload("webhooks/big", stream, "application/octet-stream")
print(peak() - before)
"""


def test_a_large_file_does_not_stand_in_memory(bench: Lab, media: MediaHost) -> None:
    content = os.urandom(1024 * 1024) * 96
    media.files = {"/big": File(content)}
    # A process of its own: the peak of this one holds the media host, and whatever ran before.
    done = subprocess.run(
        [sys.executable, "-c", _UPLOAD, media.address, bench.bucket],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), **bench.environ()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # A few parts and what is imported on the way; the file alone is 12 parts.
    assert int(done.stdout) < 9 * PART_BYTES
    assert bench.minio.stat_object(bench.bucket, "webhooks/big").size == len(content)


def deep_and_long() -> dict[str, Any]:
    payload: dict[str, Any] = {"url": "data:,deep", "file_name": "z" * 300}
    for number in range(30):
        payload = {f"{number:02}" + "n" * 148: payload}
    return payload


@pytest.mark.parametrize(
    ("payload", "contents"),
    [
        (deep_and_long(), [b"deep"]),
        (
            {"a": {"url": "data:,one", "file_name": "x", "x": {"url": "data:,two", "file_name": "y"}}},
            [b"one", b"two"],
        ),
    ],
    ids=["deep and long", "a file and a folder"],
)
def test_awkward_places_are_stored_like_any_other(
    bench: Lab, media: MediaHost, payload: dict[str, Any], contents: list[bytes]
) -> None:
    identifier = finished(bench, media, payload)
    stored = bench.objects()
    detail = bench.effects(identifier)["archive"]["detail"]["artifacts"]
    assert [stored[entry["key"]] for entry in detail] == contents
    assert f"deliveries/fal/r-1/{identifier}.json" in stored


def test_an_object_that_the_store_refuses_is_given_up_alone(
    bench: Lab, media: MediaHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = archive.find

    def too_long(payload: Any, base: str) -> list[archive.Artifact]:
        artifacts = found(payload, base)
        bad = [replace(each, key=f"{base}/{'k' * 150}" * 30) for each in artifacts if each.place == "bad"]
        return bad + [each for each in artifacts if each.place != "bad"]

    monkeypatch.setattr(archive, "find", too_long)
    payload = {"bad": {"url": "data:,bad"}, "good": {"url": "data:text/plain,good"}}
    identifier = finished(bench, media, payload, "dead")
    effects = bench.effects(identifier)
    assert effects["archive"]["detail"]["reason"] == "object_refused"
    assert effects["archive"]["tries"] == 3
    assert effects["raw_archive"]["state"] == "done"
    assert effects["raw_archive"]["tries"] == 1
    assert bench.objects()["webhooks/fal/r-1/good/file.txt"] == b"good"


def test_a_refused_object_leaves_the_store_open_for_others(bench: Lab) -> None:
    store = ObjectStore(minio_client(bench.settings()), bench.bucket)
    with pytest.raises(EffectError) as refused:
        store.put("/".join(["k" * 150] * 30), b"x", "text/plain", {})
    assert (refused.value.kind, refused.value.reason) == (Failure.THEIRS, "object_refused")
    store.put("good", b"x", "text/plain", {})
    assert bench.objects() == {"good": b"x"}


def test_a_web_page_is_no_file(bench: Lab, media: MediaHost) -> None:
    """An error page with status 200, a login, a consent form."""
    media.files = {
        "/lora.safetensors": File(b"<html>please log in</html>", content_type="text/html; charset=utf-8"),
        "/config.json": File(b"{}", content_type="text/plain"),
        "/report.html": File(b"<html>", content_type="text/html"),
    }
    payload = {
        "lora": {"url": media.url("/lora.safetensors"), "content_type": "application/octet-stream"},
        "config": {"url": media.url("/config.json"), "content_type": "application/json"},
        "report": {"url": media.url("/report.html")},
    }
    identifier = finished(bench, media, payload, "dead")
    effect = bench.effects(identifier)["archive"]
    assert effect["detail"]["reason"] == "media_type_differs"
    states = {entry["place"]: entry["state"] for entry in effect["detail"]["artifacts"]}
    assert states == {"lora": "missing", "config": "stored", "report": "stored"}


def test_parts_that_a_killed_worker_left_are_removed(bench: Lab, media: MediaHost) -> None:
    content = os.urandom(PART_BYTES) * 3
    gate = threading.Event()
    media.files = {"/lora": File(content, gate=gate)}
    bench.avatar("r-1")
    identifier = bench.deliver(result("r-1", {"a": {"url": media.url("/lora")}}), "completed")
    child = bench.spawn(ARCHIVE_ALLOW_HTTP_HOSTS=media.address)
    try:

        def parts() -> list[Any]:
            if not bench.minio.bucket_exists(bench.bucket):
                return []
            try:
                found = bench.minio._list_multipart_uploads(bench.bucket, prefix="webhooks/fal/r-1/a/lora")
                return list(found.uploads)
            except MinioException:  # rclone says 404 where there is none
                return []

        wait_for(parts, "an upload in parts", 60)
        child.kill()
        child.wait(10)
        assert len(parts()) == 1
        gate.set()
        with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address):
            bench.wait_state(identifier, "done", seconds=60)
        assert parts() == []
    finally:
        gate.set()
        if child.poll() is None:
            child.kill()
            child.wait(10)
    assert bench.objects()["webhooks/fal/r-1/a/lora"] == content


def test_a_store_that_cuts_transfers_is_waited_for(bench: Lab, media: MediaHost) -> None:
    """Cut in the middle of a file of several parts: nothing stands there, and later all of it does."""
    content = os.urandom(PART_BYTES) * 3
    gate = threading.Event()
    media.files = {"/lora": File(content, gate=gate), "/small": File(b"small")}
    bench.avatar("r-1")
    host, _, port = bench.s3.endpoint.partition(":")
    with (
        Proxy(host, int(port)) as proxy,
        bench.worker(MINIO_ENDPOINT=proxy.address, ARCHIVE_ALLOW_HTTP_HOSTS=media.address),
    ):
        payload = {"a": {"url": media.url("/lora")}, "b": {"url": media.url("/small")}}
        identifier = bench.deliver(result("r-1", payload), "completed")
        assert media.half_sent.wait(120)
        proxy.down()
        gate.set()
        found = bench.wait_state(identifier, "retry", seconds=60)
        assert "object_store_unavailable" in found["last_error"]
        assert [key for key in bench.objects() if key.startswith("webhooks/")] == []
        assert bench.effects(identifier)["archive"]["tries"] == 0, "it is ours, and counts for nothing"
        proxy.up()

        def done() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["state"] == "done")

        wait_for(done, "done", 60)
    stored = bench.objects()
    assert stored["webhooks/fal/r-1/a/lora"] == content
    assert stored["webhooks/fal/r-1/b/small"] == b"small"


def test_data_uris_are_decoded_within_the_limit(bench: Lab, media: MediaHost) -> None:
    picture = os.urandom(3_000_000)
    payload = {
        "images": [
            {
                "url": "data:image/png;base64," + base64.b64encode(picture).decode(),
                "content_type": "image/png",
            },
            {"url": "data:text/plain;charset=utf-8,a%20b%00c"},
        ],
        "large": {"url": "data:," + "x" * 4_000_001},
        "broken": {"url": "data:image/png;base64,%%%"},
    }
    identifier = finished(bench, media, payload, "dead", ARCHIVE_MAX_BYTES="4000000")
    stored = {key: data for key, data in bench.objects().items() if key.startswith("webhooks/")}
    assert sorted(len(data) for data in stored.values()) == [5, 3_000_000]
    assert picture in stored.values()
    error = bench.effects(identifier)["archive"]["last_error"]
    assert "larger than 4000000 bytes" in error
    assert "base64 is malformed" in error


def test_a_probe_is_traced_and_removed_again(bench: Lab) -> None:
    settings = bench.settings()
    identifier = bench.deliver(
        {"request_id": "probe-1", "status": "OK", "payload": None}, "completed", probe=True
    )
    bench.avatar("r-1", kind="style")
    real = bench.deliver(result("r-1", {"finetune_id": "ft"}), "completed")
    with bench.worker():
        bench.wait_state(identifier, "done")
        bench.wait_state(real, "done")
    found = trace.trace(settings, "probe-1")
    json.dumps(found)
    [delivery] = found["deliveries"]
    assert delivery["state"] == "done"
    assert delivery["stream_entry"]["fields"]["request_id"] == "probe-1"
    assert delivery["objects"][0]["exists"]
    assert delivery["objects"][0]["key"] == f"deliveries/fal/probe-1/{identifier}.json"
    with pytest.raises(trace.TraceError) as refused:
        trace.remove(settings, "r-1")
    assert refused.value.reason == "not_a_probe"
    assert trace.remove(settings, "probe-1")["removed"] == {"deliveries": 1, "entries": 1, "objects": 1}
    assert trace.remove(settings, "probe-1")["removed"] == {"deliveries": 0, "entries": 0, "objects": 0}
    assert trace.trace(settings, "probe-1") == {"request_id": "probe-1", "found": False, "deliveries": []}
    assert bench.entries(probe=True) == []
    assert [key for key in bench.redis.scan_iter(f"*{bench.stream}:probe*") if "sent" in key] == []
    assert list(bench.objects()) == [f"deliveries/fal/r-1/{real}.json"]


def test_an_id_that_looks_like_a_probe_does_not_make_one(bench: Lab) -> None:
    bench.deliver({"request_id": "probe-2", "status": "ERROR"}, "failed")
    with pytest.raises(trace.TraceError) as refused:
        trace.remove(bench.settings(), "probe-2")
    assert refused.value.reason == "not_a_probe"
    assert trace.trace(bench.settings(), "probe-2")["found"]


def test_trace_answers_although_redis_is_away(bench: Lab) -> None:
    identifier = bench.deliver({"request_id": "probe-1", "status": "OK"}, "completed", probe=True)
    with bench.worker():
        bench.wait_state(identifier, "done")
    found = trace.trace(bench.settings(REDIS_URL="redis://127.0.0.1:9/0"), "probe-1")
    assert "error" in found["deliveries"][0]["stream_entry"]
    assert found["deliveries"][0]["objects"][0]["exists"]


def test_a_new_delivery_is_taken_at_once(bench: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By notification: there is no poll here that would find it."""
    monkeypatch.setattr(loop, "POLL_SECONDS", 3600.0)
    with bench.worker() as worker:
        wait_for(lambda: worker._listener._connection is not None, "the listener")
        sleep(0.5)  # let it fall asleep
        for number in range(3):
            bench.avatar(f"r-{number}", kind="style")
            bench.wait_state(bench.deliver(result(f"r-{number}", {"finetune_id": "f"}), "completed"), "done")
