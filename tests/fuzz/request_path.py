"""One input is one HTTP request through the application; after it, what must hold for every request is checked.

An input's first byte says how the request is authorised, its second how it is sent (and whether straight to the
application, or as bytes through the server's reader and the quick way); header lines follow, then an empty line and
the body (`Request.parse`). As a program it fuzzes with atheris:
`python -m tests.fuzz.request_path tests/fuzz/corpus -max_total_time=20`.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

ACCOUNT: Final = "fuzz-account"
SECRET: Final = "fuzz-secret-0123456789abcdef"
LIMIT: Final = 65536
KEY: Final = SigningKey(b"\x07" * 32)
PATHS: Final = (
    "/api/v1/avatar/status_update",
    "/api/v1/avatar/test_webhook",
    "/api/v1/sources/fal",
    "/api/v1/sources/nobody",
)
STATUSES: Final = frozenset({200, 400, 401, 403, 404, 411, 413, 415, 503})
FAULTS: Final = frozenset({400, 411, 413, 414, 415, 417, 431, 501, 503})
"""What the server itself answers to what is not a request."""
FAL: Final = (
    "X-Fal-Webhook-Request-Id",
    "X-Fal-Webhook-User-Id",
    "X-Fal-Webhook-Timestamp",
    "X-Fal-Webhook-Signature",
)
SECONDS: Final = 300


@dataclass(frozen=True, slots=True)
class Request:
    """A request as an input describes it."""

    mode: int
    """0 only the headers given, 1 signed, 2 signed and then changed, 3 with the secret, 4 signed but stale."""
    path: str
    chunked: bool
    served: bool
    """Through the server's reader, as bytes."""
    split: int
    """Size of the pieces in which these bytes come; 0: all at once."""
    length_off: int
    """How far Content-Length is from the body's length."""
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @classmethod
    def parse(cls, data: bytes) -> Request:
        """Read an input. Every input is a request."""
        mode, how = data[0] % 5 if data else 0, data[1] if len(data) > 1 else 0
        head, _, body = data[2:].partition(b"\n\n")
        lines = [line.partition(b":") for line in head.split(b"\n") if b":" in line][:8]
        headers = tuple((_name(name), _value(value)) for name, _, value in lines)
        split = 1 + len(data) % 7 if how & 4 else 0
        off = (0, 0, 0, 0, 0, 0, -1, 1)[how >> 5]
        return cls(mode, PATHS[how % 4], bool(how & 16), bool(how & 8), split, off, headers, body)

    def authorised(self, now: int) -> dict[str, str]:
        """The headers with what the mode adds."""
        headers = dict(self.headers)
        if self.mode == 3:
            headers["X-Webhook-Secret"] = SECRET
        if self.mode in {1, 2, 4}:
            headers |= signature("fuzz-1", now - (2 * SECONDS if self.mode == 4 else 0), self.body)
        return headers

    def wire(self, headers: dict[str, str]) -> bytes:
        """The request as HTTP/1.1. A header that the input names twice is there once."""
        lines = [f"POST {self.path} HTTP/1.1", "Host: x"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked")
        elif "Content-Length" not in headers:
            lines.append(f"Content-Length: {max(0, len(self.sent) + self.length_off)}")
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        return head + (_chunks(self.sent) if self.chunked else self.sent)

    @property
    def sent(self) -> bytes:
        """The body as it goes over the wire: mode 2 changes its last byte after signing."""
        if self.mode != 2 or not self.body:
            return self.body
        return self.body[:-1] + bytes([self.body[-1] ^ 1])


def _name(raw: bytes) -> str:
    return "".join(c for c in raw.decode("latin-1") if c.isascii() and (c.isalnum() or c in "-_"))[
        :64
    ].title()


def _value(raw: bytes) -> str:
    return "".join(c for c in raw.decode("latin-1") if c.isprintable() or c == "\t").strip()[:1000]


def _chunks(body: bytes, size: int = 97) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def _parts(payload: bytes) -> tuple[int, bytes]:
    head, _, body = payload.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def signature(request_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """fal's headers, written down from its contract a second time, so that one mistake is not made twice."""
    text = "\n".join((request_id, ACCOUNT, str(timestamp), sha256(body).hexdigest()))
    return dict(
        zip(FAL, (request_id, ACCOUNT, str(timestamp), KEY.sign(text.encode()).signature.hex()), strict=True)
    )


def proven(headers: dict[str, str], body: bytes, now: float) -> str | None:
    """How these bytes prove their sender, by a check of our own: `fresh`, `stale`, `secret` or None."""
    values = [headers.get(name) for name in FAL]
    if any(value is not None for value in values):
        return _signed([value or "" for value in values], body, now)
    given = headers.get("X-Webhook-Secret", "")
    return "secret" if hmac.compare_digest(given.encode("utf-8", "replace"), SECRET.encode()) else None


def _signed(values: list[str], body: bytes, now: float) -> str | None:
    request_id, account, timestamp, signed = values
    text = f"{request_id}\n{account}\n{timestamp}\n{sha256(body).hexdigest()}"
    try:
        KEY.verify_key.verify(text.encode(), bytes.fromhex(signed))
        age = now - int(timestamp)
    except (BadSignatureError, ValueError):
        return None
    return "fresh" if abs(age) < SECONDS - 5 else "stale"


class Sink:
    """Stands where the inbox stands, and keeps what one request hands over."""

    available = True

    def __init__(self) -> None:
        self.deliveries: list[Any] = []

    def store(self, delivery: Any, *, until: float | None = None) -> Any:
        """Keep it."""
        from webhook_api.inbox import Stored

        self.deliveries.append(delivery)
        return Stored(1, True, 1, False)

    def store_many(self, deliveries: Sequence[Any], _until: float) -> list[Any]:
        """Keep them."""
        return [self.store(delivery) for delivery in deliveries]


class Target:
    """The application with development keys and a sink."""

    def __init__(self, directory: Path) -> None:
        from webhook_api import quick
        from webhook_api.app import create_app
        from webhook_api.auth.signing import public_jwks
        from webhook_api.config import load_settings
        from webhook_api.services import Services

        jwks = directory / "jwks.json"
        jwks.write_text(json.dumps(public_jwks(KEY)))
        settings = load_settings(
            {
                "DATABASE_URL": "postgresql://u@127.0.0.1:1/d", "REDIS_URL": "redis://127.0.0.1:1",
                "MINIO_ENDPOINT": "127.0.0.1:1", "MINIO_ACCESS_KEY": "a", "MINIO_SECRET_KEY": "b",
                "FAL_WEBHOOK_SECRET": SECRET, "FAL_ACCOUNT_IDS": ACCOUNT, "FAL_JWKS_FILE": str(jwks),
                "WEBHOOK_BODY_LIMIT_BYTES": str(LIMIT), "INSTANCE_ID": "fuzz",
            }
        )  # fmt: skip
        services = Services(settings)
        services.inbox = self.sink = Sink()  # type: ignore[assignment]
        # What is looked for are wrong answers. A busy machine must cause none: by no keys yet, or by a late delivery.
        services.keys.refresh(60)
        self._deadline, quick.INTAKE_DEADLINE = quick.INTAKE_DEADLINE, 60.0  # type: ignore[misc]
        self.app = create_app(settings, services)
        self.quick = self.app.extensions["quick"]
        self.answered = threading.Event()
        self.quick.bell = self.answered.set
        self.quick.start()
        logging.disable(logging.CRITICAL)

    def check(self, data: bytes) -> int:
        """Send one request; AssertionError when what must hold does not. Returns the HTTP status."""
        request, now = Request.parse(data), time.time()
        headers = request.authorised(int(now))
        self.sink.deliveries.clear()
        status, answer, fault = (
            self._serve(request, headers) if request.served else self._send(request, headers)
        )
        self._holds(request, headers, status, answer, fault, now)
        return status

    def close(self) -> None:
        """End the thread of the quick way, and leave the module as it was."""
        from webhook_api import quick

        self.quick.stop()
        quick.INTAKE_DEADLINE = self._deadline  # type: ignore[misc]

    def _serve(self, request: Request, headers: dict[str, str]) -> tuple[int, bytes, bool]:
        """As the worker does it: reader, quick way, and the application for what that leaves."""
        from webhook_api.server import wsgi
        from webhook_api.server.request import Reader

        reader = Reader(self.quick.gate)
        raw = request.wire(headers)
        step = request.split or len(raw)
        for start in range(0, len(raw), step):
            if reader.fault is None and not reader.turned_away:
                reader.feed(raw[start : start + step])
        assert len(reader.ready) <= 1 or request.length_off or "Content-Length" in headers, (
            "one request became two"
        )
        if not reader.ready:
            if reader.fault is None:
                # It waits for more: the deadline ends that.
                return 400, b'{"error": "incomplete"}', True
            return (*_parts(self.quick.refuse(reader.fault)), True)
        read = reader.ready.popleft()
        if not read.refused:
            taken = self.quick.take(read, True, None)
            if isinstance(taken, bytes):
                return (*_parts(taken), False)
            if taken:
                self.answered.clear()
                self.quick.flush()
                assert self.answered.wait(30), "no answer"
                ((_, payload),) = self.quick.finished()
                return (*_parts(payload), False)
        environ = wsgi.environ(read, ("127.0.0.1", 1), ("127.0.0.1", 2))
        return (*_parts(wsgi.run(self.app, environ, keep_alive=True)), False)

    def _send(self, request: Request, headers: dict[str, str]) -> tuple[int, bytes, bool]:
        environ = {
            "REQUEST_METHOD": "POST", "PATH_INFO": request.path, "SCRIPT_NAME": "", "QUERY_STRING": "",
            "SERVER_NAME": "x", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": io.StringIO(),
            "wsgi.input": io.BytesIO(request.sent), "wsgi.multithread": True, "wsgi.multiprocess": False,
            "wsgi.run_once": False, "RAW_URI": request.path,
        }  # fmt: skip
        for name, value in headers.items():
            key = name.upper().replace("-", "_")
            environ[key if key in {"CONTENT_TYPE", "CONTENT_LENGTH"} else f"HTTP_{key}"] = value
        if request.chunked:
            environ |= {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
            environ.pop("CONTENT_LENGTH", None)
        elif "CONTENT_LENGTH" not in environ:
            environ["CONTENT_LENGTH"] = str(max(0, len(request.sent) + request.length_off))
        answered: list[int] = []

        def start_response(status: str, _headers: object, _info: object = None) -> Any:
            answered.append(int(status.split()[0]))
            return lambda _data: None

        parts: Iterable[bytes] = self.app(environ, start_response)
        text = b"".join(parts)
        if close := getattr(parts, "close", None):
            close()
        return answered[-1], text, False

    def _holds(
        self, request: Request, headers: dict[str, str], status: int, answer: bytes, fault: bool, now: float
    ) -> None:
        assert status in (FAULTS if fault else STATUSES), f"status {status}: {answer[:300]!r}"
        document = json.loads(answer)
        assert isinstance(document, dict), answer
        assert (status == 200) == ("error" not in document), answer
        stored = list(self.sink.deliveries)
        if status != 200 or request.path.endswith("test_webhook"):
            assert not stored, f"{status}, and yet stored"
        proof = proven(headers, request.sent, now)
        if status != 200:
            self._refused_rightly(request, headers, proof, status)
            return
        assert proof is not None, "taken without proof"
        if request.path.endswith("test_webhook"):
            return
        assert len(stored) == 1, f"answered 200, stored {len(stored)}"
        assert stored[0].body == request.sent, "not the bytes that were sent"
        if proof == "stale":
            assert stored[0].state != "pending", "stale, and yet to be processed"

    @staticmethod
    def _refused_rightly(request: Request, headers: dict[str, str], proof: str | None, status: int) -> None:
        """What fal has signed now is never refused for what its body says: it would be sent 31 times for nothing."""
        special = {
            "Content-Encoding",
            "Content-Length",
            "Transfer-Encoding",
            "Expect",
            "Upgrade",
            "Connection",
            "Host",
        }
        plain = not special & set(headers)
        whole = request.chunked or request.length_off == 0
        if proof == "fresh" and plain and whole and len(request.sent) <= LIMIT and request.path == PATHS[0]:
            raise AssertionError(f"a genuine delivery was answered with {status}")


def main() -> None:
    """Fuzz until atheris' own limits end it."""
    import atheris

    with atheris.instrument_imports(include=["webhook_api"]):
        import webhook_api.app
        import webhook_api.services  # noqa: F401
    with tempfile.TemporaryDirectory() as directory:
        target = Target(Path(directory))

        def one(data: bytes) -> None:
            target.check(data)

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
