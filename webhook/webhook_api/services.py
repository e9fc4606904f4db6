"""The parts of one API process, wired: verifiers, pool, inbox, health. Threads start in ``start``, after the fork."""

from __future__ import annotations

import time
from typing import Any, Final

from prometheus_client import CollectorRegistry

from webhook_api import health, tracing
from webhook_api.auth import Accounts, Authenticator, FalVerifier, KeyStore, LearnedFile, SecretVerifier
from webhook_api.auth.keys import key_source
from webhook_api.auth.samples import Samples
from webhook_api.config import Settings
from webhook_api.db import Database
from webhook_api.errors import HTTP_STATUS
from webhook_api.gauges import InboxCollector
from webhook_api.inbox import Storage
from webhook_api.metrics import INFO, REJECTED

PAGES_CONNECTIONS: Final = 3
"""Connections for the pages that operators read. The intake has a pool of its own, which no page can empty."""


class Services:
    """What lives as long as the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = KeyStore(
            key_source(settings.fal_jwks_url, settings.fal_jwks_file),
            cache_file=settings.fal_jwks_cache_file,
            # Some threads are always left for what needs no new keys.
            waiters=max(1, settings.threads * 3 // 4),
        )
        self.accounts = Accounts(settings.fal_account_ids, _account_file(settings))
        self.samples = Samples(settings.database_url, settings.instance_id)
        self.authenticator = Authenticator(
            fal=FalVerifier(self.keys, self.accounts),
            manual=SecretVerifier(settings.fal_webhook_secret, settings.fal_webhook_secret_previous),
            senders={sender.name: sender.verifier() for sender in settings.sources},
            witness=self.samples.offer,
        )
        self.database = Database(
            settings.database_url, f"webhook-api {settings.instance_id}", max_size=PAGES_CONNECTIONS
        )
        self.storage = Storage(settings)
        self.inbox = self.storage.inbox
        self.monitor = health.Monitor(
            {
                "database": health.DatabaseCheck(settings),
                "redis": health.RedisCheck(settings),
                "object_store": health.ObjectStoreCheck(settings),
            }
        )
        self.gauges = CollectorRegistry()
        """What is asked for when the metrics are: apart from the counts, which several processes share."""
        self.gauges.register(InboxCollector(self.database.borrow))
        self._started_at = time.monotonic()

    def start(self) -> None:
        """Open the pool and start the background threads."""
        INFO.labels(
            version=self.settings.version, release=self.settings.release, instance=self.settings.instance_id
        ).set(1)
        for reason in HTTP_STATUS:
            # From zero on: whoever compares two readings sees the first refusal, too.
            REJECTED.labels(reason=reason)
        tracing.start(self.settings, "api")
        self.database.open()
        self.storage.start()
        self.monitor.start()
        self.keys.start()
        self.samples.start()

    def stop(self) -> None:
        """Close what ``start`` has opened."""
        self.keys.stop()
        self.samples.stop()
        self.monitor.stop()
        self.storage.stop()
        self.database.close()
        tracing.stop()

    def uptime(self) -> float:
        """Seconds since the process has started."""
        return time.monotonic() - self._started_at

    def health(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and document of /health."""
        return health.report(
            self.settings,
            self.monitor.snapshot(),
            self.keys.status(),
            storing=self.inbox.available,
            spool=self.storage.spool(),
        )


def _account_file(settings: Settings) -> LearnedFile | None:
    return LearnedFile(settings.fal_account_file) if settings.fal_account_file else None
