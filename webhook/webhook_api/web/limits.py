"""How often somebody may try to log in: by account, by address, and all together.

Kept in memory, because the console is one process; argon2 makes each attempt dear besides.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

PER_ACCOUNT: Final = 5
PER_ADDRESS: Final = 20
ALTOGETHER: Final = 60
WINDOW: Final = 300.0
"""Seconds in which so many attempts may fail."""
KEYS: Final = 10_000
"""Names and addresses that are remembered; the oldest are forgotten first."""


class Attempts:
    """Attempts that failed, as a window that slides."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: OrderedDict[tuple[str, str], list[float]] = OrderedDict()

    def wait(self, account: str, address: str) -> float:
        """Seconds until the next attempt is heard; 0: now. An attempt counts as failed until ``forget`` says otherwise."""
        now = self._clock()
        keys = (("account", account), ("address", address), ("all", ""))
        with self._lock:
            longest = max(self._left(key, most, now) for key, most in zip(keys, _MOST, strict=True))
            if longest <= 0:
                for key in keys:
                    self._note(key, now)
            return longest

    def forget(self, account: str, address: str) -> None:
        """The attempt was right: the account's failures are forgotten, and this one of the address and of all."""
        with self._lock:
            self._failed.pop(("account", account), None)
            for key in (("address", address), ("all", "")):
                if self._failed.get(key):
                    self._failed[key].pop()

    def _left(self, key: tuple[str, str], most: int, now: float) -> float:
        times = [moment for moment in self._failed.get(key, ()) if now - moment < WINDOW]
        if key in self._failed:
            self._failed[key] = times
        return times[-most] + WINDOW - now if len(times) >= most else 0.0

    def _note(self, key: tuple[str, str], now: float) -> None:
        self._failed.setdefault(key, []).append(now)
        self._failed.move_to_end(key)
        while len(self._failed) > KEYS:
            self._failed.popitem(last=False)


_MOST: Final = (PER_ACCOUNT, PER_ADDRESS, ALTOGETHER)
