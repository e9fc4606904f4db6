"""The sender: raw sockets and epoll in one process, so that it costs little beside what it measures.

``closed``: N connections, each sends its next request when its answer is there. ``open``: requests leave at a fixed
rate whatever the answers do, and a latency counts from the moment at which the request was due.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.intake import signed

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Tally:
    """What came back."""

    latencies: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    broken: int = 0

    def answer(self, status: bytes, seconds: float) -> None:
        """Count one answer."""
        name = status.decode()
        self.statuses[name] = self.statuses.get(name, 0) + 1
        self.latencies.append(seconds)

    def report(self, elapsed: float) -> dict[str, Any]:
        """Figures: a rate of answers with 200 and latencies in milliseconds."""
        ordered = sorted(self.latencies)
        at = {
            name: round(ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1000, 2)
            for name, part in {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}.items()
            if ordered
        }
        taken = self.statuses.get("200", 0)
        return {
            "rate": round(taken / elapsed, 1), "taken": taken, "seconds": round(elapsed, 2), "broken": self.broken,
            "statuses": self.statuses, "ms": at,
        }  # fmt: skip


class Sender:
    """Connections to one address (host:port, or the path of a Unix socket)."""

    def __init__(self, address: str, connections: int) -> None:
        self.address = address
        self.poll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.partial: dict[int, bytes] = {}
        for _ in range(connections):
            self._connect()

    def _connect(self) -> int:
        if self.address.startswith("/"):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.address)
        else:
            host, port = self.address.rsplit(":", 1)
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = connection.fileno()
        self.sockets[number] = connection
        self.poll.register(number, select.EPOLLIN)
        return number

    def receive(self, number: int) -> bytes | None:
        """The status of a whole answer, b"" when the connection ended, None when more must come."""
        try:
            data = self.sockets[number].recv(65536)
        except OSError:
            data = b""
        if not data:
            return b""
        data = self.partial.pop(number, b"") + data
        head = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, head + 2) if head >= 0 else None
        if length is None or len(data) < head + 4 + int(length[1]):
            self.partial[number] = data
            return None
        return data[9:12]

    def again(self, number: int) -> int:
        """A new connection in place of one that ended."""
        self.partial.pop(number, None)
        self.sockets.pop(number).close()
        return self._connect()


def closed(sender: Sender, requests: Iterator[bytes], seconds: float) -> dict[str, Any]:
    """Answers a second when every connection always waits for one."""
    tally, sent_at = Tally(), {}
    clock = time.perf_counter
    for number in list(sender.sockets):
        sender.sockets[number].sendall(next(requests))
        sent_at[number] = clock()
    started = clock()
    end = started + seconds
    busy = len(sent_at)
    while busy:
        for number, _ in sender.poll.poll(10):
            status = sender.receive(number)
            if status is None:
                continue
            now = clock()
            if status:
                tally.answer(status, now - sent_at.pop(number))
            else:
                tally.broken += 1
                sent_at.pop(number, None)
                number = sender.again(number)
            request = next(requests, None) if now < end else None
            if request is None:
                busy -= 1
                continue
            sender.sockets[number].sendall(request)
            sent_at[number] = now
    return tally.report(clock() - started)


def opened(sender: Sender, requests: Iterator[bytes], seconds: float, rate: float) -> dict[str, Any]:
    """Latencies at a fixed rate of requests."""
    tally, due_at = Tally(), {}
    clock = time.perf_counter
    idle, waiting = deque(sender.sockets), deque[tuple[float, bytes]]()
    started, count, total = clock(), 0, int(seconds * rate)
    while count < total or waiting or due_at:
        now = clock()
        while count < total and started + count / rate <= now:
            waiting.append((started + count / rate, next(requests)))
            count += 1
        while waiting and idle:
            number = idle.popleft()
            due_at[number], request = waiting.popleft()
            sender.sockets[number].sendall(request)
        pause = max(0.0, started + count / rate - clock()) if count < total else 10.0
        for number, _ in sender.poll.poll(pause):
            status = sender.receive(number)
            if status is None:
                continue
            if status:
                tally.answer(status, clock() - due_at.pop(number))
                idle.append(number)
            else:
                tally.broken += due_at.pop(number, None) is not None
                with_new = sender.again(number)
                if number in idle:
                    idle.remove(number)
                idle.append(with_new)
    return tally.report(clock() - started)


def main() -> None:
    """Send and print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float)
    options = parser.parse_args()
    requests = iter(list(signed.read(options.file)))
    sender = Sender(options.address, options.connections)
    gc.disable()
    if options.rate:
        result = opened(sender, requests, options.seconds, options.rate)
    else:
        result = closed(sender, requests, options.seconds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
