"""A TCP proxy in front of a backend, so that a test can take the backend away and give it back."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.support.ports import reserve


class Proxy:
    """Forwards a loopback port to `target`. `down()` refuses and cuts connections; `up()` takes them again."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._pairs: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._reserved = reserve()
        self.port = int(self._reserved.getsockname()[1])
        self.up()

    @property
    def address(self) -> str:
        """`host:port` to use instead of the backend's."""
        return f"127.0.0.1:{self.port}"

    def up(self) -> None:
        """Accept connections."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        """Refuse new connections, and cut the present ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # Closing alone does not wake accept().
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for sock in pairs:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._reserved.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                backend = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            backend.settimeout(None)
            with self._lock:
                self._pairs |= {client, backend}
            for source, sink in ((client, backend), (backend, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with self._lock:
                mine = sock in self._pairs
                self._pairs.discard(sock)
            if mine:
                sock.close()
