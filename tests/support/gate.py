"""A TCP gate in front of a backend, to take it away in each of the ways in which a backend goes away."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

from tests.support.ports import reserve


class Gate:
    """Forwards loopback connections to a backend until it is told otherwise.

    - `open`: forward.
    - `silence`: keep all connections and take new ones, but carry nothing (a stopped process, a black hole).
    - `cut`: reset all connections and refuse new ones (a dead process).
    """

    def __init__(self, host: str, port: int) -> None:
        self._backend = (host, port)
        self._mode = "forward"
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._moved = threading.Event()
        self._closing = False
        self._reserved = reserve()
        self.port: int = self._reserved.getsockname()[1]
        self._listener = self._listen(self.port)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def open(self) -> None:
        """Forward again."""
        with self._lock:
            self._mode = "forward"
            if self._listener.fileno() == -1:
                self._listener = self._listen(self.port)
                threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def silence(self) -> None:
        """Carry nothing any more, but end no connection."""
        self._mode = "silent"

    def cut(self) -> None:
        """End all connections and refuse new ones."""
        with self._lock:
            self._mode = "cut"
            # close() alone does not wake a thread in accept().
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self._drop_all()

    def close(self) -> None:
        """End everything."""
        self._closing = True
        self.cut()
        self._reserved.close()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            backend = socket.create_connection(self._backend, timeout=5)
        except OSError:
            client.close()
            return
        backend.settimeout(None)
        pair = (client, backend)
        with self._lock:
            self._pairs.add(pair)
        # A cut may close both before they are registered.
        with contextlib.suppress(OSError, ValueError), selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, backend)
            selector.register(backend, selectors.EVENT_READ, client)
            while self._pump(selector):
                pass
        self._drop(pair)

    def _pump(self, selector: selectors.BaseSelector) -> bool:
        ready = selector.select(0.05)
        if self._mode == "cut" or self._closing:
            return False
        if self._mode == "silent":
            self._moved.wait(0.05)
            return True
        for key, _ in ready:
            source = key.fileobj
            assert isinstance(source, socket.socket)
            data = source.recv(65536)
            if not data:
                return False
            key.data.sendall(data)
        return True

    def _drop_all(self) -> None:
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._drop(pair)

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextlib.contextmanager
def gate(host: str, port: int) -> Iterator[Gate]:
    """A gate for the length of a test."""
    made = Gate(host, port)
    try:
        yield made
    finally:
        made.close()
