"""How full the inbox is and how old its oldest delivery, for `/metrics` of the API and of the workers.

Cheap at any size of the table: partial indexes answer, counts stop at `CAP`, and an answer is kept for `TTL` seconds,
however often it is asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from webhook_api.db import Connection, DatabaseUnavailable

CAP: Final = 10_000
"""Counts above it are shown as `CAP`: enough to raise an alarm."""
TTL: Final = 5.0

# Each line is answered by the partial index of its state. What is pending was never tried, so the order in which it is
# due is the order in which it arrived; of the rest the oldest of the first `CAP` is taken.
_QUERY: Final = f"""
select 'pending', count(*), extract(epoch from now() - min(first_seen_at))::float8
from (select first_seen_at from webhook.deliveries where state = 'pending' order by next_attempt_at limit {CAP}) as p
union all
select state, count(*), extract(epoch from now() - min(first_seen_at))::float8
from (select state, first_seen_at from webhook.deliveries where state in ('retry', 'parked')
      order by next_attempt_at limit {CAP}) as r
group by state
union all
select 'leased', count(*), extract(epoch from now() - min(first_seen_at))::float8
from (select first_seen_at from webhook.deliveries where state = 'leased' order by lease_until limit {CAP}) as l
union all
select case when aside is null then 'dead' else 'aside' end, count(*),
    extract(epoch from now() - min(last_seen_at))::float8
from (select aside, last_seen_at from webhook.deliveries where state = 'dead' and discarded_at is null
      order by last_seen_at limit {CAP}) as d
group by 1
"""  # noqa: S608  (the only value is a constant of this module)
STATES: Final = ("pending", "leased", "retry", "parked", "dead", "aside")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inbox:
    """Deliveries by state (at most `CAP` each) and the age in seconds of the oldest; `aside`: kept, not processed."""

    count: dict[str, int] = field(default_factory=dict)
    oldest: dict[str, float] = field(default_factory=dict)


def inbox(connection: Connection) -> Inbox:
    """Ask how full the inbox is. States without deliveries count 0 and have no oldest."""
    found = Inbox(dict.fromkeys(STATES, 0))
    for state, number, oldest in connection.execute(_QUERY).fetchall():
        found.count[state] = int(number)
        if oldest is not None:
            found.oldest[state] = max(0.0, float(oldest))
    return found


class InboxCollector(Collector):
    """Shows `inbox` as metrics. Asked of the database at most every `TTL` seconds; nothing is shown while it is away."""

    def __init__(
        self,
        borrow: Callable[[], AbstractContextManager[Connection]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._borrow = borrow
        self._clock = clock
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._inbox: Inbox | None = None

    def describe(self) -> list[Any]:
        """Nothing is asked of the database when this is registered."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The metrics of this moment."""
        inbox_now = self._now()
        up = GaugeMetricFamily("webhook_inbox_up", "Whether the inbox could be asked")
        up.add_metric([], 0.0 if inbox_now is None else 1.0)
        yield up
        count = GaugeMetricFamily(
            "webhook_inbox_deliveries", f"Unfinished deliveries by state, at most {CAP}", labels=["state"]
        )
        oldest = GaugeMetricFamily(
            "webhook_inbox_oldest_seconds",
            "Age of the oldest unfinished delivery of a state",
            labels=["state"],
        )
        for state, number in (inbox_now.count if inbox_now else {}).items():
            count.add_metric([state], float(number))
            oldest.add_metric([state], inbox_now.oldest.get(state, 0.0) if inbox_now else 0.0)
        yield count
        yield oldest

    def _now(self) -> Inbox | None:
        with self._lock:
            if self._clock() - self._asked_at >= TTL:
                self._asked_at = self._clock()
                try:
                    with self._borrow() as connection:
                        self._inbox = inbox(connection)
                except (DatabaseUnavailable, psycopg.Error) as error:
                    log.warning("gauges_unavailable", extra={"error": str(error)[:300]})
                    self._inbox = None
            return self._inbox
