"""The thread that keeps the inbox going: asks whether the database is back, drains the spool, adopts files, measures.

While the database is away no request has to find out whether it still is. Draining never takes more than about half
of the time, so that live intake has the other half.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from webhook_api import db
from webhook_api.db import Breaker, Connection, Database, DatabaseUnavailable, DeadlineExceeded
from webhook_api.inbox.allowance import DRAIN_SECONDS
from webhook_api.inbox.batch import prepare
from webhook_api.inbox.database import BUFFER_BYTES
from webhook_api.inbox.drain import BATCH_BYTES, BATCH_ROWS, drain, forget, time_for
from webhook_api.inbox.spool import Spool
from webhook_api.inbox.spoolfile import Row, SpoolBroken, SpoolFile
from webhook_api.metrics import POOL, SPOOL_DRAINED, SPOOL_FAILURES

LOG: Final = logging.getLogger(__name__)
TICK: Final = 0.2
LOOK: Final = 1.0
"""Seconds between two looks at the spool's disk."""
ADOPT: Final = 5.0
"""Seconds between two searches for files without an owner."""
SLOW_AT_ONCE: Final = 64
"""Requests whose rows were too slow before, of which it is remembered how often."""
BACKOFF: Final = (0.5, 1.0, 2.0, 5.0)
PROBE_SECONDS: Final = 1.0

# Taken back at once: it proves that a row could be written, and leaves none.
_PROBE: Final = """
insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256)
values ('manual', 'is the database back', gen_random_uuid()::text, 'unknown', '', repeat('0', 64))
"""


def probe(database: Database) -> None:
    """Write a row and take it back. Raises DatabaseUnavailable."""
    with database.borrow(PROBE_SECONDS) as connection, connection.transaction(force_rollback=True):
        connection.execute(_PROBE)


