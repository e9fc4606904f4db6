"""A steady stream of signed deliveries through an edge while something is done behind it, and what became of each."""

from __future__ import annotations

import http.client
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

from nacl.signing import SigningKey
from webhook_api.auth.signing import sign
from webhook_api.shapes import SHAPES

ACCOUNT = "aisha-dev"
PATH = "/api/v1/avatar/status_update"
SHAPE = "style-ok"
TIMEOUT = 15.0
"""Seconds that fal waits for an answer."""
THREADS = 12


@dataclass
class Answers:
    """What was sent and what was heard."""

    sent: int = 0
    failed: int = 0
    """No answer, or any but 200."""
    slowest: float = 0.0
    """Seconds of the slowest answer."""
    kinds: Counter[str] = field(default_factory=Counter)

    def as_result(self) -> dict[str, object]:
        """For the JSON."""
        return {
            "sent": self.sent,
            "failed": self.failed,
            "slowest_s": round(self.slowest, 3),
            "kinds": dict(self.kinds),
        }


class Stream:
    """`rate` deliveries a second to a loopback port; every second thread keeps its connection. A context manager."""

    def __init__(self, port: int, key: SigningKey, rate: float = 50.0) -> None:
        self.answers = Answers()
        self._port = port
        self._key = key
        self._gap = THREADS / rate
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(THREADS)]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(TIMEOUT + 5)

    def _run(self, number: int) -> None:
        keeps = number % 2 == 0
        line: http.client.HTTPConnection | None = None
        due = time.monotonic() + self._gap * number / THREADS
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            due = max(due + self._gap, time.monotonic() - 1)
            line = line or http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
            started = time.monotonic()
            kind = self._deliver(line)
            self._note(kind, time.monotonic() - started)
            if not keeps or kind != "200":
                line.close()
                line = None
        if line is not None:
            line.close()

    def _deliver(self, line: http.client.HTTPConnection) -> str:
        request_id = f"bench-rollout-{uuid.uuid4()}"
        body = SHAPES[SHAPE].build(request_id, "https://v3.fal.media")
        headers = {
            "Content-Type": "application/json",
            **sign(self._key, request_id, ACCOUNT, int(time.time()), body),
        }
        try:
            line.request("POST", PATH, body, headers)
            answer = line.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        return str(answer.status)

    def _note(self, kind: str, seconds: float) -> None:
        with self._lock:
            self.answers.sent += 1
            self.answers.failed += kind != "200"
            self.answers.slowest = max(self.answers.slowest, seconds)
            self.answers.kinds[kind] += 1
