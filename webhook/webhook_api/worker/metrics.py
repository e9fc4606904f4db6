"""Metrics of a worker, in a registry of their own, and the small HTTP listener that shows them.

`/metrics` for Prometheus, `/healthz` for a probe: 200 while the loop turns. Not meant for the outside.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)

REGISTRY: Final = CollectorRegistry()
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)
_AGES: Final = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 15, 60, 300, 900, 3600, 21_600, 86_400, 604_800)

CLAIMED = Counter("webhook_worker_claimed", "Deliveries leased by this worker", registry=REGISTRY)
CLAIM_SECONDS = Histogram(
    "webhook_worker_claim_seconds", "Time of one claim", buckets=_SECONDS, registry=REGISTRY
)
BATCH = Histogram(
    "webhook_worker_batch_deliveries",
    "Deliveries that were handled together",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    registry=REGISTRY,
)
BATCH_SECONDS = Histogram(
    "webhook_worker_batch_seconds", "Time of one batch", buckets=_SECONDS, registry=REGISTRY
)
ATTEMPTS = Counter(
    "webhook_worker_attempts", "Attempts by the state that followed", ["state"], registry=REGISTRY
)
"""state: done, retry, parked, dead, pending (stopped in the middle)."""
EFFECTS = Counter(
    "webhook_worker_effects", "Effects that ended, by how", ["effect", "state"], registry=REGISTRY
)
"""state: done, skipped."""
EFFECT_SECONDS = Histogram(
    "webhook_worker_effect_seconds",
    "Time of an effect: of one delivery alone (one), or of all in a batch together (batch)",
    ["effect", "path"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
EFFECT_FAILURES = Counter(
    "webhook_worker_effect_failures",
    "Effects that failed, by whose fault it is and why",
    ["effect", "kind", "reason"],
    registry=REGISTRY,
)
AGE_AT_DONE = Histogram(
    "webhook_worker_age_at_done_seconds",
    "Seconds from a delivery's arrival until all its effects had happened",
    buckets=_AGES,
    registry=REGISTRY,
)
TRIES_AT_DONE = Histogram(
    "webhook_worker_tries_at_done",
    "Attempts that a finished delivery took",
    buckets=(1, 2, 3, 5, 8, 13, 21, 50, 100),
    registry=REGISTRY,
)
DEAD = Counter("webhook_worker_dead_letters", "Deliveries given up", registry=REGISTRY)
EXPIRED = Counter(
    "webhook_worker_leases_expired", "Leases of dead or hanging workers taken back", registry=REGISTRY
)
LOST = Counter(
    "webhook_worker_leases_lost", "Leases that another worker took from this one", registry=REGISTRY
)
UNRECORDED = Counter(
    "webhook_worker_attempts_unrecorded", "Attempts whose end the database did not take", registry=REGISTRY
)
ProcessCollector(registry=REGISTRY)

log = logging.getLogger(__name__)


class Listener:
    """The HTTP listener of one worker. A port that cannot be had is logged, and keeps no worker from its work."""

    def __init__(self, port: int, alive: Callable[[], bool], registry: CollectorRegistry = REGISTRY) -> None:
        """`port` 0: none."""
        self._server: ThreadingHTTPServer | None = None
        if not port:
            return
        try:
            self._server = _Server(("0.0.0.0", port), _handler(alive, registry))  # noqa: S104  (a container's own)
        except OSError as error:
            log.warning("metrics_port_unavailable", extra={"port": port, "error": str(error)})
            return
        threading.Thread(target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


def _handler(alive: Callable[[], bool], registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5.0

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            elif path == "/healthz":
                up = alive()
                self._answer(200 if up else 503, "text/plain", b"ok\n" if up else b"the loop hangs\n")
            else:
                self._answer(404, "text/plain", b"/metrics or /healthz\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are not worth a line."""

    return Handler
