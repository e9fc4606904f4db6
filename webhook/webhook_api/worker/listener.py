"""Hears of new deliveries: LISTEN on a connection of its own."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Final

import psycopg

from webhook_api.db import Connection, connect
from webhook_api.worker import queue

RETRY_SECONDS: Final = 2.5
_STATEMENT_SECONDS: Final = 4.0

log = logging.getLogger(__name__)


class Listener:
    """A connection that hears of new deliveries. Without it the worker polls, so its faults are not errors."""

    def __init__(self, database_url: str, name: str) -> None:
        self._database_url = database_url
        self._name = name
        self._connection: Connection | None = None
        self._retry_at = 0.0

    def connection(self) -> Connection | None:
        """The listening connection, opened again after a loss; None while the database is away."""
        if self._connection is None and time.monotonic() >= self._retry_at:
            try:
                self._connection = connect(
                    self._database_url, self._name, statement_timeout=_STATEMENT_SECONDS
                )
                self._connection.execute(f"listen {queue.CHANNEL}")
            except psycopg.Error as error:
                self.close()
                self._retry_at = time.monotonic() + RETRY_SECONDS
                log.warning("listen_failed", extra={"error": str(error)[:300]})
        return self._connection

    def drain(self) -> None:
        """Take what has arrived; forget a connection that was lost."""
        if self._connection is None:
            return
        try:
            for _ in self._connection.notifies(timeout=0):
                pass
        except psycopg.Error as error:
            log.warning("listen_lost", extra={"error": str(error)[:300]})
            self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error):
                self._connection.close()
            self._connection = None
