"""What the worker promises when something dies: nothing lost, nothing twice, and it comes back by itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from webhook_api.worker import queue

from tests.support.mediahost import File, MediaHost
from tests.support.proxy import Proxy
from tests.support.workerlab import Lab, process, wait_for

pytestmark = pytest.mark.backends


def style(request_id: str) -> dict[str, Any]:
    return {"request_id": request_id, "status": "OK", "payload": {"finetune_id": "ft"}}


def portrait(request_id: str, media: MediaHost) -> dict[str, Any]:
    payload = {
        "diffusers_lora_file": {"url": media.url("/lora.safetensors"), "file_name": "lora.safetensors"},
        "config_file": {"url": media.url("/config.json"), "file_name": "config.json"},
    }
    return {"request_id": request_id, "status": "OK", "payload": payload}


def through(url: str, proxy: Proxy) -> str:
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    return parts._replace(netloc=f"{login}@{proxy.address}" if login else proxy.address).geturl()


def target(url: str, default: int) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or default


def test_killed_between_the_stream_entry_and_its_record(bench: Lab) -> None:
    """The widest gap there is: the entry stands in Redis, and PostgreSQL knows nothing of it."""
    bench.avatar("r-1", kind="style")
    identifier = bench.deliver(style("r-1"), "completed")
    for name in ("archive", "raw_archive", "avatar"):
        bench.connection.execute(
            "insert into webhook.effects (delivery_id, name, state) values (%s, %s, 'done')",
            (identifier, name),
        )
    with psycopg.connect(bench.database_url) as blocker:
        blocker.execute("lock table webhook.effects in share row exclusive mode")
        with process(bench) as first:
            wait_for(lambda: len(bench.entries()) == 1, "the stream entry")
            first.send_signal(signal.SIGKILL)
            first.wait(10)
        blocker.rollback()
    assert bench.delivery(identifier)["state"] == "leased"
    with process(bench):
        found = bench.wait_state(identifier, "done")
    assert found["crashes"] == 1
    assert len(bench.entries()) == 1
    assert bench.effects(identifier)["stream"]["detail"]["added"] is False


def test_killed_in_the_middle_of_a_download(bench: Lab, media: MediaHost) -> None:
    lora, config = os.urandom(3_000_000), b'{"r": 16}'
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(lora), "/config.json": File(config, gate=gate)}
    bench.avatar("r-1")
    identifier = bench.deliver(portrait("r-1", media), "completed")
    with process(bench, ARCHIVE_ALLOW_HTTP_HOSTS=media.address) as first:
        assert media.half_sent.wait(120)
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    gate.set()
    assert bench.row("r-1")["status"] == "completed"
    assert bench.entries() == []
    with process(bench, ARCHIVE_ALLOW_HTTP_HOSTS=media.address):
        bench.wait_state(identifier, "done")
    stored = bench.objects()
    assert stored.pop("webhooks/fal/r-1/diffusers_lora_file/lora.safetensors") == lora
    assert stored.pop("webhooks/fal/r-1/config_file/config.json") == config
    assert list(stored) == [f"deliveries/fal/r-1/{identifier}.json"]
    assert len(bench.entries()) == 1
    # What was done before the kill was not done again.
    assert media.hits["/lora.safetensors"] == 1
    assert bench.effects(identifier)["avatar"]["tries"] == 1


def test_a_delivery_that_kills_its_workers_ends_as_a_dead_letter(bench: Lab) -> None:
    identifier = bench.deliver(style("r-1"), "completed")
    for _ in range(3):
        bench.connection.execute(
            "update webhook.deliveries set state = 'leased', lease_owner = 'gone', lease_until = now() - interval '1 s'"
        )
        with process(bench):
            wait_for(lambda: bench.delivery(identifier)["state"] != "leased", "the lease taken back")
    assert bench.delivery(identifier)["crashes"] == 3
    assert bench.delivery(identifier)["state"] == "dead"


def test_sigterm_ends_in_good_order(bench: Lab, media: MediaHost) -> None:
    """A long download is interrupted, and its lease given back at once: no waiting for it to run out."""
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(b"x" * 1000, gate=gate), "/config.json": File(b"{}")}
    bench.avatar("r-1")
    identifier = bench.deliver(portrait("r-1", media), "completed")
    changes = {"ARCHIVE_ALLOW_HTTP_HOSTS": media.address, "LEASE_SECONDS": "60", "WORKER_STOP_SECONDS": "8"}
    with process(bench, **changes) as worker:
        assert media.half_sent.wait(120)
        worker.terminate()
        assert worker.wait(40) == 0
    found = bench.delivery(identifier)
    assert (found["tries"], found["crashes"]) == (0, 0)
    # By the attempt itself, or in its place when a busy machine gave it no time to.
    assert found["state"] in {"pending", "retry"}
    gate.set()
    with process(bench, ARCHIVE_ALLOW_HTTP_HOSTS=media.address):
        bench.wait_state(identifier, "done")


def test_sigterm_lets_short_attempts_finish(bench: Lab) -> None:
    identifiers = []
    for number in range(60):
        bench.avatar(f"r-{number}", kind="style")
        identifiers.append(bench.deliver(style(f"r-{number}"), "completed"))
    with process(bench, LEASE_SECONDS="60", WORKER_STOP_SECONDS="30") as worker:
        wait_for(lambda: bench.entries(), "the first entry")
        worker.terminate()
        assert worker.wait(60) == 0
    states = {bench.delivery(identifier)["state"] for identifier in identifiers}
    assert states <= {"pending", "done"}
    assert bench.connection.execute(
        "select count(*) from webhook.effects where state = 'failed'"
    ).fetchone() == (0,)


def test_a_stop_gives_back_what_a_claim_leased_whose_answer_was_lost(
    bench: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody works on it and nobody renews it, so its lease would run out and count as a crash."""
    answered = queue.claim
    with bench.worker(LEASE_SECONDS="600") as worker:

        def lost(*arguments: Any, **options: Any) -> Any:
            claims = answered(*arguments, **options)
            if claims:
                worker.stop()
                raise psycopg.OperationalError("the answer is lost")
            return claims

        monkeypatch.setattr(queue, "claim", lost)
        identifier = bench.deliver(style("r-1"), "completed")
        wait_for(worker._ended.is_set, "the worker's end")
    found = bench.delivery(identifier)
    assert (found["state"], found["tries"], found["crashes"]) == ("retry", 0, 0)


