"""The parts of the console's process: two small pools, what is known of the instances, and who tried to log in.

Nothing here is shared with the intake but the database, and of that four connections at most: two that only read, two
for logins and actions. A statement has two seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from webhook_api import gauges
from webhook_api.auth import KeyStore
from webhook_api.auth.keys import FileSource
from webhook_api.config import Settings
from webhook_api.db import Connection, Database, DatabaseUnavailable
from webhook_api.web import files
from webhook_api.web.limits import Attempts
from webhook_api.web.monitor import Monitor

READERS: Final = 2
WRITERS: Final = 2
STATEMENT_SECONDS: Final = 2.0
READ_SECONDS: Final = 4.0
"""For all that one page asks."""
WRITE_SECONDS: Final = 20.0
"""For an action in its batches."""
STREAMS: Final = 6
"""Live views at once: each keeps a thread."""
DOWNLOADS: Final = 2
"""Files on their way at once: each keeps a thread."""
GAUGES_SECONDS: Final = 5.0
HEALTH_SECONDS: Final = 1.0
"""Less than the container's health check waits."""


class Services:
    """What lives as long as the process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        name = f"webhook-console {settings.instance_id}"
        self._reading = Database(
            settings.database_url,
            name,
            max_size=READERS,
            statement_timeout=STATEMENT_SECONDS,
            configure=_read_only,
        )
        self._writing = Database(
            settings.database_url, name, max_size=WRITERS, min_size=0, statement_timeout=STATEMENT_SECONDS
        )
        self.attempts = Attempts()
        self.monitor = Monitor(settings.console)
        self.streams = threading.BoundedSemaphore(STREAMS)
        self.downloads = threading.BoundedSemaphore(DOWNLOADS)
        self.files = files.reader(settings)
        """None: without the object store's keys files are only named."""
        self._inbox: tuple[float, gauges.Inbox] | None = None

    def start(self) -> None:
        """Open the pools and start the background thread. After the fork."""
        self._reading.open()
        self._writing.open()
        self.monitor.start()

    def stop(self) -> None:
        """Close what ``start`` has opened."""
        self.monitor.stop()
        self._reading.close()
        self._writing.close()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """Lend a connection that cannot write. Raises DatabaseUnavailable."""
        with self._reading.borrow(READ_SECONDS) as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Lend a connection for a login or an action. Raises DatabaseUnavailable."""
        with self._writing.borrow(WRITE_SECONDS) as connection:
            yield connection

    def inbox(self, connection: Connection) -> gauges.Inbox:
        """How full the inbox is, asked every few seconds at most."""
        kept, now = self._inbox, time.monotonic()
        if kept is None or now - kept[0] >= GAUGES_SECONDS:
            kept = (now, gauges.inbox(connection))
            self._inbox = kept
        return kept[1]

    def database_there(self) -> bool:
        """Whether the database answers."""
        try:
            with self._reading.borrow(HEALTH_SECONDS) as connection:
                connection.execute("select 1")
        except DatabaseUnavailable:
            return False
        return True

    def keys(self) -> KeyStore:
        """fal's keys as the instances have left them in their cache: no key server is ever asked from here."""
        cache = self.settings.fal_jwks_file or self.settings.fal_jwks_cache_file
        if self.settings.fal_jwks_file is None and cache is not None:
            return KeyStore(_Nowhere(self.settings.fal_jwks_url or ""), cache_file=cache, wait=0.2)
        return KeyStore(FileSource(cache or Path("/nonexistent")), wait=0.2)


class _Nowhere:
    """A source that is only named: its name says whose cache it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fetch(self) -> bytes:
        """Say that nothing is asked from here."""
        from webhook_api.auth.keys import KeySourceError

        raise KeySourceError("offline", "the console asks no key server")


def _read_only(connection: Connection) -> None:
    connection.execute("set default_transaction_read_only = on")
