"""The database first, the spool when it is away; a request whose deliveries stand in the spool queues behind them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from webhook_api.db import INTAKE_DEADLINE, DatabaseUnavailable
from webhook_api.inbox.allowance import DATABASE_SHARE, extra, is_large, store_seconds
from webhook_api.inbox.database import DatabaseInbox
from webhook_api.inbox.model import Delivery, Stored
from webhook_api.inbox.spool import Spool
from webhook_api.inbox.spoolfile import Entry

DATABASE_SECONDS: Final = 0.5
"""What the database gets for a batch when there is a spool behind it. Whoever comes meanwhile waits as long, so this is
what most of a sender's 2 s goes into while the database is silent; and a slow commit loses nothing by the spool. Its
bytes have their time beside it."""
ALONE_SECONDS: Final = 1.0
"""What it gets for one delivery that is stored alone: it waits for a row that somebody holds, and nobody for it."""
SPOOL_SECONDS: Final = 0.4
"""What the spool gets at least. Of what the database has left it gets all."""


class SpoolingInbox:
    """Answers as the database does while it is there, and keeps deliveries on the disk while it is not."""

    def __init__(
        self,
        database: DatabaseInbox,
        spool: Spool,
        *,
        spool_seconds: float = SPOOL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._spool = spool
        self._spool_seconds = spool_seconds
        self._clock = clock
        self._wall = wall

    @property
    def available(self) -> bool:
        """Whether the database took the last delivery."""
        return self._database.available

    def store(self, delivery: Delivery, *, until: float | None = None) -> Stored:
        """Return when the delivery is durable in either place. Raises DatabaseUnavailable in time."""
        received_at, now, size = self._wall(), self._clock(), len(delivery.body)
        ends = now + (store_seconds(size) if is_large(size) else INTAKE_DEADLINE) if until is None else until
        if self._spool.holds(delivery.request_id):
            return self._put(delivery, received_at, ends, None)
        given_up = None
        if is_large(size):
            given_up = self._earlier(ends, DATABASE_SHARE * (ends - now))
        elif until is not None:
            given_up = self._earlier(until, ALONE_SECONDS)
        try:
            return self._database.store(delivery, until=given_up)
        except DatabaseUnavailable as error:
            if error.reason == "busy":
                # It is there and has more than enough to do: the sender has to slow down.
                raise
            fault = error
        return self._put(delivery, received_at, ends, fault)

    def _put(
        self, delivery: Delivery, received_at: float, ends: float, fault: DatabaseUnavailable | None
    ) -> Stored:
        unsure = fault is not None and fault.attempted
        try:
            return self._spool.put(delivery, received_at, unsure=unsure, seconds=self._left(ends))
        except DatabaseUnavailable as error:
            raise _both(fault, error) from None

    def store_many(
        self, deliveries: Sequence[Delivery], until: float
    ) -> list[Stored | DatabaseUnavailable | None]:
        """Commit a batch in one of the two places. See :class:`~webhook_api.inbox.model.Inbox`."""
        received_at = self._wall()
        results: list[Stored | DatabaseUnavailable | None] = [None] * len(deliveries)
        held = [self._spool.holds(delivery.request_id) for delivery in deliveries]
        direct = [position for position, behind in enumerate(held) if not behind]
        behind: list[tuple[int, DatabaseUnavailable | None]] = [
            (position, None) for position, behind in enumerate(held) if behind
        ]
        if direct:
            try:
                batch = [deliveries[position] for position in direct]
                seconds = DATABASE_SECONDS + extra(sum(len(delivery.body) for delivery in batch))
                decided = self._database.write_many(batch, self._earlier(until, seconds))
                for position, result in zip(direct, decided, strict=True):
                    results[position] = result
            except DatabaseUnavailable as error:
                behind += [(position, error) for position in direct]
        if behind:
            entries = [
                Entry(deliveries[position], received_at, fault is not None and fault.attempted)
                for position, fault in behind
            ]
            for (position, fault), spooled in zip(
                behind, self._spool.put_many(entries, self._left(until)), strict=True
            ):
                results[position] = (
                    _both(fault, spooled) if isinstance(spooled, DatabaseUnavailable) else spooled
                )
        return results

    def _earlier(self, until: float, seconds: float) -> float:
        """When the database is given up, so that the spool has time left."""
        now = self._clock()
        return max(now, min(until - SPOOL_SECONDS, now + seconds))

    def _left(self, until: float) -> float:
        """Seconds that the spool has."""
        return max(self._spool_seconds, until - self._clock())


def _both(fault: DatabaseUnavailable | None, error: DatabaseUnavailable) -> DatabaseUnavailable:
    """Why neither place took it: what the database's fault was, and the spool's."""
    if fault is None:
        why = "earlier deliveries of its request wait in the spool"
    elif fault.reason == "locked":
        why = "somebody holds its row in the database"
    elif fault.reason == "timeout" and fault.attempted:
        why = "the database did not take it in time"
    else:
        why = "the database is away"
    return DatabaseUnavailable(error.reason, f"{why}, and {error}", attempted=error.attempted)
