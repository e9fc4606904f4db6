"""A media host for tests: a real HTTP server on loopback that also misbehaves, on request."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class File:
    """What the host answers under a path."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    announce: int | None = None
    """Content-Length where it is not the true one."""
    length: bool = True
    """False: no Content-Length; the connection's end is the file's."""
    chunked: bool = False
    stop_after: int | None = None
    """Close the connection after so many bytes."""
    gate: threading.Event | None = None
    """Wait for it after half of the bytes."""


class MediaHost:
    """The running server: `files` by path, `hits` by path, `hosts` the Host headers seen."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, File] = {}
        self.hits: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.half_sent = threading.Event()
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.serve(self)

            def log_message(self, *_: object) -> None:
                """Be quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that went away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = int(self._server.server_address[1])
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def url(self, path: str) -> str:
        """Address of a file over plain http."""
        return f"http://{self.address}{path}"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request as its file says."""
        path = request.path.partition("?")[0]
        self.hits[path] += 1
        self.requests.append({"path": request.path, **{k.lower(): v for k, v in request.headers.items()}})
        file = self.files.get(path, File(b"not here", status=404))
        request.close_connection = True
        request.send_response(file.status)
        request.send_header("Content-Type", file.content_type)
        for name, value in file.headers.items():
            request.send_header(name, value)
        if file.chunked:
            request.send_header("Transfer-Encoding", "chunked")
        elif file.length:
            request.send_header("Content-Length", str(file.announce or len(file.content)))
        request.end_headers()
        self._body(request, file)

    def _body(self, request: BaseHTTPRequestHandler, file: File) -> None:
        content = file.content[: file.stop_after]
        half = len(content) // 2
        for number, piece in enumerate((content[:half], content[half:])):
            if piece:
                request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if file.chunked else piece)
                request.wfile.flush()
            if number == 0 and file.gate is not None:
                self.half_sent.set()
                file.gate.wait(240)
        if file.chunked and file.stop_after is None:
            request.wfile.write(b"0\r\n\r\n")

    def __enter__(self) -> MediaHost:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            if file.gate is not None:
                file.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@contextmanager
def media_host(**files: bytes) -> Iterator[MediaHost]:
    """A media host with plain files, for as long as the block lasts."""
    with MediaHost() as host:
        host.files = {f"/{name}": File(content) for name, content in files.items()}
        yield host
