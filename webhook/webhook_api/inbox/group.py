"""Group commit: whoever comes while a commit is under way shares the next one.

A caller that finds nobody at work leads: it writes at once, alone, with no wait added. Those that come meanwhile queue,
and when the leader is done, the first of them leads the rest. So batches are as large as the load makes them, and there
is no timer and no thread of its own. Knows nothing of databases.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")

_QUEUED: Final = 0
_TAKEN: Final = 1
_LEADS: Final = 2
_GONE: Final = 3


class QueueFull(Exception):
    """More is waiting than may wait."""


class WaitedTooLong(Exception):
    """The deadline came first. ``taken``: a leader had it already, so it may yet be stored."""

    def __init__(self, *, taken: bool) -> None:
        self.taken = taken
        super().__init__("the deadline came before the commit")


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may be in one batch, and what may wait for one."""

    rows: int = 64
    bytes: int = 2 * 1024 * 1024
    waiting: int = 1024
    waiting_bytes: int = 32 * 1024 * 1024
    alone: int | None = None
    """From this size on an item is written alone."""


class _Ticket(Generic[T, R]):
    __slots__ = ("deadline", "gate", "item", "result", "size", "state")

    def __init__(self, item: T, size: int, deadline: float) -> None:
        self.item = item
        self.size = size
        self.deadline = deadline
        self.state = _QUEUED
        self.result: R | BaseException | None = None
        # A bare lock is the cheapest thing that a thread can wait on with a timeout.
        self.gate = threading.Lock()
        self.gate.acquire()


class GroupCommit(Generic[T, R]):
    """Runs ``write`` for batches of what callers submit.

    ``write(items, seconds)`` returns one result for each item, in order, each of them a value or an exception; it takes
    at most ``seconds``. What it raises is raised to everyone in the batch.
    """

    def __init__(
        self,
        write: Callable[[Sequence[T], float], Sequence[R | BaseException]],
        *,
        leaders: int = 1,
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._leaders = leaders
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._lock = threading.Lock()
        self._queue: deque[_Ticket[T, R]] = deque()
        self._waiting = 0
        self._waiting_bytes = 0
        self._leading = 0

    @property
    def waiting(self) -> int:
        """How many wait for a commit to come."""
        return self._waiting

    @property
    def idle(self) -> bool:
        """Whether nobody writes and nobody waits."""
        return self._leading == 0

    def submit(self, item: T, size: int, seconds: float) -> R:
        """Return the item's result when its batch is written, within ``seconds``.

        Raises QueueFull at once, WaitedTooLong in time, and what the item's result is or ``write`` raised.
        """
        ticket: _Ticket[T, R] = _Ticket(item, size, self._clock() + seconds)
        if self._enter(ticket) or self._wait(ticket):
            self._lead(ticket)
        if isinstance(ticket.result, BaseException):
            raise ticket.result
        return cast("R", ticket.result)

    def _enter(self, ticket: _Ticket[T, R]) -> bool:
        """Whether the caller leads."""
        with self._lock:
            if self._leading < self._leaders:
                self._leading += 1
                return True
            full = self._waiting >= self._bounds.waiting
            if full or (self._waiting and self._waiting_bytes + ticket.size > self._bounds.waiting_bytes):
                raise QueueFull
            self._queue.append(ticket)
            self._waiting += 1
            self._waiting_bytes += ticket.size
            return False

    def _wait(self, ticket: _Ticket[T, R]) -> bool:
        """Wait for the result. Whether the caller leads after all."""
        if not ticket.gate.acquire(timeout=max(0.0, ticket.deadline - self._clock())):
            with self._lock:
                if ticket.state == _QUEUED:
                    ticket.state = _GONE
                    self._leave(ticket)
                    raise WaitedTooLong(taken=False)
                if ticket.state == _TAKEN and ticket.result is None:
                    raise WaitedTooLong(taken=True)
        return ticket.state == _LEADS

    def _leave(self, ticket: _Ticket[T, R]) -> None:
        self._waiting -= 1
        self._waiting_bytes -= ticket.size

    def _lead(self, own: _Ticket[T, R]) -> None:
        batch = [own, *self._take(own.size)]
        try:
            results = self._write([ticket.item for ticket in batch], max(0.0, own.deadline - self._clock()))
            for ticket, result in zip(batch, results, strict=True):
                ticket.result = result
        except BaseException as error:
            for ticket in batch:
                ticket.result = error
        finally:
            self._hand_over()
            for ticket in batch[1:]:
                ticket.gate.release()

    def _take(self, size: int) -> list[_Ticket[T, R]]:
        taken: list[_Ticket[T, R]] = []
        if self._is_alone(size):
            return taken
        passed: list[_Ticket[T, R]] = []
        with self._lock:
            while self._queue and len(taken) + 1 < self._bounds.rows:
                ticket = self._queue[0]
                if ticket.state != _GONE:
                    if self._is_alone(ticket.size):
                        passed.append(self._queue.popleft())
                        continue
                    if size + ticket.size > self._bounds.bytes:
                        break
                    ticket.state = _TAKEN
                    size += ticket.size
                    self._leave(ticket)
                    taken.append(ticket)
                self._queue.popleft()
            self._queue.extendleft(reversed(passed))
        return taken

    def _is_alone(self, size: int) -> bool:
        return self._bounds.alone is not None and size >= self._bounds.alone

    def _hand_over(self) -> None:
        """Let the first in the queue lead, before anyone's answer is written."""
        with self._lock:
            while self._queue:
                ticket = self._queue.popleft()
                if ticket.state == _GONE:
                    continue
                self._leave(ticket)
                ticket.state = _LEADS
                ticket.gate.release()
                return
            self._leading -= 1
