"""The inbox: a delivery becomes one committed row, or the sender is told to come again.

This is the seam for everything between an accepted request and durability: whatever stands behind
:meth:`Inbox.store`, it returns only when the delivery is durable, and it raises
:class:`~webhook_api.db.DatabaseUnavailable` within 2 seconds, a large body within 5.2 (``allowance``).

- ``model``: what goes in and comes out. ``storage``: the parts of a process, wired.
- ``database``: the inbox in PostgreSQL. ``group`` lets those that come at once share a commit; ``batch`` stores many,
  ``statement`` stores one.
- ``spooling``: the spool behind the database. ``spool`` and ``spoolfile`` hold it; ``keeper`` and ``drain`` empty it.
"""

from webhook_api.inbox.database import DatabaseInbox, intake_pool
from webhook_api.inbox.model import Delivery, Inbox, Stored
from webhook_api.inbox.statement import MAX_VARIANTS
from webhook_api.inbox.storage import Storage

__all__ = ["MAX_VARIANTS", "DatabaseInbox", "Delivery", "Inbox", "Storage", "Stored", "intake_pool"]