class Keeper:
    """One for each process. ``start`` it after the fork."""

    def __init__(
        self,
        database: Database,
        breaker: Breaker,
        spool: Spool | None,
        connect: Callable[[], Connection],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._breaker = breaker
        self._spool = spool
        self._connect = connect
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._connection: Connection | None = None
        self._looked_at = self._adopted_at = float("-inf")
        self._failures = 0
        self._not_before = float("-inf")
        self._rows = BATCH_ROWS
        self._slow: dict[str, int] = {}

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="inbox-keeper", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 5.0) -> None:
        """End the thread after what it is doing, then give the spool's files up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(seconds)
        if self._spool is not None and (self._thread is None or not self._thread.is_alive()):
            self._spool.stop()
        self._hang_up()

    def _run(self) -> None:
        if self._spool is not None:
            self._guarded(self._spool.start)
        while not self._stop.is_set():
            started = self._clock()
            drained = self._guarded(self.tick)
            spent = self._clock() - started
            self._stop.wait(min(1.0, spent) if drained else TICK)

    def _guarded(self, call: Callable[[], bool | None]) -> bool:
        try:
            return bool(call())
        except Exception:
            LOG.exception("keeper_failed")
            SPOOL_FAILURES.labels(reason="defect").inc()
            return False

    def tick(self) -> bool:
        """Do what is due. Whether there is more to do at once."""
        self._try_database()
        spool, now = self._spool, self._clock()
        look = now - self._looked_at >= LOOK
        if look:
            self._looked_at = now
            for state, number in self._database.usage().items():
                POOL.labels(state=state).set(number)
        if spool is None:
            return False
        if now - self._adopted_at >= ADOPT:
            self._adopted_at = now
            spool.adopt()
        if look:
            spool.refresh()
        if not spool.rows:
            spool.forget_all()
            self._hang_up()
            return False
        if not self._breaker.closed or now < self._not_before:
            return False
        return self._drain(spool)

    def _try_database(self) -> None:
        if self._breaker.closed or not self._breaker.admit():
            return
        try:
            probe(self._database)
        except DatabaseUnavailable as error:
            self._breaker.fail(error.reason)
        except Exception:
            self._breaker.fail("no_connection")
            raise
        else:
            self._breaker.succeed()
            LOG.info("database_back")

    def _drain(self, spool: Spool) -> bool:
        """Drain one batch. Whether it worked."""
        file = next((file for file in spool.files() if file.rows), None)
        if file is None:
            return False
        rows: list[Row] = []
        try:
            rows = file.head(self._rows, BATCH_BYTES)
            if rows:
                self._take(spool, file, rows)
            elif file.rows:
                file.recount()
        except SpoolBroken as error:
            self._broken(spool, file, error)
            return False
        except (psycopg.Error, DatabaseUnavailable) as error:
            return (
                self._slow_row(file, rows[0], error) if self._too_slow(rows, error) else self._back_off(error)
            )
        self._failures, self._rows = 0, BATCH_ROWS
        if not spool.rows:
            LOG.info("spool_drained")
            self._looked_at = float("-inf")
        return True

    def _take(self, spool: Spool, file: SpoolFile, rows: list[Row]) -> None:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
            prepare(self._connection)
        request_id = rows[0].delivery.request_id
        seconds = time_for(rows, self._slow.get(request_id, 0) if len(rows) == 1 else 0)
        with spool.not_looking(seconds), self._connection.bounded(seconds) as connection:
            done = drain(connection, file, rows, seconds)
        self._slow.pop(request_id, None)
        if sum(len(row.delivery.body) for row in rows) >= BUFFER_BYTES:
            # libpq keeps its buffer, as large as the largest body, until the connection ends.
            self._hang_up()
        for row, id_, outcome in done.taken:
            SPOOL_DRAINED.labels(outcome=outcome).inc()
            LOG.info(
                "delivery_drained",
                extra={
                    "outcome": outcome, "delivery_id": id_, "source": row.delivery.source,
                    "delivery_request_id": row.delivery.request_id, "arrivals": row.arrivals,
                },
            )  # fmt: skip
        for seq, why in done.rejected:
            SPOOL_FAILURES.labels(reason="rejected").inc()
            LOG.error("spool_row_rejected", extra={"file": file.path.name, "seq": seq, "detail": why[:300]})
        held = done.held
        spool.drained(file, [r.delivery.request_id for r in rows if r.delivery.request_id not in held])
        if held:
            # Nothing but held rows would otherwise be tried over and over.
            self._not_before = self._clock() + (TICK if done.taken else BACKOFF[1])
        if file not in spool.files():
            with contextlib.suppress(psycopg.Error):
                if self._connection is None:
                    self._connection = self._connect()
                forget(self._connection, file.id)

    def _broken(self, spool: Spool, file: SpoolFile, error: SpoolBroken) -> None:
        """Bring what can still be read into safety, and put the file aside."""
        self._failures += 1
        self._not_before = self._clock() + BACKOFF[min(self._failures, len(BACKOFF)) - 1]
        if not error.lost and self._failures < len(BACKOFF):
            SPOOL_FAILURES.labels(reason="drain").inc()
            return
        saved = 0
        if error.corrupt:
            spool.detach(file)
            for row in file.salvage():
                with contextlib.suppress(DatabaseUnavailable):
                    spool.put(row.delivery, row.received_at, unsure=True, seconds=5.0)
                    saved += 1
        LOG.error("spool_file_given_up", extra={"file": file.path.name, "rows": file.rows, "saved": saved})
        spool.give_up(file, error)
        self._failures = 0

    def _too_slow(self, rows: list[Row], error: Exception) -> bool:
        """Whether one row alone took more than its time: of the others nothing is known then."""
        return len(rows) == 1 and isinstance(error, psycopg.errors.QueryCanceled | DeadlineExceeded)

    def _slow_row(self, file: SpoolFile, row: Row, error: Exception) -> bool:
        """Give a row that was too slow more time, and let those of other requests go before. Whether there are any."""
        request_id = row.delivery.request_id
        if len(self._slow) >= SLOW_AT_ONCE:
            self._slow.clear()
        self._slow[request_id] = self._slow.get(request_id, 0) + 1
        try:
            others = file.others(request_id)
            if others:
                # What the server has cancelled is undone. What we gave up may be committed yet.
                file.postpone({request_id}, unsure=row.seq if isinstance(error, DeadlineExceeded) else None)
        except SpoolBroken as fault:
            LOG.warning("postpone_failed", extra={"file": file.path.name, "detail": str(fault)[:300]})
            others = False
        rows = self._rows
        self._back_off(error)
        if others:
            self._rows = rows
            self._not_before = self._clock() + TICK
        return False

    def _back_off(self, error: Exception) -> bool:
        pause = BACKOFF[min(self._failures, len(BACKOFF) - 1)]
        self._failures += 1
        self._not_before = self._clock() + pause
        self._rows = max(1, self._rows // 8)
        SPOOL_FAILURES.labels(reason="drain").inc()
        LOG.warning(
            "drain_failed",
            extra={"error": type(error).__name__, "detail": str(error)[:300], "pause_seconds": pause},
        )
        self._hang_up()
        return False

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def connector(database_url: str, application_name: str) -> Callable[[], Connection]:
    """Return what opens the drain's own connection: it never takes one from the intake."""
    return lambda: db.connect(database_url, application_name, statement_timeout=DRAIN_SECONDS / 1.5)
