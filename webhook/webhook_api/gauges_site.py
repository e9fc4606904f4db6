"""What a worker shows of its site, for alarms: the last delivery, the last deployment of each host, and the disk.

Asked of the database at most every `TTL` seconds, by indexes alone; nothing of it is shown while the database is away.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from webhook_api.db import Connection, DatabaseUnavailable

TTL: Final = 15.0
HOSTS_DAYS: Final = 90
"""A host without a deployment for so long is no longer shown: it may be gone."""

_LAST_DELIVERY: Final = """
select extract(epoch from first_seen_at)::float8 from webhook.deliveries where not probe order by id desc limit 1
"""
_DEPLOYMENTS: Final = """
select distinct on (host) host, kind, result, extract(epoch from coalesce(ended_at, started_at))::float8
from webhook.deployments
where started_at > now() - make_interval(days => %s)
order by host, started_at desc, id desc
"""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deployment:
    """The last run on a host. `at`: when it ended, in Unix time."""

    host: str
    kind: str
    result: str
    at: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What the database says. `last_delivery`: Unix time; None when there was none, probes apart."""

    last_delivery: float | None
    deployments: tuple[Deployment, ...]


def seen(connection: Connection) -> Seen:
    """Ask for it."""
    row = connection.execute(_LAST_DELIVERY).fetchone()
    found = connection.execute(_DEPLOYMENTS, (HOSTS_DAYS,)).fetchall()
    return Seen(float(row[0]) if row else None, tuple(Deployment(*entry) for entry in found))


class SiteCollector(Collector):
    """Shows `seen` and the disk of the state directory as metrics."""

    def __init__(
        self,
        borrow: Callable[[], AbstractContextManager[Connection]],
        state_directory: Path | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`state_directory`: of the spool and the cached keys; None where there is none."""
        self._borrow = borrow
        self._directory = state_directory
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._seen: Seen | None = None

    def describe(self) -> list[Any]:
        """Nothing is asked of the database when this is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The metrics of this moment."""
        yield from self._disk()
        now = self._now()
        if now is not None:
            yield from _of_deliveries(now)
            yield from _of_deployments(now)

    def _disk(self) -> Iterator[GaugeMetricFamily]:
        if self._directory is None:
            return
        try:
            usage = shutil.disk_usage(self._directory)
        except OSError as error:
            log.warning("disk_unknown", extra={"path": str(self._directory), "error": str(error)})
            return
        free = GaugeMetricFamily("webhook_disk_free_bytes", "Free space where spool and state are kept")
        free.add_metric([], float(usage.free))
        yield free
        size = GaugeMetricFamily("webhook_disk_size_bytes", "Size of that file system")
        size.add_metric([], float(usage.total))
        yield size

    def _now(self) -> Seen | None:
        with self._lock:
            if self._clock() - self._asked_at >= TTL:
                self._asked_at = self._clock()
                try:
                    with self._borrow() as connection:
                        self._seen = seen(connection)
                except (DatabaseUnavailable, psycopg.Error) as error:
                    log.warning("gauges_unavailable", extra={"error": str(error)[:300]})
                    self._seen = None
            return self._seen


def _of_deliveries(now: Seen) -> Iterator[GaugeMetricFamily]:
    if now.last_delivery is None:
        return
    last = GaugeMetricFamily(
        "webhook_last_delivery_timestamp_seconds", "When the newest delivery arrived, probes apart; Unix time"
    )
    last.add_metric([], now.last_delivery)
    yield last


def _of_deployments(now: Seen) -> Iterator[GaugeMetricFamily]:
    result = GaugeMetricFamily(
        "webhook_last_deployment_result",
        "Constant 1: how the last deployment, rollback or restore of a host ended",
        labels=["host", "kind", "result"],
    )
    ended = GaugeMetricFamily(
        "webhook_last_deployment_timestamp_seconds", "When it ended; Unix time", labels=["host"]
    )
    for deployment in now.deployments:
        result.add_metric([deployment.host, deployment.kind, deployment.result], 1.0)
        ended.add_metric([deployment.host], deployment.at)
    yield result
    yield ended
