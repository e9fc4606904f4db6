"""The inbox in PostgreSQL: group commit, and the single statement for whatever a batch cannot decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import psycopg

from webhook_api.db import INTAKE_DEADLINE, Breaker, Connection, Database, DatabaseUnavailable
from webhook_api.inbox.allowance import extra, is_large
from webhook_api.inbox.batch import prepare, store_batch
from webhook_api.inbox.group import Bounds, GroupCommit, QueueFull, WaitedTooLong
from webhook_api.inbox.model import Delivery, Stored
from webhook_api.inbox.statement import store_one
from webhook_api.metrics import BATCH, COMMIT

LOG: Final = logging.getLogger(__name__)
_RETRY_PAUSE: Final = 0.02
BUFFER_BYTES: Final = 2 * 1024 * 1024
"""After a body of this size its connection is closed."""
CONNECTIONS: Final = 8
"""What the inbox's pool needs: one leads, the rest is for those that are stored alone."""
ROW_BYTES: Final = 1024
"""What a row weighs beside its body, about."""
HELD_AT_ONCE: Final = 4
"""So many different deliveries held up by locks, and none stored in between: the table is locked."""

R = TypeVar("R")


def intake_pool(database_url: str, application_name: str, *, max_size: int = CONNECTIONS) -> Database:
    """Make the pool that an inbox works on. ``open`` it after the fork."""
    return Database(database_url, application_name, max_size=max_size, configure=prepare)


class StoreAlone(Exception):
    """The batch did not decide this delivery."""


class DatabaseInbox:
    """Each delivery is committed before ``store`` returns; those that come at the same time share a commit.

    ``database`` is an :func:`intake_pool`.
    """

    def __init__(
        self,
        database: Database,
        *,
        deadline: float = INTAKE_DEADLINE,
        breaker: Breaker | None = None,
        clock: Callable[[], float] = time.monotonic,
        bounds: Bounds | None = None,
        leaders: int = 1,
        probed: bool = False,
    ) -> None:
        """``probed``: a :class:`~webhook_api.inbox.keeper.Keeper` finds out when the database is back."""
        self._database = database
        self._deadline = deadline
        self._breaker = breaker or Breaker()
        self._probed = probed
        self._clock = clock
        self._held: set[tuple[str, str, str]] = set()
        self._group: GroupCommit[Delivery, Stored] = GroupCommit(
            self._write, leaders=leaders, bounds=bounds, clock=clock
        )

    @property
    def available(self) -> bool:
        """Whether the database took the last delivery."""
        return self._breaker.closed

    @property
    def waiting(self) -> int:
        """How many deliveries wait for a commit."""
        return self._group.waiting

    def store(self, delivery: Delivery, *, until: float | None = None) -> Stored:
        """Commit the delivery. See :class:`~webhook_api.inbox.model.Inbox`."""
        if until is not None:
            return self._alone(delivery, until)
        size = len(delivery.body)
        if is_large(size):
            return self._alone(delivery, self._clock() + self._deadline + extra(size))
        until = self._clock() + self._deadline
        try:
            return self._group.submit(delivery, size + ROW_BYTES, self._deadline)
        except StoreAlone:
            return self._alone(delivery, until)
        except QueueFull:
            raise DatabaseUnavailable("busy", "too many deliveries wait for the database") from None
        except WaitedTooLong as error:
            raise DatabaseUnavailable("timeout", str(error), attempted=error.taken) from None

    def store_many(
        self, deliveries: Sequence[Delivery], until: float
    ) -> Sequence[Stored | DatabaseUnavailable | None]:
        """Commit a batch that somebody else has gathered. See :class:`~webhook_api.inbox.model.Inbox`."""
        try:
            return self.write_many(deliveries, until)
        except DatabaseUnavailable as error:
            # Not once more alone: what was attempted may be there, and would count as another arrival.
            return [error] * len(deliveries)

    def write_many(self, deliveries: Sequence[Delivery], until: float) -> list[Stored | None]:
        """Commit a batch. ``None``: to be stored alone. Raises DatabaseUnavailable; then none is known to be there."""
        results = self._write(deliveries, until - self._clock())
        return [result if isinstance(result, Stored) else None for result in results]

    def _write(self, deliveries: Sequence[Delivery], seconds: float) -> Sequence[Stored | BaseException]:
        """Write a batch, for :class:`GroupCommit`. It waits for no row that somebody holds."""
        try:
            results = self._guarded(
                lambda connection, again: store_batch(connection, deliveries, again=again),
                self._clock() + seconds,
                deliveries,
            )
        except DatabaseUnavailable as error:
            if error.reason != "locked" or not self.available:
                raise
            # A row of one of them is being written elsewhere, or the table is locked: each finds out for itself.
            return [StoreAlone() for _ in deliveries]
        except (psycopg.Error, ValueError) as error:
            # One of them cannot be stored as it is: the others shall not suffer for it.
            LOG.warning("batch_refused", extra={"rows": len(deliveries), "detail": type(error).__name__})
            return [StoreAlone() for _ in deliveries]
        return [StoreAlone() if result is None else result for result in results]

    def _alone(self, delivery: Delivery, until: float) -> Stored:
        def store(connection: Connection, again: bool) -> Stored:
            stored = store_one(connection, delivery, again=again)
            if len(delivery.body) >= BUFFER_BYTES:
                # libpq keeps its buffer, as large as the largest body, until the connection ends.
                connection.close()
            return stored

        return self._guarded(store, until, (delivery,))

    def _guarded(
        self, call: Callable[[Connection, bool], R], until: float, deliveries: Sequence[Delivery]
    ) -> R:
        """Call with a connection, and tell the breaker what became of it."""
        if not (self._breaker.closed if self._probed else self._breaker.admit()):
            raise self._refusal()
        started = self._clock()
        try:
            result = self._in_time(call, until)
        except DatabaseUnavailable as error:
            self._blame(error.reason, deliveries)
            raise
        except BaseException:
            # The database answered, so it is there; the fault is in the statement or in this process.
            self._breaker.succeed()
            raise
        self._breaker.succeed()
        self._held.clear()
        BATCH.observe(len(deliveries))
        COMMIT.observe(self._clock() - started)
        return result

    def _in_time(self, call: Callable[[Connection, bool], R], until: float) -> R:
        """Try again while time is left when a pooled connection proves to be a leftover of a restarted server."""
        again = False
        while True:
            try:
                with self._database.borrow(until - self._clock()) as connection:
                    if self._breaker.shut:
                        raise self._refusal()
                    return call(connection, again)
            except DatabaseUnavailable as error:
                error.attempted |= again
                if error.reason != "connection_lost" or until - self._clock() < 2 * _RETRY_PAUSE:
                    raise
                again = True
                time.sleep(_RETRY_PAUSE)

    def _blame(self, reason: str, deliveries: Sequence[Delivery]) -> None:
        """One held row is no outage, and others' deliveries go on; many different ones at once are a locked table.

        Nor is a large body that took too long, or for which too little time was left to get a connection: small ones may
        be quick enough, and find out if they are not.
        """
        large = any(is_large(len(delivery.body)) for delivery in deliveries)
        if large and reason in {"timeout", "no_connection"} and self._breaker.closed:
            return
        if reason == "locked" and self._breaker.closed:
            if len(deliveries) == 1:
                self._held.add(deliveries[0].identity)
            if len(self._held) < HELD_AT_ONCE:
                return
        self._held.clear()
        self._breaker.fail(reason)

    def _refusal(self) -> DatabaseUnavailable:
        return DatabaseUnavailable(
            self._breaker.reason or "no_connection", "the database is not available", attempted=False
        )
