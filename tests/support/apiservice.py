"""The API as it runs in its container: `webhook-api serve`, a process of its own with gunicorn in it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import urllib3

from tests.support.ports import reserve

PACKAGE = Path(__file__).resolve().parents[2] / "webhook"
PATH = "/api/v1/avatar/status_update"
PATIENCE = 60.0
"""Seconds for what a busy machine may take its time for. Nothing is asserted about speed by it."""


BUSY = frozenset({"timeout", "busy", "locked", "no_connection", "connection_lost", "spool_failed"})
"""What a 503 may say of a service that does as it should, on a machine that is too busy for its deadlines."""


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ApiService:
    """A running process. `environment` is all that it gets, apart from PATH."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._reserved = reserve()
        self.port: int = self._reserved.getsockname()[1]
        self.log = log
        self._environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1",
            "HOST": "127.0.0.1", "PORT": str(self.port), **environment,
        }  # fmt: skip
        self.http = urllib3.PoolManager(maxsize=64, retries=False, timeout=20)
        self.process: subprocess.Popen[bytes] | None = None
        self.resent: list[str] = []
        """Why deliveries were sent again. Each of these arrivals may have been stored all the same."""

    @property
    def url(self) -> str:
        """Base address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers anything at all."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "webhook_api", "serve"], env=self._environment, stdout=log, stderr=log
            )
        self.wait_for(self._answers, "the process answers", PATIENCE)

    def stop(self, sent: signal.Signals = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal and wait for the end: a process that stops has 30 s for what is under way."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(sent)
        return self.process.wait(seconds)

    def close(self) -> None:
        """Give up connections and port."""
        self.http.clear()
        self._reserved.close()

    def kill_all(self) -> None:
        """SIGKILL to gunicorn and its workers at once, as `docker kill` does."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.process.kill()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        self.process.wait(10)

    def post(self, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any], float, dict[str, str]]:
        """POST a delivery: status, document, seconds, headers."""
        started = time.monotonic()
        answer = self.http.request("POST", self.url + PATH, body=body, headers=headers)
        return answer.status, json.loads(answer.data), time.monotonic() - started, dict(answer.headers)

    def deliver(
        self, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, Any], float, dict[str, str]]:
        """POST a delivery as fal does: again after a 503 that a busy machine explains. The last answer."""
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self.post(body, headers)
            if answer[0] != 503 or answer[1]["error"] not in BUSY or time.monotonic() > deadline:
                return answer
            self.resent.append(answer[1]["error"])
            time.sleep(0.1)

    def answered_within(self, seconds: str, endpoint: str = "intake.") -> None:
        """Assert it of every answer so far, by the service's own clock: that of a client in a crowd of threads also
        counts how long its own process did not run. `seconds` is a bucket of the histogram."""
        page = str(self.get("/metrics")[1])
        answers = _histogram(page, "count", endpoint)
        assert answers, f"nothing of {endpoint} was answered"
        in_time = _histogram(page, "bucket", endpoint, f'le="{seconds}"')
        assert in_time == answers, f"{answers - in_time:.0f} of {answers:.0f} took more than {seconds} s"

    def get(self, path: str) -> tuple[int, Any]:
        """GET: status and document (text when it is no JSON)."""
        answer = self.http.request("GET", self.url + path)
        try:
            return answer.status, json.loads(answer.data)
        except ValueError:
            return answer.status, answer.data.decode()

    def wait_health(self, status: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """Wait until /health says `status`; returns its document."""
        self.wait_for(lambda: self.get("/health")[1]["status"] == status, f"/health is {status}", seconds)
        document: dict[str, Any] = self.get("/health")[1]
        return document

    def wait_for(self, condition: Any, what: str, seconds: float = PATIENCE) -> None:
        """Wait on a condition, with the log in the failure."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process is not None and self.process.poll() is not None
            assert not ended, f"the process ended:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: not in {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            return self.get("/")[0] == 200
        except urllib3.exceptions.HTTPError:
            return False


def _histogram(page: str, part: str, endpoint: str, label: str = "") -> float:
    lines = re.findall(rf"^webhook_request_seconds_{part}{{(.*)}} (\S+)$", page, re.MULTILINE)
    return sum(
        float(value) for labels, value in lines if f'endpoint="{endpoint}' in labels and label in labels
    )


@contextmanager
def running(environment: dict[str, str], log: Path) -> Iterator[ApiService]:
    """A service for the length of a test."""
    service = ApiService(environment, log)
    try:
        service.start()
        yield service
    finally:
        service.stop(signal.SIGKILL if sys.exc_info()[0] else signal.SIGTERM)
        service.close()
