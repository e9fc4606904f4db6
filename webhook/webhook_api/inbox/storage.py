"""The inbox of one API process, wired: pool, group commit, spool, keeper."""

from __future__ import annotations

from webhook_api.config import Settings
from webhook_api.db import Breaker
from webhook_api.inbox.database import DatabaseInbox, intake_pool
from webhook_api.inbox.keeper import Keeper, connector
from webhook_api.inbox.model import Inbox
from webhook_api.inbox.spool import Spool, SpoolState
from webhook_api.inbox.spooling import ALONE_SECONDS, SpoolingInbox


class Storage:
    """What stands behind the intake. ``start`` it after the fork."""

    def __init__(self, settings: Settings) -> None:
        url, instance = settings.database_url, settings.instance_id
        self._pool = intake_pool(url, f"webhook-intake {instance}")
        breaker = Breaker()
        self._spool: Spool | None = None
        if settings.spool_dir is None:
            self.inbox: Inbox = DatabaseInbox(self._pool, breaker=breaker, probed=True)
        else:
            self._spool = Spool(
                settings.spool_dir,
                max_bytes=settings.spool_max_bytes,
                reserve_bytes=settings.spool_reserve_bytes,
            )
            database = DatabaseInbox(self._pool, breaker=breaker, probed=True, deadline=ALONE_SECONDS)
            self.inbox = SpoolingInbox(database, self._spool)
        self._keeper = Keeper(self._pool, breaker, self._spool, connector(url, f"webhook-drain {instance}"))

    def start(self) -> None:
        """Open the pool, and start the thread that watches the database and drains the spool."""
        self._pool.open()
        self._keeper.start()

    def stop(self) -> None:
        """Close what ``start`` has opened. What stands in the spool stays on the disk."""
        self._keeper.stop()
        self._pool.close()

    def spool(self) -> SpoolState | None:
        """What stands in the spool; ``None`` when there is none."""
        return self._spool.state() if self._spool is not None else None
