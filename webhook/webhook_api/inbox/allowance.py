"""How long storing may take: what waits has a fixed time, and bytes have theirs on top of it.

The 2 s that are promised are for what waits. A body of 10 MB needs time for its bytes alone, on a busy machine seconds.
"""

from __future__ import annotations

from typing import Final

from webhook_api.db import INTAKE_DEADLINE

LARGE_BYTES: Final = 512 * 1024
"""From this size on a body is stored alone, so that nobody's small delivery waits for it or fails with it."""
BYTES_PER_SECOND: Final = 3_000_000
"""The rate at which a body has to get into the database or onto the disk, at least."""
LARGE_SECONDS: Final = 4.8
"""Bound of a large delivery, from the moment at which it is here in whole. nginx waits 6 s, fal 15."""
DRAIN_BYTES_PER_SECOND: Final = 1_000_000
"""The same for the way from the spool into the database, for which nobody waits."""
DRAIN_SECONDS: Final = 6.0
DRAIN_SECONDS_MOST: Final = 30.0
DATABASE_SHARE: Final = 0.6
"""Of a large delivery's time what the database gets; the spool has the rest."""


def is_large(size: int) -> bool:
    """Whether a body of so many bytes is stored alone."""
    return size >= LARGE_BYTES


def extra(size: int) -> float:
    """Seconds that so many bytes may take beside what all deliveries may take."""
    return size / BYTES_PER_SECOND


def store_seconds(size: int, spent: float = 0.0) -> float:
    """Seconds that a large delivery has, when ``spent`` went by since it was here."""
    return max(0.0, min(INTAKE_DEADLINE + extra(size), LARGE_SECONDS - spent))


def drain_seconds(size: int, failures: int = 0) -> float:
    """Seconds for a batch out of the spool; more for one that had too few before."""
    return min(DRAIN_SECONDS_MOST, (DRAIN_SECONDS + size / DRAIN_BYTES_PER_SECOND) * (1 + failures))
