"""Health: each dependency is asked in the background, in its own thread; /health only reads the last answers.

So a probe costs nothing, a dependency that hangs cannot hang a probe, and an old answer is never shown as a fresh one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
import redis
import urllib3
from minio import Minio
from minio.error import MinioException

from webhook_api import db
from webhook_api.config import Settings
from webhook_api.inbox.spool import SpoolState
from webhook_api.metrics import HEALTH

LOG: Final = logging.getLogger(__name__)
INTERVAL: Final = 0.8
"""Seconds between two checks: what /health shows is at most about a second old."""
SILENCE: Final = 3.0
"""Seconds after which a check that has not come back counts as failed."""
CHECK_TIMEOUT: Final = 1.5


class CheckFailed(Exception):
    """A dependency cannot be used. ``reason`` is one word and names no address: /health is public."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Result:
    """The last answer of one check."""

    ok: bool
    latency_ms: float
    finished_at: float
    """Monotonic seconds."""
    error: str | None = None


class Monitor:
    """Runs checks for as long as the process lives."""

    def __init__(
        self,
        checks: Mapping[str, Callable[[], None]],
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks = checks
        self._interval = interval
        self._clock = clock
        self._results: dict[str, Result] = {}
        self._stop = threading.Event()
        self._started_at: float | None = None

    def start(self) -> None:
        """Start a daemon thread for each check. After the fork."""
        self._started_at = self._clock()
        for name in self._checks:
            threading.Thread(target=self._loop, args=(name,), name=f"health-{name}", daemon=True).start()

    def stop(self) -> None:
        """Ask the threads to end; they do after their current check."""
        self._stop.set()

    def run_once(self, name: str) -> Result:
        """Run one check now, in this thread, and keep its answer."""
        started = self._clock()
        reason, detail = None, ""
        try:
            self._checks[name]()
        except CheckFailed as error:
            reason, detail = error.reason, str(error)
        except Exception as error:
            reason, detail = "defect", f"{type(error).__name__}: {error}"
        finished = self._clock()
        result = Result(reason is None, round((finished - started) * 1000, 1), finished, reason)
        self._report(name, self._results.get(name), result, detail)
        self._results[name] = result
        return result

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return each check as ``{ok, latency_ms, error?}``."""
        return {name: self._shown(name) for name in self._checks}

    def _shown(self, name: str) -> dict[str, Any]:
        result, now = self._results.get(name), self._clock()
        if result is None:
            return {"ok": False, "latency_ms": None, "error": "not_checked_yet"}
        silent_for = now - result.finished_at
        if silent_for > SILENCE + self._interval:
            return {"ok": False, "latency_ms": round(silent_for * 1000, 1), "error": "no_answer"}
        shown: dict[str, Any] = {"ok": result.ok, "latency_ms": result.latency_ms}
        return shown if result.error is None else shown | {"error": result.error}

    def _loop(self, name: str) -> None:
        while not self._stop.is_set():
            self.run_once(name)
            self._stop.wait(self._interval)

    def _report(self, name: str, before: Result | None, now: Result, detail: str) -> None:
        HEALTH.labels(check=name).set(1 if now.ok else 0)
        if before is not None and before.ok == now.ok and before.error == now.error:
            return
        if now.ok:
            LOG.info("dependency_up", extra={"check": name})
        else:
            LOG.warning("dependency_down", extra={"check": name, "reason": now.error, "detail": detail[:300]})


class DatabaseCheck:
    """PostgreSQL takes writes and has the schema. Keeps a connection of its own, so a busy pool is no outage."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.database_url
        self._name = f"webhook-health {settings.instance_id}"
        self._connection: db.Connection | None = None

    def __call__(self) -> None:
        """Ask once. Raises CheckFailed."""
        try:
            state = self._ask()
        except psycopg.Error as error:
            self._forget()
            raise CheckFailed(_database_reason(error), type(error).__name__) from error
        if state != "ok":
            raise CheckFailed(state, state)

    def _ask(self) -> str:
        if self._connection is None or self._connection.closed:
            self._connection = db.connect(self._url, self._name, statement_timeout=CHECK_TIMEOUT)
        with self._connection.bounded(CHECK_TIMEOUT) as connection:
            row = connection.execute(_DATABASE_STATE).fetchone()
        return str(row[0]) if row else "no_answer"

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


_DATABASE_STATE: Final = """
select case when pg_is_in_recovery() or current_setting('transaction_read_only') = 'on' then 'read_only'
            when to_regclass('webhook.deliveries') is null then 'not_migrated'
            else 'ok' end"""


def _database_reason(error: psycopg.Error) -> str:
    if isinstance(
        error, db.DeadlineExceeded | psycopg.errors.QueryCanceled | psycopg.errors.ConnectionTimeout
    ):
        return "timeout"
    text = str(error).lower()
    if "authentication" in text or "password" in text:
        return "authentication"
    return "missing_database" if "does not exist" in text else "unreachable"


class RedisCheck:
    """Redis answers PING with our password."""

    def __init__(self, settings: Settings) -> None:
        self._client = redis.Redis.from_url(
            settings.redis_url,
            password=settings.redis_password,
            socket_connect_timeout=CHECK_TIMEOUT,
            socket_timeout=CHECK_TIMEOUT,
            client_name="webhook-health",
        )

    def __call__(self) -> None:
        """Ask once. Raises CheckFailed."""
        try:
            self._client.ping()
        except redis.AuthenticationError as error:
            raise CheckFailed("authentication", type(error).__name__) from error
        except redis.TimeoutError as error:
            raise CheckFailed("timeout", type(error).__name__) from error
        except redis.RedisError as error:
            raise CheckFailed("unreachable", type(error).__name__) from error


class ObjectStoreCheck:
    """The bucket is there for our keys. The minio client has no timeout of its own."""

    def __init__(self, settings: Settings) -> None:
        self._bucket = settings.minio_bucket
        self._client = Minio(
            settings.minio_endpoint,
            access_key=settings.minio_access_key,
            secret_key=settings.minio_secret_key,
            secure=settings.minio_secure,
            region=settings.minio_region,
            http_client=urllib3.PoolManager(
                timeout=urllib3.Timeout(connect=CHECK_TIMEOUT, read=CHECK_TIMEOUT), retries=False
            ),
        )

    def __call__(self) -> None:
        """Ask once. Raises CheckFailed."""
        try:
            found = self._client.bucket_exists(self._bucket)
        except urllib3.exceptions.TimeoutError as error:
            raise CheckFailed("timeout", type(error).__name__) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise CheckFailed("unreachable", type(error).__name__) from error
        except MinioException as error:
            raise CheckFailed("refused", getattr(error, "code", "") or type(error).__name__) from error
        if not found:
            raise CheckFailed("bucket_missing", f"the bucket {self._bucket} is not there")


def report(
    settings: Settings,
    checks: dict[str, dict[str, Any]],
    keys: dict[str, Any],
    *,
    storing: bool,
    spool: SpoolState | None = None,
) -> tuple[int, dict[str, Any]]:
    """Put /health together: HTTP status and document.

    200 while deliveries can be accepted: the database or the spool takes them, and there is something to verify them
    with. A spool that holds something is no health, though nothing is lost.
    """
    database = checks["database"]
    if database["ok"] and not storing:
        checks["database"] = {**database, "ok": False, "error": "last_store_failed"}
    shown = {**checks, "keys": keys}
    verifier = bool(keys["ok"]) or settings.fal_webhook_secret is not None
    spooling = spool is not None and spool.ok
    if spool is not None:
        shown["spool"] = spool.shown()
    accepting = (bool(checks["database"]["ok"]) or spooling) and verifier
    waiting = spool is not None and spool.rows > 0
    healthy = (
        accepting and all(check["ok"] for check in shown.values()) and not keys.get("stale") and not waiting
    )
    document = {
        "status": "healthy" if healthy else "degraded" if accepting else "unhealthy",
        "version": settings.version,
        "release": settings.release,
        "instance": settings.instance_id,
        "checks": shown,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    return (200 if accepting else 503), document
