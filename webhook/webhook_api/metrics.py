"""Prometheus metrics of the API. With one process (the default) nothing else is needed; with several, gunicorn's
configuration names a directory in which they share their counts (prometheus_client's multiprocess mode)."""

from __future__ import annotations

import os
from typing import Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

__all__ = ["CONTENT_TYPE_LATEST", "render"]

_FAST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 2.5)

DELIVERIES = Counter(
    "webhook_deliveries",
    "Deliveries answered with 200, by what became of them",
    ["source", "status", "outcome"],
)
"""outcome: stored, duplicate, variant (duplicate with another body), kept_aside (see webhook_kept_aside)."""
REJECTED = Counter("webhook_rejected", "Deliveries not accepted, by reason", ["reason"])
PREVIOUS_SECRET = Counter("webhook_previous_secret", "Calls that came with FAL_WEBHOOK_SECRET_PREVIOUS")
REQUESTS = Histogram("webhook_request_seconds", "Time to answer", ["endpoint", "code"], buckets=_FAST)
IN_PROGRESS = Gauge(
    "webhook_deliveries_in_progress",
    "Requests by POST that were read in whole and are not answered yet",
    multiprocess_mode="livesum",
)
STORE = Histogram("webhook_store_seconds", "Time to commit one delivery", buckets=_FAST)
BATCH = Histogram(
    "webhook_commit_rows", "Deliveries that shared a commit", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
COMMIT = Histogram(
    "webhook_commit_seconds", "Time of one commit, from the wish for a connection", buckets=_FAST
)
POOL = Gauge(
    "webhook_pool_connections",
    "Connections of the intake's pool: open, idle; and waiting: those who wait for one",
    ["state"],
    multiprocess_mode="livesum",
)
SPOOLED = Counter("webhook_spooled", "Deliveries answered with 200 from the spool")
SPOOL_ROWS = Gauge("webhook_spool_rows", "Deliveries that stand in the spool", multiprocess_mode="livesum")
SPOOL_BYTES = Gauge("webhook_spool_bytes", "Size of the spool directory", multiprocess_mode="livemax")
SPOOL_OLDEST = Gauge(
    "webhook_spool_oldest_seconds", "Age of the oldest delivery in the spool", multiprocess_mode="livemax"
)
SPOOL_DRAINED = Counter(
    "webhook_spool_drained",
    "Deliveries that went from the spool into the inbox, by what they were",
    ["outcome"],
)
SPOOL_FAILURES = Counter(
    "webhook_spool_failures",
    "Faults of the spool: full, disk, corrupt, drain, rejected, and refusals for them",
    ["reason"],
)
AGE = Histogram(
    "webhook_delivery_age_seconds",
    "Seconds between a sender's signature and the arrival of an authentic attempt, whatever became of it",
    ["source"],
    # Beyond 300 the attempt is kept aside. 7,200 is the end of the longest documented series of retries.
    buckets=(1, 2, 5, 10, 30, 60, 120, 300, 600, 1200, 3600, 7200),
)
ASIDE = Counter(
    "webhook_kept_aside",
    "Authentic deliveries that were stored but not processed, by reason. An alarm: somebody must look at them",
    ["source", "reason"],
)
"""reason: stale, future, account, malformed."""
SAMPLES = Counter(
    "webhook_samples",
    "Refused deliveries considered for webhook.samples, by what became of them",
    ["outcome"],
)
"""outcome: stored, limited (over the rate), dropped (the queue was full), failed (the database was away)."""
JWKS_AGE = Gauge(
    "webhook_jwks_age_seconds", "Age of the keys that verify fal's deliveries", multiprocess_mode="livemax"
)
JWKS_KEYS = Gauge(
    "webhook_jwks_keys", "Usable keys of fal; 0: deliveries get 503", multiprocess_mode="livemin"
)
JWKS_STALE = Gauge(
    "webhook_jwks_stale",
    "1 while the keys could not be renewed in time. An alarm: after 24 h without them deliveries get 503",
    multiprocess_mode="livemax",
)
JWKS_FETCHES = Counter("webhook_jwks_fetches", "Attempts to fetch fal's keys")
JWKS_FAILURES = Counter("webhook_jwks_fetch_failures", "Failed attempts to fetch fal's keys", ["reason"])
BODY = Histogram("webhook_body_bytes", "Size of accepted bodies", buckets=(1e3, 1e4, 1e5, 1e6, 1e7))
ANOMALIES = Counter("webhook_body_anomalies", "Oddities in accepted bodies", ["anomaly"])
HEALTH = Gauge(
    "webhook_dependency_up",
    "Whether a dependency answered its last check",
    ["check"],
    multiprocess_mode="min",
)
INFO = Gauge("webhook_info", "Constant 1", ["version", "release", "instance"], multiprocess_mode="max")


def render() -> bytes:
    """Return the metrics of all processes in the text format."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
