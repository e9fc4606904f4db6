"""The console's connection: every wait on it is bounded, so that a database that hangs ends in a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from psycopg.abc import PQGen

from webhook_api.db import RV, Connection, conninfo

if TYPE_CHECKING:
    from webhook_api.config import Settings

FIRST_SECONDS: Final = 2.0
"""For the first answer after connecting: a server that hangs is told from one that works on a big question."""
STATEMENT_SECONDS: Final = 30.0


class Patient(Connection):
    """A connection whose every round trip is bounded, over the server's own bound."""

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """Wait as the base does, for STATEMENT_SECONDS and a little at most."""
        if self._deadline is not None:
            return super().wait(gen, interval=interval, timeout=timeout)
        with self.bounded(STATEMENT_SECONDS + 2):
            return super().wait(gen, interval=interval, timeout=timeout)


@contextmanager
def connected(settings: Settings, name: str = "webhook-console") -> Iterator[Connection]:
    """A connection for one command, in autocommit. Raises psycopg.Error within 5 s when there is no database."""
    info = conninfo(settings.database_url, name, STATEMENT_SECONDS)
    connection: Any = Patient.connect(info, autocommit=True)
    with connection:
        with connection.bounded(FIRST_SECONDS):
            connection.execute("select 1")
        yield connection
