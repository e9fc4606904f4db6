"""The worker's own jobs beside the deliveries: asking fal for what never came, clearing away what is
old, counting, reading the edge's certificate, and telling people of incidents.

Each runs in a thread of its own in every worker; an advisory lock makes one of them the one that acts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from webhook_api import certificate, metrics_upkeep, reconcile, retention, rollups
from webhook_api.config import Settings
from webhook_api.worker import notices
from webhook_api.worker.metrics import REGISTRY

JOBS: Final[dict[str, Callable[[Settings, threading.Event], None]]] = {
    "reconcile": reconcile.job,
    "retention": retention.job,
    "certificate": certificate.job,
    "notices": notices.job,
    "rollups": rollups.job,
}

metrics_upkeep.register(REGISTRY)


class Upkeep:
    """The threads. ``stop`` is the worker's own event."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._threads = [
            threading.Thread(target=job, args=(settings, stop), name=name, daemon=True)
            for name, job in JOBS.items()
        ]

    def start(self) -> None:
        """Start them."""
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        """Wait for their end, after ``stop`` was set. One that hangs is left: it holds nothing but its own connection."""
        for thread in self._threads:
            thread.join(seconds / len(self._threads))
