"""When a stopping service has finished: no request that is on its way is cut off, and an idle one waits for nobody."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from webhook_api.server import worker as server
from webhook_api.server.worker import STOP_KEEPALIVE_SECONDS, STOP_QUIET_SECONDS, EventWorker


class Kept:
    """A connection that a client keeps."""

    def __init__(self, *, unused: bool = True, waiting: bool = False) -> None:
        self.unused, self.waiting = unused, waiting

    def has_bytes(self) -> bool:
        return self.waiting


class Stopping:
    """A worker that has just been told to stop, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *kept: Kept) -> None:
        self.now = 1000.0
        monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))
        worker: Any = EventWorker.__new__(EventWorker)
        worker.alive, worker.stopping_at, worker.begun_at = False, None, 0.0
        worker.sockets, worker.listeners = [], {}
        worker.cfg = SimpleNamespace(graceful_timeout=30)
        worker.connections = dict(enumerate(kept))
        worker._listen = lambda _wanted: None
        worker._close = lambda connection: worker.connections.pop(
            next(fd for fd, found in worker.connections.items() if found is connection)
        )
        self.worker = worker
        assert self.finished() is (not kept)

    def finished(self, after: float = 0.0) -> bool:
        self.now += after
        finished: bool = self.worker._finished()
        return finished


def test_idle_connections_are_closed_as_soon_as_it_was_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Stopping(monkeypatch, Kept(), Kept())
    assert not stopping.finished(STOP_QUIET_SECONDS / 2)
    assert stopping.finished(STOP_QUIET_SECONDS)


def test_while_requests_come_idle_connections_are_kept_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Stopping(monkeypatch, Kept())
    rounds = int(STOP_KEEPALIVE_SECONDS / STOP_QUIET_SECONDS) - 1
    for _ in range(rounds):
        assert not stopping.finished(STOP_QUIET_SECONDS)
        stopping.worker.begun_at = stopping.now
    assert stopping.finished(STOP_KEEPALIVE_SECONDS), "but not for ever"


def test_what_has_come_and_was_not_read_yet_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(waiting=True)
    stopping = Stopping(monkeypatch, kept)
    assert not stopping.finished(STOP_KEEPALIVE_SECONDS + 1)
    kept.waiting = False
    assert stopping.finished()


def test_a_request_that_is_worked_on_has_until_the_grace_period_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Stopping(monkeypatch, Kept(unused=False))
    assert not stopping.finished(29)
    assert stopping.finished(2)
