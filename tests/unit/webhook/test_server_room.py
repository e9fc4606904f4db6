"""Whom the server's loop takes in, and whom it gives up when no more connections fit. Real sockets, no arbiter."""

from __future__ import annotations

import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from webhook_api import metrics
from webhook_api.server.connection import Connection, Phase
from webhook_api.server.worker import ACCEPTS, EventWorker

REQUEST = b"POST /api/v1/avatar/status_update HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


class House:
    """A loop's worker without gunicorn around it, and clients of it."""

    def __init__(self, stack: ExitStack, room: int, workers: int = 1) -> None:
        self._stack = stack
        self.worker: Any = EventWorker.__new__(EventWorker)
        self.worker.poll = stack.enter_context(select.epoll())
        self.worker.connections = {}
        self.worker.cfg = SimpleNamespace(worker_connections=room, keepalive=75, workers=workers)
        self.worker.quick = SimpleNamespace(gate=lambda *_: 1000)
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        self.listener.setblocking(False)
        stack.callback(lambda: [c.sock.close() for c in self.worker.connections.values()])

    def client(self) -> socket.socket:
        """One that waits to be accepted: its own end is connected a moment before the listener knows of it."""
        before = self.queued()
        made = self._stack.enter_context(socket.create_connection(self.listener.getsockname(), timeout=30))
        deadline = time.monotonic() + 30
        while self.queued() == before:
            assert time.monotonic() < deadline, "the listener knows of it"
            time.sleep(0.001)
        return made

    def queued(self) -> int:
        """How many wait to be accepted: Linux says it of a socket that listens as ``tcpi_unacked``."""
        return int(
            struct.unpack_from("I", self.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)[0]
        )

    def accept(self) -> None:
        self.worker._accept(self.listener)

    def held(self, *clients: socket.socket) -> list[Connection]:
        """The other ends of clients, accepted."""
        self.accept()
        by_peer = {c.client[1]: c for c in self.worker.connections.values()}
        return [by_peer[client.getsockname()[1]] for client in clients]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def arrived(connection: Connection) -> None:
    """Wait until what the client has sent is here."""
    assert select.select([connection.sock], [], [], 30)[0]


def test_a_kept_connection_whose_next_delivery_is_here_is_not_given_up(stack: ExitStack) -> None:
    house = House(stack, room=3)
    clients = [house.client() for _ in range(3)]
    oldest, older, newest = house.held(*clients)
    for connection in (oldest, older, newest):
        connection.await_more()
    for age, connection in enumerate((newest, older, oldest)):
        connection.deadline -= age
    clients[0].sendall(REQUEST)
    arrived(oldest)
    house.client()
    house.accept()
    assert older.phase is Phase.CLOSED
    assert (oldest.phase, newest.phase) == (Phase.IDLE, Phase.IDLE)
    assert len(house.worker.connections) == 3


def test_slow_senders_stay_behind_idle_connections(stack: ExitStack) -> None:
    house = House(stack, room=2)
    clients = [house.client() for _ in range(2)]
    slow, idle = house.held(*clients)
    slow.reader.feed(b"POST / HTTP/1.1\r\n")
    for connection in (slow, idle):
        connection.await_more()
    house.client()
    house.accept()
    assert (slow.phase, idle.phase) == (Phase.READING, Phase.CLOSED)
    for other in [c for c in house.worker.connections.values() if c is not slow]:
        house.worker._close(other)
    house.worker.cfg.worker_connections = 1
    house.client()
    house.accept()
    assert slow.phase is Phase.CLOSED


def test_one_has_to_go_even_when_all_have_bytes(stack: ExitStack) -> None:
    house = House(stack, room=2)
    clients = [house.client() for _ in range(2)]
    for client, connection in zip(clients, house.held(*clients), strict=True):
        connection.await_more()
        client.sendall(REQUEST)
        arrived(connection)
    house.client()
    house.accept()
    assert len(house.worker.connections) == 2


@pytest.mark.parametrize(("workers", "taken"), [(1, ACCEPTS), (2, 1)])
def test_a_turn_takes_many_connections_unless_they_are_shared(
    stack: ExitStack, workers: int, taken: int
) -> None:
    house = House(stack, room=100, workers=workers)
    for _ in range(ACCEPTS + 4):
        house.client()
    house.accept()
    assert len(house.worker.connections) == taken


class Slowly:
    """The quick way: takes every delivery, and answers when it is told to."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.done: list[Any] = []

    def gate(self, *_: Any) -> int:
        return 1000

    def take(self, request: Any, _keep_alive: bool, ticket: Any) -> bool:
        if not request.target.startswith("/api"):
            return False
        self.taken.append(ticket)
        return True

    def flush(self) -> None:
        pass

    def finished(self) -> list[Any]:
        done, self.done = self.done, []
        return [(ticket, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") for ticket in done]


def turning(house: House, quick: Slowly) -> None:
    """Give the worker what a turn of its loop needs."""
    worker = house.worker
    worker.quick, worker.alive, worker.held, worker.at_work, worker.underway = quick, True, 0, 0, 0
    worker.done, worker.PIPE, worker.bell = deque(), [-1], -2
    worker.threads = worker.page_threads = SimpleNamespace(submit=lambda *_: None)
    worker.cfg.threads = 4
    worker.listeners = {}


def underway() -> float:
    found = re.search(rb"^webhook_deliveries_in_progress ([0-9.]+)$", metrics.render(), re.MULTILINE)
    assert found
    return float(found[1])


def test_deliveries_in_progress_are_counted_until_they_are_answered_and_pages_are_none(
    stack: ExitStack,
) -> None:
    house, quick = House(stack, room=9), Slowly()
    clients = [house.client() for _ in range(3)]
    turning(house, quick)
    worker = house.worker
    quickly, ordinary, page = house.held(*clients)
    clients[0].sendall(REQUEST)
    clients[1].sendall(REQUEST.replace(b"/api/v1/avatar/status_update", b"/other"))
    clients[2].sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    for connection in (quickly, ordinary, page):
        arrived(connection)
    worker._turn(0)
    assert underway() == 2
    worker.done.append((ordinary, ordinary.current, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
    worker._turn(0)
    assert underway() == 1
    quick.done = quick.taken
    worker.done.append((page, page.current, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    worker._turn(0)
    assert underway() == 0
