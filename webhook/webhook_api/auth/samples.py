"""Samples of refused deliveries, for another look: was that really a forgery, or a key or an account of our own?

Kept in ``webhook.samples``, in the background and within bounds: a rate for each reason, a queue that is never waited
for, and in the table a fixed number of slots. A refusal is neither slower nor does it fail for it, and whoever sends
garbage can fill nothing: 2 reasons x 512 slots x 64 KiB is all there ever is.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg.types.json import Jsonb

from webhook_api import db
from webhook_api.auth.accounts import Budget
from webhook_api.auth.errors import AuthError
from webhook_api.auth.model import Claims, Headers
from webhook_api.auth.signing import FAL_HEADERS, STANDARD_HEADERS
from webhook_api.bodies import clean_text
from webhook_api.metrics import SAMPLES

LOG: Final = logging.getLogger(__name__)
REASONS: Final = ("bad_signature", "account_not_allowed")
"""What is sampled. Other refusals are decided by the headers alone and say all there is to say."""
BODY_MAX: Final = 65_536
SLOTS: Final = 512
"""Of each reason; the schema holds it too (samples_slot)."""
PER_MINUTE: Final = 10
"""Samples of one reason that a process keeps in a minute."""
QUEUE: Final = 16
STATEMENT_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 30.0
"""After so long without a sample the connection is given back."""
_HEADERS: Final = (*FAL_HEADERS, *STANDARD_HEADERS, "Content-Type", "User-Agent")
_HEADER_MAX: Final = 500

_STORE: Final = f"""
insert into webhook.samples (reason, slot, source, instance, detail, headers, body, body_bytes, body_sha256)
select %(reason)s, coalesce(
        (select free.slot from generate_series(0, {SLOTS - 1}) as free (slot)
         where not exists (select from webhook.samples s where s.reason = %(reason)s and s.slot = free.slot)
         order by free.slot limit 1),
        (select s.slot from webhook.samples s where s.reason = %(reason)s order by s.seen_at limit 1)),
    %(source)s, %(instance)s, %(detail)s, %(headers)s, %(body)b, %(body_bytes)s, %(body_sha256)s
on conflict (reason, slot) do update
    set source = excluded.source, seen_at = excluded.seen_at, instance = excluded.instance,
        detail = excluded.detail, headers = excluded.headers, body = excluded.body,
        body_bytes = excluded.body_bytes, body_sha256 = excluded.body_sha256
"""  # noqa: S608  (the only value is a constant of this module)


@dataclass(frozen=True, slots=True)
class Sample:
    """One refused delivery."""

    reason: str
    source: str
    detail: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    """The first BODY_MAX bytes."""
    body_bytes: int
    body_sha256: str


class Samples:
    """Takes samples of what is refused and stores them in a thread of its own."""

    def __init__(
        self, database_url: str, instance: str, *, budgets: Mapping[str, Budget] | None = None
    ) -> None:
        self._url = database_url
        self._instance = instance
        self._queue: queue.Queue[Sample | None] = queue.Queue(QUEUE)
        self._budgets = budgets or {reason: Budget(PER_MINUTE, 60.0) for reason in REASONS}
        self._connection: db.Connection | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. After the fork."""
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it is just doing."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return

    def offer(self, error: AuthError, claims: Claims, headers: Headers, body: bytes) -> None:
        """Take a sample, or do not: never waits, never raises for a reason of its own."""
        budget = self._budgets.get(error.reason)
        if budget is None:
            return
        if not budget.take(1):
            SAMPLES.labels(outcome="limited").inc()
            return
        try:
            self._queue.put_nowait(_sample(error, claims, headers, body))
        except queue.Full:
            SAMPLES.labels(outcome="dropped").inc()

    def store(self, sample: Sample) -> None:
        """Write one sample now. Raises psycopg.Error."""
        if self._connection is None or self._connection.closed:
            self._connection = db.connect(
                self._url, f"webhook-samples {self._instance}", statement_timeout=STATEMENT_SECONDS
            )
        with self._connection.bounded(STATEMENT_SECONDS + 1) as connection:
            connection.execute(_STORE, _parameters(sample, self._instance))

    def _run(self) -> None:
        while True:
            try:
                sample = self._queue.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                self._forget()
                continue
            if sample is None:
                break
            try:
                self.store(sample)
                SAMPLES.labels(outcome="stored").inc()
            except Exception as error:  # whatever it is, the next sample is taken
                SAMPLES.labels(outcome="failed").inc()
                LOG.warning("sample_not_stored", extra={"reason": type(error).__name__})
                self._forget()
        self._forget()

    def _forget(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _sample(error: AuthError, claims: Claims, headers: Headers, body: bytes) -> Sample:
    found = ((name, headers.get(name)) for name in _HEADERS)
    return Sample(
        reason=error.reason,
        source=claims.source,
        detail=str(error)[:_HEADER_MAX],
        headers={name.lower(): clean_text(value)[:_HEADER_MAX] for name, value in found if value is not None},
        body=bytes(body[:BODY_MAX]),
        body_bytes=len(body),
        body_sha256=hashlib.sha256(body).hexdigest(),
    )


def _parameters(sample: Sample, instance: str) -> dict[str, Any]:
    return {
        "reason": sample.reason,
        "source": sample.source,
        "instance": instance,
        "detail": sample.detail,
        "headers": Jsonb(dict(sample.headers)),
        "body": sample.body,
        "body_bytes": sample.body_bytes,
        "body_sha256": sample.body_sha256,
    }
