"""Log lines into a pipe that nobody may be reading.

A container's output is a pipe that the engine reads. While the engine is away (restarted, updated: with live-restore the
containers go on) nobody does, and a write to a full pipe waits. A request is worth more than a line about it, so lines are
kept in memory meanwhile, within a bound, and no write ever waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import stat
from collections import deque
from typing import Final, TextIO

PIPE_BYTES: Final = 1024 * 1024
"""What an unprivileged process may make a pipe hold (fs.pipe-max-size)."""
KEPT_BYTES: Final = 1024 * 1024
"""What is kept in memory beyond that."""
_ATOMIC: Final = select.PIPE_BUF
"""A pipe that poll calls writable takes so much without waiting (pipe(7))."""


def handler_for(stream: TextIO) -> logging.Handler:
    """The handler that fits a stream: one that never waits where it is a pipe, the usual one for a file or a terminal."""
    # A stream of a test or of another program may have no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            return PipeHandler(stream.fileno())
    return logging.StreamHandler(stream)


class PipeHandler(logging.Handler):
    """Writes lines to a pipe, and keeps what it does not take for the next line, up to KEPT_BYTES; then the oldest go."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._kept: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        # Refused where the user's share of pipes is used up, or the kernel is another one: then it holds what it holds.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it."""
        try:
            self._keep(f"{self.format(record)}\n".encode())
            self.flush()
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popleft())
                self._dropped += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Write what is kept, as far as the pipe takes it now."""
        with self.lock or contextlib.nullcontext():
            while self._kept and self._takes():
                self._write(self._kept.popleft())
            if self._dropped and not self._kept and self._takes():
                lost, self._dropped = self._dropped, 0
                text = {"level": "warning", "logger": __name__, "event": "log_lines_dropped", "lines": lost}
                self._keep(f"{json.dumps(text)}\n".encode())
                self._write(self._kept.popleft())

    def _keep(self, line: bytes) -> None:
        self._kept.append(line)
        self._bytes += len(line)

    def _takes(self) -> bool:
        return any(event & select.POLLOUT for _, event in self._poll.poll(0))

    def _write(self, line: bytes) -> None:
        """One line in pieces that do not wait; what is left of it stays the first that is kept."""
        self._bytes -= len(line)
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._descriptor, rest[:_ATOMIC]) :]
            if rest and not self._takes():
                self._kept.appendleft(bytes(rest))
                self._bytes += len(rest)
                return