def test_redis_down_then_back(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with Proxy(*target(bench.redis_url, 6379)) as proxy:
        proxy.down()
        with bench.worker(REDIS_URL=through(bench.redis_url, proxy)):
            identifier = bench.deliver(style("r-1"), "completed")
            found = bench.wait_state(identifier, "retry")
            assert "redis_unavailable" in found["last_error"]
            # The rest is done meanwhile, and a newer delivery of the request is not held up.
            assert bench.row("r-1")["status"] == "completed"
            assert len(bench.objects()) == 1
            newer = bench.deliver({"request_id": "r-1", "status": "ERROR", "error": "late"}, "failed")
            wait_for(
                lambda: bench.effects(newer).get("avatar", {}).get("state") == "done",
                "the newer one's avatar",
            )
            for _ in range(5):  # more often than EVENT_MAX_ATTEMPTS: an outage never ends as a dead letter
                tries = bench.delivery(identifier)["tries"]
                bench.hurry()
                wait_for(lambda seen=tries: bench.delivery(identifier)["tries"] > seen, "another try")
            bench.wait_state(identifier, "retry")
            proxy.up()

            def done() -> bool:
                bench.hurry()
                return bench.delivery(newer)["state"] == "done" == bench.delivery(identifier)["state"]

            wait_for(done, "both done")
    assert [entry["status"] for entry in bench.entries()] == ["completed", "failed"]
    assert bench.effects(identifier)["raw_archive"]["tries"] == 1


def test_object_store_down_then_back(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with Proxy(*target(f"http://{bench.s3.endpoint}", 9000)) as proxy:
        proxy.down()
        with bench.worker(MINIO_ENDPOINT=proxy.address):
            identifier = bench.deliver(style("r-1"), "completed")
            assert "object_store_unavailable" in bench.wait_state(identifier, "retry")["last_error"]
            assert bench.row("r-1")["status"] == "completed"
            assert len(bench.entries()) == 1
            proxy.up()

            def done() -> bool:
                bench.hurry()
                return bool(bench.delivery(identifier)["state"] == "done")

            wait_for(done, "done")
    assert list(bench.objects()) == [f"deliveries/fal/r-1/{identifier}.json"]
    assert len(bench.entries()) == 1


def test_database_lost_and_back(bench: Lab) -> None:
    with (
        Proxy(*target(bench.database_url, 5432)) as proxy,
        bench.worker(DATABASE_URL=through(bench.database_url, proxy)) as worker,
    ):
        bench.avatar("r-1", kind="style")
        bench.wait_state(bench.deliver(style("r-1"), "completed"), "done")
        proxy.down()
        bench.avatar("r-2", kind="style")
        identifier = bench.deliver(style("r-2"), "completed")
        before = worker._heartbeat_file.stat().st_mtime
        wait_for(lambda: worker._heartbeat_file.stat().st_mtime > before, "the loop runs on", 15)
        proxy.up()
        assert bench.wait_state(identifier, "done")["crashes"] == 0
    assert len(bench.entries()) == 2


def test_database_lost_during_an_attempt(bench: Lab, media: MediaHost) -> None:
    """The attempt has no way to say how it went: its lease is given back, and it isn't counted as a crash."""
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(b"x" * 1000, gate=gate), "/config.json": File(b"{}")}
    bench.avatar("r-1")
    with Proxy(*target(bench.database_url, 5432)) as proxy:
        changes = {
            "DATABASE_URL": through(bench.database_url, proxy),
            "ARCHIVE_ALLOW_HTTP_HOSTS": media.address,
        }
        with bench.worker(LEASE_SECONDS="600", **changes) as worker:
            identifier = bench.deliver(portrait("r-1", media), "completed")
            assert media.half_sent.wait(120)
            proxy.down()
            gate.set()
            wait_for(lambda: worker._active.orphans(), "the attempt's end without a record", 60)
            proxy.up()
            assert bench.wait_state(identifier, "done")["crashes"] == 0
    assert len(bench.entries()) == 1
    assert bench.effects(identifier)["avatar"]["tries"] == 1


def test_a_worker_that_was_taken_for_dead_writes_nothing(bench: Lab, media: MediaHost) -> None:
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(b"x" * 1000, gate=gate), "/config.json": File(b"{}")}
    bench.avatar("r-1")
    with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address):
        identifier = bench.deliver(portrait("r-1", media), "completed")
        assert media.half_sent.wait(120)
        bench.connection.execute(
            "update webhook.deliveries set lease_owner = 'another', lease_until = now() + interval '1 h'"
        )
        # The heartbeat notices (a third of 5 s), and the download is given up.
        wait_for(lambda: not _attempts(), "the attempt's end", 60)
    found = bench.delivery(identifier)
    assert (found["state"], found["lease_owner"]) == ("leased", "another")
    assert "archive" not in bench.effects(identifier)
    assert bench.entries() == []


