"""Stands in for fal in tests: development keys, a JWKS server on loopback, and deliveries of every shape."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nacl.signing import SigningKey
from webhook_api.auth.signing import public_jwks, sign
from webhook_api.shapes import SHAPES, Credentials, Outgoing, outgoing

ACCOUNT = "dev-account"
SECRET = "test-secret-0123456789abcdef"


def new_key() -> SigningKey:
    """A key pair that stands in for fal's."""
    return SigningKey.generate()


def jwks(*keys: SigningKey) -> bytes:
    """The JWKS document with the public halves."""
    return json.dumps(public_jwks(*keys)).encode()


def delivery(
    shape: str,
    key: SigningKey | None = None,
    *,
    request_id: str | None = None,
    media: str = "http://media.test",
) -> Outgoing:
    """A delivery of a named shape (webhook_api.shapes.SHAPES), authorised with `key` or SECRET."""
    credentials = Credentials(key=key, account_id=ACCOUNT, secret=SECRET)
    return outgoing(SHAPES[shape], credentials, request_id or str(uuid.uuid4()), media)


def signed(
    key: SigningKey, body: bytes, *, request_id: str = "req-1", account: str = ACCOUNT, timestamp: int
) -> dict[str, str]:
    """The four headers over a body of the test's own."""
    return sign(key, request_id, account, timestamp, body) | {"Content-Type": "application/json"}


def fal_body(request_id: str, status: str = "OK", payload: Any = None, **extra: Any) -> bytes:
    """A body as fal writes it."""
    return json.dumps(
        {
            "request_id": request_id,
            "gateway_request_id": request_id,
            "status": status,
            "payload": payload,
            **extra,
        }
    ).encode()


@dataclass
class JwksServer:
    """A key server whose answer a test may change while it runs."""

    url: str = ""
    document: bytes = b""
    status: int = 200
    requests: int = 0
    hold: threading.Event = field(default_factory=threading.Event)
    """Set: answer at once. Clear it to make the server hang."""


@contextmanager
def jwks_server(*keys: SigningKey) -> Iterator[JwksServer]:
    """Serve a JWKS on a free loopback port."""
    state = JwksServer(document=jwks(*keys) if keys else b"")
    state.hold.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            state.hold.wait(30)
            try:
                self.send_response(state.status)
                self.send_header("Content-Length", str(len(state.document)))
                self.end_headers()
                self.wfile.write(state.document)
            except OSError:
                pass  # the client has given up, which is what some tests want

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # joined by server_close, so that no socket outlives the test
    state.url = f"http://127.0.0.1:{server.server_address[1]}/.well-known/jwks.json"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.hold.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
