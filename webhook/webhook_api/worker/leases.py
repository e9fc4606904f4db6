"""Which leases this process holds, and the attempts that go on alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from webhook_api.effects.base import Delivery

BACKLOG_BYTES: Final = 32 * 1024**2
"""Bodies of the deliveries that wait for their turn alone; above it, and above a batch of them, nothing is claimed."""


class Active:
    """The attempts that run now: their leases, and whether each should go on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, bool] = {}
        self._orphans: dict[str, int] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._jobs)

    def start(self, owner: str) -> None:
        """Note an attempt."""
        with self._lock:
            self._jobs.setdefault(owner, False)

    def is_lost(self, owner: str) -> bool:
        """Whether another worker has the lease by now."""
        return self._jobs.get(owner, False)

    def end(self, owner: str, *, orphaned: bool = False) -> None:
        """Forget an attempt. `orphaned`: its lease could not be given back, and has to be."""
        with self._lock:
            self._jobs.pop(owner, None)
            if orphaned:
                self._orphans[owner] = 1

    def owners(self) -> list[str]:
        """The leases that have to be renewed."""
        with self._lock:
            return list(self._jobs)

    def keep_only(self, asked: list[str], held: frozenset[str]) -> list[str]:
        """Tell the attempts among `asked` that no longer hold their lease; returns them."""
        with self._lock:
            lost = [owner for owner in asked if owner not in held and self._jobs.get(owner) is False]
            for owner in lost:
                self._jobs[owner] = True
        return lost

    def orphans(self) -> list[str]:
        """Leases without an attempt."""
        with self._lock:
            return list(self._orphans)

    def adopt(self, owners: Iterable[str]) -> None:
        """Orphans that were given back."""
        with self._lock:
            for owner in owners:
                self._orphans.pop(owner, None)


class Lane:
    """Runs attempts alone, `size` at once, each in a thread of its own; others wait for their turn."""

    def __init__(self, size: int, run: Callable[[Delivery], None]) -> None:
        self._size = size
        self._run = run
        self._lock = threading.Lock()
        self._waiting: deque[Delivery] = deque()
        self._running = 0
        self._closed = False

    def has_room(self, deliveries: int) -> bool:
        """Whether fewer than so many wait, and not too large ones."""
        with self._lock:
            return (
                len(self._waiting) < deliveries
                and sum(len(each.body) for each in self._waiting) < BACKLOG_BYTES
            )

    def put(self, delivery: Delivery) -> bool:
        """Have it run when it is its turn. False after `close`: nothing will come of it."""
        with self._lock:
            if self._closed:
                return False
            self._waiting.append(delivery)
        self._start()
        return True

    def close(self) -> list[Delivery]:
        """Start nothing any more; returns those that waited. What runs goes on."""
        with self._lock:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
        return left

    def _start(self) -> None:
        with self._lock:
            if not self._waiting or self._running >= self._size:
                return
            self._running += 1
            delivery = self._waiting.popleft()
        threading.Thread(
            target=self._work, args=(delivery,), name=f"delivery-{delivery.id}", daemon=True
        ).start()

    def _work(self, delivery: Delivery) -> None:
        try:
            self._run(delivery)
        finally:
            with self._lock:
                self._running -= 1
            self._start()
