"""The worker class of gunicorn: one loop that accepts, reads and writes, and threads that only work.

The arbiter, signals, bind, time limits and restarts are gunicorn's. What differs from its gthread worker: a request is
handed on when it is there in whole, so a sender that is slow, silent or hostile holds a connection and never a thread;
every phase has a deadline, every queue a bound; and ordinary deliveries never change the thread on their way to the
batch that commits them (docs/decisions/0420).
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

from gunicorn.workers.base import Worker

from webhook_api.metrics import IN_PROGRESS
from webhook_api.server import answers, wsgi
from webhook_api.server.connection import RECEIVE, WRITE_SECONDS, Connection, Phase
from webhook_api.server.request import Fault, Gate, Request

SWEEP_SECONDS: Final = 0.5
"""How often deadlines are looked at."""
STOP_KEEPALIVE_SECONDS: Final = 2.0
"""How long a stopping worker keeps idle connections for a request that may be on its way (as gthread does)."""
STOP_QUIET_SECONDS: Final = 0.15
"""Without a request for so long, nothing is on its way: what sends here is on the same machine, and keeps its connections in
use or has been told to send elsewhere (docs/rollout.md)."""
STOP_LOOK_SECONDS: Final = 0.05
"""How often a stopping worker looks whether it has finished."""
QUEUE: Final = 64
"""Requests that wait for a thread. More are answered 503 at once."""
PAGE_THREADS: Final = 4
ACCEPTS: Final = 16
"""Connections that are taken in one turn."""
CANDIDATES: Final = 16
"""Connections that are looked at when one has to go."""
RECEIVE_BYTES: Final = 64 * 1024 * 1024
"""What bodies may take together that are being received or wait for a thread. More are answered 503 at once."""
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT


class QuickWay(Protocol):
    """The way past Flask for ordinary deliveries (:mod:`webhook_api.quick`)."""

    gate: Gate
    bell: Callable[[], None]

    def refuse(self, fault: Fault) -> bytes:
        """Count, log and answer what could not be read."""
        ...

    def take(self, request: Request, keep_alive: bool, ticket: Any) -> bytes | bool:
        """Return True when the request was taken and its answer comes later, an answer, or False: Flask's."""
        ...

    def flush(self) -> None:
        """The events of one turn of the loop have been taken: hand on what was collected."""
        ...

    def finished(self) -> list[tuple[Any, bytes]]:
        """Tickets and answers that are ready."""
        ...


