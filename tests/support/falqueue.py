"""fal's queue API over HTTPS on loopback, as its documentation describes it, with a CA of the test's own.

`GET /<owner>/<app>/requests/<id>/status` answers 202 while a request waits or runs and 200 when it has ended; `GET
/<owner>/<app>/requests/<id>` gives what the model answered, with the model's status. There is no FAILED. A sub-path of
the model id does not belong into these addresses (405).
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

KEY = "test-key-id:test-key-secret"
PORTRAIT, STYLE = "fal-ai/flux-lora-portrait-trainer", "fal-ai/flux-pro-trainer"
_PATH = re.compile(r"/([^/]+/[^/]+)/requests/([^/?]+)(/status)?(?:\?.*)?")


@dataclass
class Job:
    """A submitted request. `result` is None as long as it has not ended."""

    model: str = PORTRAIT
    status: str = "IN_PROGRESS"
    result: bytes | None = None
    http_status: int = 200
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request to the API."""

    method: str
    path: str
    at: float
    authorization: str | None


@dataclass
class FalQueue:
    """The API. A test changes it while it runs."""

    host: str = ""
    """`host:port`, for FAL_QUEUE_RUN_HOST."""
    ca: Path = Path()
    jobs: dict[str, Job] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    trouble: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    """Answers that are given first, in the place of the right ones."""
    hang: threading.Event = field(default_factory=threading.Event)
    """Cleared: no answer comes."""

    def succeed(self, request_id: str, result: Any, model: str = PORTRAIT) -> None:
        """The request has ended well."""
        raw = result if isinstance(result, bytes) else json.dumps(result).encode()
        self.jobs[request_id] = Job(model, "COMPLETED", raw)

    def fail(
        self, request_id: str, http_status: int, detail: Any, model: str = PORTRAIT, **more: Any
    ) -> None:
        """The request has ended badly: COMPLETED all the same, and its result is an error."""
        raw = json.dumps({"detail": detail}).encode()
        self.jobs[request_id] = Job(model, "COMPLETED", raw, http_status, **more)

    def answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        """What the API says."""
        if asked.authorization != f"Key {KEY}":
            return 401, {}, b'{"detail":"Authentication is required to access this resource."}'
        if self.trouble:
            return self.trouble.pop(0)
        found = _PATH.fullmatch(asked.path)
        if found is None:
            return 405, {}, b'{"detail":"Method Not Allowed"}'
        model, request_id, of_status = found.groups()
        job = self.jobs.get(request_id)
        if job is None or "/".join(job.model.split("/")[:2]) != model:
            return 404, {}, b'{"detail":"Request not found"}'
        return self._status(job, request_id) if of_status else self._result(job)

    def _status(self, job: Job, request_id: str) -> tuple[int, dict[str, str], bytes]:
        base = f"https://{self.host}/{job.model}/requests/{request_id}"
        document: dict[str, Any] = {
            "status": job.status,
            "request_id": request_id,
            "response_url": base,
            "status_url": f"{base}/status",
            "cancel_url": f"{base}/cancel",
            "logs": None,
        }
        if job.status == "IN_QUEUE":
            document["queue_position"] = 3
        if job.status == "COMPLETED":
            document["metrics"] = {"inference_time": 214.5}
            if job.error:
                document["error"] = job.error
        code = 202 if job.status in ("IN_QUEUE", "IN_PROGRESS") else 200
        return code, {"X-Fal-Request-Id": request_id}, json.dumps(document).encode()

    def _result(self, job: Job) -> tuple[int, dict[str, str], bytes]:
        if job.result is None:
            return 400, {}, b'{"detail":"Request is still in progress"}'
        return job.http_status, job.headers, job.result


@contextmanager
def fal_queue(directory: Path) -> Iterator[FalQueue]:
    """Serve it on a free loopback port."""
    state = FalQueue()
    state.hang.set()
    context, state.ca = _tls(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = Asked("GET", self.path, time.monotonic(), self.headers.get("Authorization"))
            state.asked.append(asked)
            state.hang.wait(30)
            code, headers, body = state.answer(asked)
            try:
                self.send_response(code)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that does not trust our CA, or has given up

        def get_request(self) -> tuple[Any, Any]:
            plain, address = self.socket.accept()
            plain.settimeout(30)
            return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    server = Server(("127.0.0.1", 0), Handler)
    state.host = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.hang.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def _tls(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """A context with a certificate for 127.0.0.1, and the file of who signed it (itself)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fal's queue in tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca, private = directory / "fal-queue-ca.pem", directory / "fal-queue-key.pem"
    ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, private)
    return context, ca
