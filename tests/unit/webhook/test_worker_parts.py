"""The worker's parts apart from its backends: leases, the lane of those that go on alone, gauges, settings."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from webhook_api import gauges
from webhook_api.config import NEEDS_WORKER, ConfigError, load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.effects.base import Delivery, as_json
from webhook_api.effects.raw_archive import line, segment_key
from webhook_api.worker.leases import BACKLOG_BYTES, Active, Lane

BASE = {
    "DATABASE_URL": "postgresql://u@h/d",
    "REDIS_URL": "redis://h",
    "MINIO_ENDPOINT": "h:9000",
    "MINIO_ACCESS_KEY": "a",
    "MINIO_SECRET_KEY": "s",
}


def delivery(identifier: int, body: bytes = b"{}") -> Delivery:
    return Delivery(
        id=identifier, source="fal", request_id=f"r-{identifier}", dedup_key="completed:x", status="completed",
        gateway_request_id=None, training_type_hint=None, account_id=None, body=body, body_sha256="0" * 64, headers={},
        edge_request_id=None, probe=False, first_seen_at=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), tries=1,
        age=0.0, lease_owner=f"me:{identifier}",
    )  # fmt: skip


def test_a_lane_runs_so_many_at_once_and_all_in_the_end() -> None:
    gate = threading.Event()
    lock = threading.Lock()
    running: list[int] = []
    most: list[int] = []
    done: list[int] = []
    finished = threading.Event()

    def run(each: Delivery) -> None:
        with lock:
            running.append(each.id)
            most.append(len(running))
        gate.wait(30)
        with lock:
            running.remove(each.id)
            done.append(each.id)
            if len(done) == 10:
                finished.set()

    lane = Lane(3, run)
    for number in range(10):
        assert lane.put(delivery(number))
    assert not lane.has_room(5)
    gate.set()
    assert finished.wait(30)
    assert max(most) <= 3
    assert sorted(done) == list(range(10))
    assert lane.has_room(1)


def test_a_lane_that_is_full_of_large_bodies_has_no_room() -> None:
    gate = threading.Event()
    lane = Lane(1, lambda _each: bool(gate.wait(30)) and None)
    lane.put(delivery(1))
    lane.put(delivery(2, b"x" * BACKLOG_BYTES))
    try:
        assert not lane.has_room(100)
    finally:
        lane.close()
        gate.set()


def test_a_closed_lane_gives_back_what_waited_and_takes_nothing_any_more() -> None:
    gate = threading.Event()
    lane = Lane(1, lambda _each: bool(gate.wait(30)) and None)
    for number in range(3):
        lane.put(delivery(number))
    assert [each.id for each in lane.close()] == [1, 2]
    assert not lane.put(delivery(9))
    gate.set()


def test_a_lease_that_is_not_renewed_is_lost_once() -> None:
    active = Active()
    for owner in ("a", "b"):
        active.start(owner)
    assert active.keep_only(["a", "b"], frozenset({"a"})) == ["b"]
    assert active.keep_only(["a", "b"], frozenset({"a"})) == []
    assert active.is_lost("b")
    assert not active.is_lost("a")
    active.end("a", orphaned=True)
    assert active.orphans() == ["a"]
    active.adopt(["a"])
    assert active.orphans() == []


def test_the_same_deliveries_give_the_same_segment_and_lines() -> None:
    several = [delivery(5), delivery(6)]
    assert segment_key(several, "f" * 64) == "deliveries/segments/2026-01-02/5-6-ffffffffffffffff.ndjson"
    assert line(several[0]) == line(delivery(5))
    assert line(delivery(5, b'{"a":"\n"}')).count(b"\n") == 1


@pytest.mark.parametrize("text", ["a\x00b", "\\u0000", "\ud800", "\ud83d\ude00", "\\\\u0000", "плохо"])
def test_what_is_recorded_is_json_that_a_jsonb_column_takes(text: str) -> None:
    written = as_json({"message": text})
    written.encode("utf-8")
    assert json.loads(written)["message"].isprintable() or "\ufffd" in json.loads(written)["message"]
    assert "\x00" not in json.loads(written)["message"]


class Rows:
    """A connection that answers the gauges' question."""

    asked = 0

    def execute(self, _query: str) -> Rows:
        self.asked += 1
        return self

    def fetchall(self) -> list[tuple[Any, ...]]:
        return [("pending", 3, 7.5), ("dead", 10_000, 60.0)]


def test_gauges_ask_rarely_and_show_every_state() -> None:
    rows, now = Rows(), [0.0]

    @contextmanager
    def borrow() -> Iterator[Any]:
        yield rows

    registry = CollectorRegistry()
    registry.register(gauges.InboxCollector(borrow, lambda: now[0]))
    assert rows.asked == 0
    text = generate_latest(registry).decode()
    assert 'webhook_inbox_deliveries{state="pending"} 3.0' in text
    assert 'webhook_inbox_oldest_seconds{state="pending"} 7.5' in text
    assert 'webhook_inbox_deliveries{state="parked"} 0.0' in text
    assert "webhook_inbox_up 1.0" in text
    generate_latest(registry)
    assert rows.asked == 1
    now[0] = gauges.TTL
    generate_latest(registry)
    assert rows.asked == 2


def test_gauges_show_that_the_inbox_is_away_and_nothing_else() -> None:
    def borrow() -> Any:
        raise DatabaseUnavailable("no_connection", "away")

    registry = CollectorRegistry()
    registry.register(gauges.InboxCollector(borrow))
    text = generate_latest(registry).decode()
    assert "webhook_inbox_up 0.0" in text
    assert "webhook_inbox_deliveries{" not in text


def test_the_workers_settings() -> None:
    settings = load_settings(BASE, NEEDS_WORKER)
    assert (settings.worker_batch_size, settings.worker_metrics_port) == (128, 9108)
    settings = load_settings({**BASE, "WORKER_BATCH_SIZE": "1", "WORKER_METRICS_PORT": "0"}, NEEDS_WORKER)
    assert (settings.worker_batch_size, settings.worker_metrics_port) == (1, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORKER_BATCH_SIZE", "0"), ("WORKER_BATCH_SIZE", "1001"), ("WORKER_METRICS_PORT", "65536")],
)
def test_wrong_settings_of_the_worker_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load_settings({**BASE, name: value}, NEEDS_WORKER)
