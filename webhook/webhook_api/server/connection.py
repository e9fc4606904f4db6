"""One connection: what is read from it, what is written to it, and until when."""

from __future__ import annotations

import socket
import time
from enum import Enum, auto
from typing import Final

from webhook_api.server.request import Gate, Reader, Request

HEAD_SECONDS: Final = 10.0
"""From a request's first byte (or the connection's begin) to the end of its headers."""
BODY_SECONDS: Final = 60.0
"""From a request's first byte to its last."""
SILENCE_SECONDS: Final = 10.0
"""Longest pause in a body."""
WRITE_SECONDS: Final = 10.0
"""For a client to take its answer."""
LINGER_SECONDS: Final = 10.0
"""For a refused sender to finish, whose body nobody wants: a connection that is reset loses the answer."""
LINGER_SILENCE: Final = 2.0
RECEIVE: Final = 65_536
RECEIVE_MORE: Final = 1_048_576
"""Bytes of one read when a large body is under way."""


class Phase(Enum):
    """What a connection waits for."""

    IDLE = auto()
    READING = auto()
    WORKING = auto()
    WRITING = auto()
    LINGERING = auto()
    CLOSED = auto()


class Connection:
    """A socket with its reader. Only the loop's thread touches it."""

    __slots__ = (
        "client", "current", "deadline", "end_at", "fd", "keep_seconds", "mask", "out", "peer_ended", "phase", "reader",
        "sock",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, client: tuple[str, int], gate: Gate, keep_seconds: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.client = client
        self.reader = Reader(gate)
        self.keep_seconds = keep_seconds
        self.phase = Phase.READING
        self.mask = 0
        """What the loop waits for; kept so that it is changed only when it differs."""
        self.current: Request | None = None
        """The request whose answer is outstanding."""
        self.out = b""
        self.peer_ended = False
        self.end_at = 0.0
        self.deadline = time.monotonic() + HEAD_SECONDS

    @property
    def unused(self) -> bool:
        """Whether no request is under way on it."""
        return self.phase in {Phase.IDLE, Phase.READING} and self.reader.started is None

    def receive(self) -> bytes | None:
        """Bytes, b"" at the end, or None when there are none now."""
        try:
            return self.sock.recv(RECEIVE_MORE if self.reader.buffered else RECEIVE)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def has_bytes(self) -> bool:
        """Whether something has come that was not read yet."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def await_more(self) -> None:
        """Set phase and deadline after a read that left nothing to work on."""
        now, reader = time.monotonic(), self.reader
        if reader.started is None:
            self.phase = Phase.IDLE
            self.deadline = now + self.keep_seconds
        else:
            self.phase = Phase.READING
            if reader.body_started:
                self.deadline = min(reader.started + BODY_SECONDS, now + SILENCE_SECONDS)
            else:
                self.deadline = reader.started + HEAD_SECONDS

    def linger(self) -> None:
        """Say that nothing more comes from here, and take what is still on its way."""
        now = time.monotonic()
        self.phase = Phase.LINGERING
        self.end_at = now + LINGER_SECONDS
        self.deadline = now + LINGER_SILENCE
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.deadline = now

    def drain(self) -> bool:
        """Throw away what came. Returns whether the sender has finished."""
        # One piece a turn: a fast sender must not hold the loop.
        data = self.receive()
        if data:
            self.deadline = min(self.end_at, time.monotonic() + LINGER_SILENCE)
        return data == b""
