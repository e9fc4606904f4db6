"""A run that outlives its controller, and that ends in order when it is asked to.

What was begun is not left half done because a terminal was closed or a connection broke: the process leaves its session,
and ignores SIGHUP and SIGPIPE. SIGTERM and SIGINT ask it to stop: it does where it waits, or at the next step, by way of
the undo.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ansible.module_utils.rollout.model import RolloutError

ASKS = (signal.SIGTERM, signal.SIGINT)


def detach() -> None:
    """Go on when the controller, its connection or its terminal goes."""
    with suppress(PermissionError):  # already the leader of a group: nobody else's signals reach it
        os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


class StopRequest:
    """Whether somebody asked this process to end. Raises `RolloutError` (interrupted), and only where that is safe."""

    def __init__(self) -> None:
        self.name = ""
        self._waiting = False
        self._deaf = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT."""
        for number in ASKS:
            signal.signal(number, self._asked)

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if self._waiting:
            self.check()

    def check(self) -> None:
        """Raise when it was asked to end."""
        if self.name and not self._deaf:
            self._waiting = False
            raise RolloutError(
                "interrupted", f"it was asked to end ({self.name})", "Run it again when it may go on"
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """In here nothing is half done: a request ends the wait at once."""
        self.check()
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False
        self.check()

    def ignore(self) -> None:
        """From here on it goes to its end: the way back, or past the point of no return."""
        self._deaf = True