class EventWorker(Worker):  # type: ignore[misc,unused-ignore]
    """See the module."""

    def init_process(self) -> None:
        """Make the loop's parts, then serve (gunicorn's contract: the last statement is the parent's)."""
        self.poll = select.epoll()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.rung = False
        self.done: deque[tuple[Connection, Request, bytes]] = deque()
        self.connections: dict[int, Connection] = {}
        self.threads = ThreadPoolExecutor(self.cfg.threads, thread_name_prefix="request")
        # Pages are apart, so that nothing that deliveries do can keep /health waiting.
        self.page_threads = ThreadPoolExecutor(PAGE_THREADS, thread_name_prefix="page")
        self.at_work = 0
        self.underway = 0
        self.held = 0
        self.begun_at = 0.0
        self.stopping_at: float | None = None
        super().init_process()

    def ring(self) -> None:
        """Wake the loop. Any thread."""
        if not self.rung:
            self.rung = True
            os.eventfd_write(self.bell, 1)

    # The loop

    def run(self) -> None:
        """Serve until told to stop."""
        self.quick: QuickWay = self.wsgi.extensions["quick"]
        self.quick.bell = self.ring
        self.listeners = {listener.fileno(): listener for listener in self.sockets}
        for listener in self.sockets:
            listener.setblocking(False)
        self.poll.register(self.bell, _IN)
        self.poll.register(self.PIPE[0], _IN)
        self._listen(True)
        next_sweep = 0.0
        while not self._finished():
            now = time.monotonic()
            if now >= next_sweep:
                next_sweep = now + SWEEP_SECONDS
                self.notify()
                self._sweep(now)
                if self.ppid != os.getppid():
                    self.log.info("Parent changed, shutting down: %s", self)
                    self.alive = False
            wait = max(0.0, next_sweep - time.monotonic())
            self._turn(wait if self.alive else min(wait, STOP_LOOK_SECONDS))
        self._close_all()

    def _turn(self, timeout: float) -> None:
        underway = self.underway
        for fd, mask in self.poll.poll(timeout):
            connection = self.connections.get(fd)
            if connection is not None:
                with self._guard(connection):
                    self._on_connection(connection, mask)
            elif fd in self.listeners:
                self._accept(self.listeners[fd])
            elif fd == self.bell:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.bell)
                # Only now: what is added from here on rings again, and what was added before is sent below.
                self.rung = False
            elif fd == self.PIPE[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 4096)
        self._send_done()
        self.quick.flush()
        if self.underway != underway:
            IN_PROGRESS.set(self.underway)

    def _finished(self) -> bool:
        if self.alive:
            return False
        now = time.monotonic()
        if self.stopping_at is None:
            self.stopping_at = now
            self._listen(False)
            for listener in self.sockets:
                listener.close()
        if now - self.stopping_at > self.cfg.graceful_timeout:
            return True
        quiet = now - max(self.stopping_at, self.begun_at) > STOP_QUIET_SECONDS
        if quiet or now - self.stopping_at > STOP_KEEPALIVE_SECONDS:
            for connection in [c for c in self.connections.values() if c.unused and not c.has_bytes()]:
                self._close(connection)
        return not self.connections

    def _close_all(self) -> None:
        for connection in list(self.connections.values()):
            self._close(connection)
        for threads in (self.threads, self.page_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.poll.close()

    # Connections

    def _listen(self, wanted: bool) -> None:
        for fd in self.listeners:
            if wanted:
                self.poll.register(fd, _IN)
            else:
                self.poll.unregister(fd)

    def _accept(self, listener: socket.socket) -> None:
        """Take what waits: a sender behind a thousand others would otherwise wait for a thousand turns."""
        # One a turn where several workers share the socket, so that they also share its connections.
        for _ in range(ACCEPTS if self.cfg.workers == 1 else 1):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: socket.socket) -> bool:
        """Take one connection. Returns whether there may be more."""
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._make_room()
            return False
        if len(self.connections) >= self.cfg.worker_connections and not self._make_room():
            sock.close()
            return True
        sock.setblocking(False)
        client = address if isinstance(address, tuple) else ("", 0)
        if isinstance(address, tuple):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, (client[0], client[1]), self.quick.gate, self.cfg.keepalive)
        self.connections[connection.fd] = connection
        self._want(connection, _IN)
        return True

    def _make_room(self) -> bool:
        """Give up the connection that has used its time worst: an idle one, or the slowest sender.

        Not one whose next bytes are here already: a kept connection may carry a whole delivery that was not read yet.
        """
        waiting = [
            c for c in self.connections.values() if c.phase in {Phase.IDLE, Phase.READING, Phase.LINGERING}
        ]
        if not waiting:
            return False
        worst = heapq.nsmallest(
            CANDIDATES, waiting, key=lambda c: (c.phase is not Phase.IDLE, c.reader.started or c.deadline)
        )
        self._close(next((c for c in worst if not c.has_bytes()), worst[0]))
        return True

    def _want(self, connection: Connection, mask: int) -> None:
        if connection.mask == mask:
            return
        if connection.mask == 0:
            self.poll.register(connection.fd, mask)
        elif mask == 0:
            self.poll.unregister(connection.fd)
        else:
            self.poll.modify(connection.fd, mask)
        connection.mask = mask

    def _close(self, connection: Connection) -> None:
        if connection.phase is Phase.CLOSED:
            return
        connection.phase = Phase.CLOSED
        self._want(connection, 0)
        del self.connections[connection.fd]
        connection.sock.close()

    def _sweep(self, now: float) -> None:
        """Act on every deadline that has passed."""
        for connection in [c for c in self.connections.values() if c.deadline < now]:
            if connection.phase is Phase.READING and connection.reader.started is not None:
                self._fault(connection, Fault("read_timeout", "the request did not come in time"))
            elif connection.phase is not Phase.WORKING:
                self._close(connection)

    # Reading

    def _on_connection(self, connection: Connection, mask: int) -> None:
        phase = connection.phase
        if phase in {Phase.IDLE, Phase.READING}:
            self._read(connection)
        elif phase is Phase.WRITING and mask & ~_IN:
            self._write(connection)
        elif phase is Phase.LINGERING:
            if connection.drain() or time.monotonic() > connection.deadline:
                self._close(connection)
        elif phase is Phase.WORKING:
            # A pipelined request, or the sender's end: neither matters before the answer is there.
            self._want(connection, 0)

    def _read(self, connection: Connection) -> None:
        data = connection.receive()
        if data is None:
            return
        reader = connection.reader
        if not data:
            if reader.started is None:
                self._close(connection)
            else:
                # It may have ended its own side only, and listen still.
                self._fault(connection, Fault("incomplete_body", "the connection ended before the body"))
            return
        reader.feed(data)
        if reader.buffered > RECEIVE and not self._has_room(connection):
            reader.refuse(Fault("busy", "too many large bodies at once: come again"))
        self._proceed(connection)

    def _has_room(self, connection: Connection) -> bool:
        """Whether the bodies that are here leave room for this one; the first one always has it."""
        others = self.held + sum(c.reader.buffered for c in self.connections.values() if c is not connection)
        return others == 0 or others + connection.reader.buffered <= RECEIVE_BYTES

    def _proceed(self, connection: Connection) -> None:
        """Work on what has been read, or read on."""
        reader = connection.reader
        while reader.ready:
            request = reader.ready.popleft()
            if not self._begin(connection, request):
                return
        if reader.fault is not None:
            self._fault(connection, reader.fault)
            return
        if reader.expects_continue:
            reader.expects_continue = False
            with contextlib.suppress(OSError):
                connection.sock.send(answers.CONTINUE)
        connection.await_more()
        self._want(connection, _IN)

    # Answering

    def _begin(self, connection: Connection, request: Request) -> bool:
        """Have a request worked on. Returns whether its answer is out and the connection can go on."""
        self.begun_at = time.monotonic()
        connection.current = request
        connection.phase = Phase.WORKING
        keep_alive = request.keep_alive and self.alive and bool(self.cfg.keepalive)
        if not request.refused:
            taken = self.quick.take(request, keep_alive, connection)
            if taken is True:
                self.underway += 1
                return False
            if taken is not False:
                return self._answer(connection, taken)
        if self.at_work >= self.cfg.threads + QUEUE:
            return self._answer(connection, self._busy(request, keep_alive))
        self.at_work += 1
        self.underway += request.method == "POST"
        self.held += len(request.body)
        threads = self.threads if request.method == "POST" else self.page_threads
        threads.submit(self._work, connection, request, keep_alive)
        return False

    def _busy(self, request: Request, keep_alive: bool) -> bytes:
        return answers.refused(
            "busy", "too many requests at once: come again", request.headers.get("x-request-id") or "",
            keep_alive=keep_alive,
        )  # fmt: skip

    def _work(self, connection: Connection, request: Request, keep_alive: bool) -> None:
        """Run the application. In a thread."""
        try:
            environ = wsgi.environ(
                request, connection.client, (self.cfg.address[0][0], self.cfg.address[0][1])
            )
            payload = wsgi.run(self.wsgi, environ, keep_alive=keep_alive)
        except BaseException:
            self.log.exception("Error handling request %s %s", request.method, request.target[:200])
            payload = answers.of_fault(Fault("internal", "an unexpected fault; the log names it"))
        self.done.append((connection, request, payload))
        self.ring()

    def _send_done(self) -> None:
        for ticket, payload in self.quick.finished():
            self.underway -= 1
            self._finish(ticket, payload)
        while self.done:
            connection, request, payload = self.done.popleft()
            self.at_work -= 1
            self.underway -= request.method == "POST"
            self.held -= len(request.body)
            self._finish(connection, payload)

    def _finish(self, connection: Connection, payload: bytes) -> None:
        with self._guard(connection):
            if connection.phase is Phase.WORKING and self._answer(connection, payload):
                self._proceed(connection)

    @contextlib.contextmanager
    def _guard(self, connection: Connection) -> Iterator[None]:
        """A defect costs the connection on which it shows, not all the others."""
        try:
            yield
        except Exception:
            self.log.exception("defect on a connection")
            self._close(connection)

    def _answer(self, connection: Connection, payload: bytes) -> bool:
        """Write an answer. Returns whether it is out and the connection can go on."""
        request = connection.current
        connection.current = None
        keep = request is not None and b"\r\nConnection: keep-alive\r\n" in payload[:300]
        try:
            sent = connection.sock.send(payload)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(connection)
            return False
        if sent < len(payload):
            connection.out = payload[sent:]
            connection.current = request if keep else None
            connection.phase = Phase.WRITING
            connection.deadline = time.monotonic() + WRITE_SECONDS
            self._want(connection, _OUT)
            return False
        if keep:
            return True
        self._end(connection)
        return False

    def _write(self, connection: Connection) -> None:
        try:
            sent = connection.sock.send(connection.out)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
            return
        connection.out = connection.out[sent:]
        if connection.out:
            return
        if connection.current is not None:
            connection.current = None
            self._proceed(connection)
        else:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        """The last answer is out."""
        connection.linger()
        self._want(connection, _IN)

    def _fault(self, connection: Connection, fault: Fault) -> None:
        connection.phase = Phase.WORKING
        connection.current = None
        self._answer(connection, self.quick.refuse(fault))