def test_the_lease_is_asked_for_before_every_record(bench: Lab, media: MediaHost) -> None:
    """Also when no heartbeat noticed in time that another worker has the delivery."""
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(b"x" * 1000, gate=gate), "/config.json": File(b"{}")}
    bench.avatar("r-1")
    with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address, LEASE_SECONDS="3600"):
        identifier = bench.deliver(portrait("r-1", media), "completed")
        assert media.half_sent.wait(120)
        bench.connection.execute("update webhook.deliveries set lease_owner = 'another'")
        gate.set()
        wait_for(lambda: not _attempts(), "the attempt's end", 60)
    found = bench.delivery(identifier)
    assert (found["state"], found["lease_owner"]) == ("leased", "another")
    # Both were recorded before the download, when the lease was still held.
    assert set(bench.effects(identifier)) == {"avatar", "raw_archive"}
    assert bench.entries() == []


def claim(bench: Lab, owner: str, limit: int, seconds: float, **more: Any) -> list[queue.Claim]:
    """A claim that does not wait for its turn."""
    return queue.claim(bench.connection, owner, limit, seconds, force=True, **more) or []  # type: ignore[arg-type]


def _all_stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return {task.read_text().rpartition(")")[2].split()[0] for task in tasks} == {"T"}


def _attempts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("delivery-")]


def test_leases_of_long_attempts_are_renewed(bench: Lab, media: MediaHost) -> None:
    gate = threading.Event()
    media.files = {"/lora.safetensors": File(b"x" * 1000, gate=gate), "/config.json": File(b"{}")}
    bench.avatar("r-1")
    changes = {"ARCHIVE_ALLOW_HTTP_HOSTS": media.address, "LEASE_SECONDS": "12"}
    with bench.worker(**changes), bench.worker(INSTANCE_ID="second", **changes):
        identifier = bench.deliver(portrait("r-1", media), "completed")
        assert media.half_sent.wait(120)
        first = bench.delivery(identifier)["lease_until"]
        # Longer than a lease lasts: it is renewed twice, and nobody else takes the delivery.
        wait_for(
            lambda: (bench.delivery(identifier)["lease_until"] - first).total_seconds() > 12,
            "renewed leases",
            60,
        )
        gate.set()
        found = bench.wait_state(identifier, "done")
    assert (found["tries"], found["crashes"]) == (1, 0)
    assert media.hits["/lora.safetensors"] == 1


def test_the_heartbeat_stops_with_the_loop(bench: Lab) -> None:
    with process(bench) as worker:
        heartbeat = bench.tmp_path / "heartbeat"
        wait_for(heartbeat.exists, "a heartbeat")
        worker.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: _all_stopped(worker.pid), "all its threads have stopped")
            before = heartbeat.stat().st_mtime
            time.sleep(0.5)  # nothing may happen in it: there is no condition to wait for
            assert heartbeat.stat().st_mtime == before
        finally:
            worker.send_signal(signal.SIGCONT)
        wait_for(lambda: heartbeat.stat().st_mtime > before, "the heartbeat goes on", 15)


def test_a_crowd_of_parked_deliveries_keeps_no_new_one_waiting(bench: Lab) -> None:
    """And a flood of new ones does not starve what is tried again."""
    for number in range(300):
        bench.deliver(style(f"unknown-{number}"), "completed")
    bench.connection.execute(
        "update webhook.deliveries set state = 'parked', tries = 1, next_attempt_at = now() - interval '1 hour'"
    )
    fresh = [bench.deliver(style(f"new-{number}"), "completed") for number in range(3)]
    assert [claim.delivery.id for claim in claim(bench, "one", 2, 60)] == fresh[:2]
    (again,) = claim(bench, "two", 1, 60, fresh_first=False)
    assert again.delivery.request_id.startswith("unknown-")
    assert len(claim(bench, "three", 4, 60)) == 4, "the last new one, and parked ones after it"
    assert bench.delivery(fresh[2])["state"] == "leased"
