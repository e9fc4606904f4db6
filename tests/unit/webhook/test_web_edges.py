"""The console's edges: a flood of names, a clock that runs, streams that are too many, instances that say nonsense."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from webhook_api.config_console import ConsoleSettings
from webhook_api.db import DatabaseUnavailable
from webhook_api.web import limits, live, monitor
from webhook_api.web.limits import ALTOGETHER, Attempts
from webhook_api.web.monitor import Instance, Monitor, certificate_ends


def test_names_that_are_tried_are_forgotten_before_they_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "KEYS", 100)
    monkeypatch.setattr(limits, "_MOST", (5, 10**9, 10**9))
    attempts = Attempts(lambda: 0.0)
    for index in range(1000):
        attempts.wait(f"name-{index}", f"address-{index}")
    assert len(attempts._failed) <= 100


def test_all_logins_together_are_limited() -> None:
    attempts = Attempts(lambda: 0.0)
    heard = sum(attempts.wait(f"name-{index}", f"address-{index}") == 0.0 for index in range(ALTOGETHER + 10))
    assert heard == ALTOGETHER


def test_a_refused_attempt_does_not_prolong_the_wait() -> None:
    now = [0.0]
    attempts = Attempts(lambda: now[0])
    for _ in range(limits.PER_ACCOUNT):
        attempts.wait("maria", "a")
    for now[0] in (100.0, 200.0, limits.WINDOW - 1):
        assert attempts.wait("maria", "a") == limits.WINDOW - now[0]


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "body", "said"), [
    (200, b'{"status": "healthy"}', "healthy"), (503, b'{"status": "unhealthy"}', "unhealthy"), (200, b"<html>", "away"),
    (200, b"[1]", "away"), (200, b"[" * 40_000, "away"), (500, b"", "away"),
])  # fmt: skip
def test_an_instance_is_as_it_says_or_away(status: int, body: bytes, said: str) -> None:
    with answering(status, body) as address:
        assert Instance(address, monitor.ask(address)).status == said


def test_an_instance_that_is_not_there_is_away() -> None:
    assert Instance("http://127.0.0.1:1", monitor.ask("http://127.0.0.1:1")).status == "away"
    assert certificate_ends("127.0.0.1:1") is None


def test_checks_of_another_form_are_none() -> None:
    assert Instance("a", {"checks": [1]}).check("keys") == {}
    assert Instance("a", {"checks": {"keys": 5}}).check("keys") == {}


def test_an_instance_says_why_it_is_not_healthy() -> None:
    checks = {
        "database": {"ok": True}, "redis": {"ok": False, "error": "unreachable"}, "keys": {"ok": True, "stale": True},
        "spool": {"ok": True, "rows": 3}, "odd": 5, "x" * 500: {"ok": False},
    }  # fmt: skip
    found = Instance("a", {"checks": checks}).troubles
    assert found[:3] == ["redis: unreachable", "keys: stale", "spool: 3"]
    assert len(found[3]) == 80
    assert Instance("a", {"checks": {"spool": {"ok": True, "rows": 0}}}).troubles == []
    assert Instance("a").troubles == []


def test_the_monitor_looks_by_itself() -> None:
    with answering(200, json.dumps({"status": "degraded", "instance": "api-1"}).encode()) as address:
        looking = Monitor(ConsoleSettings(instances=(address,)))
        looking.start()
        for _ in range(200):
            if looking.seen.instances:
                break
            looking._stop.wait(0.02)
        looking.stop()
    assert [(item.name, item.status) for item in looking.seen.instances] == [("api-1", "degraded")]


def test_a_stream_lives_through_a_database_that_is_away_and_ends_in_time() -> None:
    now = [0.0]

    @contextmanager
    def away() -> Iterator[Any]:
        raise DatabaseUnavailable("no_connection", "none")
        yield

    def sleep(seconds: float) -> None:
        now[0] += seconds

    said = list(live.Tail(away, 0, lambda row: b"row", lambda: now[0], sleep).run())
    assert said[0] == b"retry: 1000\n\n"
    assert set(said[1:]) == {b": alive\n\n"}
    assert now[0] == pytest.approx(live.SECONDS, abs=live.EVERY)
