"""A steady stream of deliveries in a process of its own, and the ledger of every single answer.

Clients of four kinds side by side: over http and TLS, with connections that are kept and with one connection a request.
Nothing is sent twice and nothing is forgiven: whatever is not 200 is a failure, with its time and its cause.

    with Steady(http="http://127.0.0.1:80", https="https://127.0.0.1:8443", secret=…) as steady:
        …
    steady.failures, steady.accepted
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

REPO = Path(__file__).resolve().parents[2]
PATH = "/api/v1/avatar/status_update"
#: fal waits this long.
TIMEOUT = 15.0


@dataclass
class Steady:
    """The stream, as a context manager. `clients`: of each of the four kinds; `pause`: seconds between two of one client."""

    http: str
    https: str
    secret: str
    clients: int = 4
    pause: float = 0.05
    name: str = field(default_factory=lambda: f"steady-{uuid.uuid4().hex[:8]}")
    #: (request id, kind of client, status or 0, cause, Unix time)
    attempts: list[tuple[str, str, int, str, float]] = field(default_factory=list)

    def __enter__(self) -> Steady:
        self._directory = tempfile.TemporaryDirectory(prefix="steady-")
        self._file = Path(self._directory.name) / "ledger"
        command = [sys.executable, "-m", "tests.support.steady", self.http, self.https, str(self._file)]
        command += ["--name", self.name, "--clients", str(self.clients), "--pause", str(self.pause)]
        environment = os.environ | {"STEADY_SECRET": self.secret, "PYTHONPATH": str(REPO)}
        self._process = subprocess.Popen(command, cwd=REPO, env=environment, start_new_session=True)
        self.wait_for(4 * self.clients)
        return self

    def wait_for(self, more: int, seconds: float = 60) -> None:
        """Wait until so many more answers have come."""
        wanted, deadline = self.sent + more, time.monotonic() + seconds
        while self.sent < wanted:
            assert self._process.poll() is None, "the stream ended by itself"
            assert time.monotonic() < deadline, f"{self.sent} answers, {wanted} wanted"
            time.sleep(0.1)

    @property
    def sent(self) -> int:
        """Answers so far."""
        try:
            return self._file.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(TIMEOUT + 15)
        self.attempts = [tuple(json.loads(line)) for line in self._file.read_text().splitlines()]
        self._directory.cleanup()

    @property
    def accepted(self) -> list[str]:
        """Request ids that were answered with 200."""
        return [attempt[0] for attempt in self.attempts if attempt[2] == 200]

    @property
    def failures(self) -> list[tuple[str, str, int, str, float]]:
        """Everything that was not."""
        return [attempt for attempt in self.attempts if attempt[2] != 200]

    def must_be_undisturbed(self) -> None:
        """Assert that nothing failed. Where the machine is overloaded, the service may say so (503), and nothing else."""
        told = self.failures
        if os.getloadavg()[0] > 2 * (os.cpu_count() or 1):
            told = [a for a in told if not (a[2] == 503 and a[3].startswith('{"error":'))]
            assert len(self.failures) <= len(self.attempts) / 10, self.summary()
        assert not told, self.summary()

    def must_be_stored_once(self, database: str, seconds: float = 120) -> None:
        """Assert that each delivery that was answered with 200 is one row; what stands in the spool is on its way."""
        deadline = time.monotonic() + seconds
        while True:
            with psycopg.connect(database) as connection:
                sent = "SELECT request_id FROM webhook.deliveries WHERE request_id LIKE %s"
                rows = [row[0] for row in connection.execute(sent, [f"{self.name}-%"])]
            missing = set(self.accepted) - set(rows)
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert not missing, f"{len(missing)} of {len(self.accepted)} were answered with 200 and are no row"
        assert len(rows) == len(set(rows))

    def summary(self) -> str:
        """Numbers for people, and the first failures."""
        kinds = Counter(f"{kind} {status or 'none'}" for _, kind, status, _, _ in self.attempts)
        first = [
            f"{time.strftime('%H:%M:%S', time.gmtime(a[4]))} {a[1]} {a[2]} {a[3]}" for a in self.failures[:5]
        ]
        return (
            f"{len(self.attempts)} sent, {len(self.failures)} failed; {dict(sorted(kinds.items()))}; {first}"
        )


class Client(threading.Thread):
    """One sender: again and again until it is asked to end."""

    def __init__(
        self, url: str, keep: bool, name: str, pause: float, out: Out, ending: threading.Event
    ) -> None:
        super().__init__(daemon=True)
        parts = urlsplit(url)
        self._tls, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._keep, self._prefix, self._pause, self._out, self._ending = keep, name, pause, out, ending
        self._kind = f"{'https' if self._tls else 'http'}-{'kept' if keep else 'single'}"
        self._context = ssl._create_unverified_context() if self._tls else None
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Until the end."""
        while not self._ending.is_set():
            self._deliver(f"{self._prefix}-{uuid.uuid4()}")
            self._ending.wait(self._pause)

    def _deliver(self, request_id: str) -> None:
        body = json.dumps({"request_id": request_id, "status": "in_progress", "message": "load"}).encode()
        headers = {"Content-Type": "application/json", "X-Webhook-Secret": os.environ["STEADY_SECRET"]}
        begun = time.time()
        try:
            status, cause = self._post(body, headers if self._keep else headers | {"Connection": "close"})
        except (OSError, http.client.HTTPException) as error:
            status, cause = 0, f"{type(error).__name__}: {error}"
            self._close()
        self._out.write([request_id, self._kind, status, cause, begun])

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        if self._connection is None:
            self._connection = self._connect()
        self._connection.request("POST", PATH, body, headers)
        answer = self._connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        if answer.will_close or not self._keep:
            self._close()
        return answer.status, "" if answer.status == 200 else text[:200]

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class Out:
    """A file that several threads write whole lines to."""

    def __init__(self, path: str) -> None:
        self._stream = open(path, "a", buffering=1)  # noqa: SIM115 - as long as the process lives
        self._lock = threading.Lock()

    def write(self, entry: list[object]) -> None:
        """One line."""
        with self._lock:
            self._stream.write(json.dumps(entry) + "\n")


def main() -> None:
    """Send until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("http")
    parser.add_argument("https")
    parser.add_argument("out")
    parser.add_argument("--name", default="steady")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.05)
    given = parser.parse_args()
    ending, out = threading.Event(), Out(given.out)
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    clients = [
        Client(url, keep, given.name, given.pause, out, ending)
        for url in (given.http, given.https)
        for keep in (True, False)
        for _ in range(given.clients)
    ]
    for client in clients:
        client.start()
    while not ending.wait(0.2):
        pass
    for client in clients:
        client.join(TIMEOUT + 5)


if __name__ == "__main__":
    main()
