"""Prometheus metrics of the worker's own jobs: the reconciler, retention, the look at the edge's certificate.

A worker shows them with its own.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_BATCHES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def _counter(name: str, about: str, *labels: str) -> Counter:
    return Counter(name, about, labels, registry=None)


def _gauge(name: str, about: str, *labels: str) -> Gauge:
    return Gauge(name, about, labels, registry=None)


RECONCILE_RUNS: Final = _counter(
    "webhook_reconcile_runs", "Runs of the reconciler (done, busy, paused, stopped, failed)", "outcome"
)
RECONCILE_ANSWERS: Final = _counter(
    "webhook_reconcile_answers", "Answers of fal's queue, by what they say", "answer"
)
RECONCILE_ERRORS: Final = _counter(
    "webhook_reconcile_api_errors", "Answers of fal's queue that bring nothing, by reason", "reason"
)
RECONCILE_CLOSED: Final = _counter(
    "webhook_reconcile_closed", "Requests that are asked for no longer, by what became of them", "state"
)
RECONCILE_WAITING: Final = _gauge("webhook_reconcile_waiting", "Requests whose result is asked for")
RECONCILE_OLDEST: Final = _gauge(
    "webhook_reconcile_oldest_seconds", "For how long the oldest of them has been asked for"
)
RECONCILE_PAUSED: Final = _gauge(
    "webhook_reconcile_paused", "1 while fal is left alone: key refused, throttled, unavailable"
)
PRUNE_RUNS: Final = _counter(
    "webhook_prune_runs", "Runs of retention, by outcome (done, busy, stopped, failed)", "outcome"
)
PRUNE_ROWS: Final = _counter("webhook_prune_rows", "Rows that retention has cleared or deleted", "what")
PRUNE_ERRORS: Final = _counter("webhook_prune_errors", "Batches that failed, by reason", "reason")
PRUNE_BATCH: Final = Histogram(
    "webhook_prune_batch_seconds", "Time of one transaction of retention", buckets=_BATCHES, registry=None
)
TABLE_BYTES: Final = _gauge(
    "webhook_table_bytes", "Size of a table with its indexes and large values", "table"
)
TABLE_ROWS: Final = _gauge("webhook_table_rows", "Rows of a table, as its statistics estimate them", "table")
CERTIFICATE_ENDS: Final = _gauge(
    "webhook_certificate_not_after_timestamp_seconds",
    "When the certificate ends that the edge shows; Unix time, 0 while it is not known",
)
CERTIFICATE_UP: Final = _gauge("webhook_certificate_up", "Whether the edge's certificate could be read")
INCIDENTS_OPEN: Final = _gauge("webhook_incidents_open", "1 while an incident of a kind is open", "kind")
NOTICES: Final = _counter("webhook_notices", "Notices of incidents (sent, failed)", "outcome")


def register(registry: CollectorRegistry) -> None:
    """Show them all in a registry."""
    for metric in (
        RECONCILE_RUNS, RECONCILE_ANSWERS, RECONCILE_ERRORS, RECONCILE_CLOSED, RECONCILE_WAITING, RECONCILE_OLDEST,
        RECONCILE_PAUSED, PRUNE_RUNS, PRUNE_ROWS, PRUNE_ERRORS, PRUNE_BATCH, TABLE_BYTES, TABLE_ROWS,
        CERTIFICATE_ENDS, CERTIFICATE_UP, INCIDENTS_OPEN, NOTICES,
    ):  # fmt: skip
        registry.register(metric)
