"""Which of fal's customers may deliver: those that are configured, or the first one that proves itself.

fal's keys are the same for all of its customers, and its dashboard does not show an account's id. So the id is either
configured (pinned), or learned: the first fresh delivery with a valid signature names it. A learned account is kept in
a file that the instances share, so all of them learn the same one and none forgets it at a restart. Once an account is
learned, others are kept aside: should the wrong one have come first, nothing of the right one is lost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from webhook_api.auth.errors import AuthError

LOG: Final = logging.getLogger(__name__)
ASIDE_BYTES: Final = 64 * 1024 * 1024
"""What may be kept of other accounts while one is learned, a process: a full budget, refilled within an hour."""
ASIDE_SECONDS: Final = 3600.0
ASIDE_ROW: Final = 4096
"""What a row costs beyond its body: many small deliveries fill a disk as well."""
_FILE_MAX: Final = 4096
_ACCOUNT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:|@+-]{0,199}")


@dataclass(frozen=True, slots=True)
class Learned:
    """The account that was learned."""

    account_id: str
    learned_at: float
    """Unix seconds."""


class LearnedFile:
    """One small file that is written once. Whoever comes first wins; everybody else reads what stands there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Learned | None:
        """Return what was learned; ``None``: nothing yet. Raises OSError or ValueError when it cannot be told."""
        try:
            with self._path.open("rb") as stream:
                raw = stream.read(_FILE_MAX)
        except FileNotFoundError:
            return None
        try:
            entry = json.loads(raw)
        except RecursionError:
            raise ValueError("nested too deep") from None
        account = entry["account_id"] if isinstance(entry, dict) and "account_id" in entry else None
        if not isinstance(account, str) or not _ACCOUNT.fullmatch(account):
            raise ValueError("no account id stands in the file")
        learned_at = entry.get("learned_at")
        return Learned(account, float(learned_at) if isinstance(learned_at, int | float) else 0.0)

    def claim(self, learned: Learned) -> Learned:
        """Write it unless something stands there already; return what stands there. Raises OSError, ValueError."""
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                json.dump({"account_id": learned.account_id, "learned_at": learned.learned_at}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            # A link is made whole or not at all, and never over another one.
            with contextlib.suppress(FileExistsError):
                os.link(name, self._path)
        finally:
            os.unlink(name)
        return self.read() or learned


class Budget:
    """So many bytes in so many seconds, refilled steadily. Thread-safe."""

    def __init__(self, size: float, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._rate = size / seconds
        self._clock = clock
        self._left = size
        self._at = clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> bool:
        """Whether so much was left; then it is taken."""
        with self._lock:
            now = self._clock()
            self._left = min(self._size, self._left + (now - self._at) * self._rate)
            self._at = now
            if amount > self._left:
                return False
            self._left -= amount
            return True


class Accounts:
    """Decides about the account of a delivery whose signature is valid."""

    def __init__(
        self,
        pinned: frozenset[str],
        file: LearnedFile | None = None,
        *,
        clock: Callable[[], float] = time.time,
        budget: Budget | None = None,
    ) -> None:
        self._pinned = pinned
        self._file = file
        self._clock = clock
        self._budget = budget or Budget(ASIDE_BYTES, ASIDE_SECONDS)
        self._learned: Learned | None = None
        self._fault: str | None = None
        self._unwritten = False
        """What was learned stands in memory only: that the file is not there does not mean that it was removed."""
        self._lock = threading.Lock()

    def admit(self, account: str, size: int, *, fresh: bool) -> str | None:
        """Return ``None`` for the account that may deliver, ``account`` for one that is only kept aside.

        Raises AuthError(account_not_allowed) for one that is not pinned, or when too much is kept aside already.
        """
        if self._pinned:
            if account not in self._pinned:
                raise AuthError("account_not_allowed", "this fal account may not deliver here")
            return None
        learned = self.learned()
        if learned is None and fresh:
            learned = self._learn(account)
        if learned is not None and learned.account_id == account:
            return None
        if not self._budget.take(size + ASIDE_ROW):
            raise AuthError("account_not_allowed", "this is not the fal account that was learned here")
        return "account" if learned is not None else None

    def learned(self) -> Learned | None:
        """Return the learned account. The file decides where there is one and it can be read."""
        if self._file is None:
            return self._learned
        try:
            found = self._file.read()
        except (OSError, ValueError) as error:
            self._report_fault(error)
            return self._learned
        if found is None and self._unwritten:
            return self._learned
        self._fault = None
        self._unwritten = False
        if found != self._learned:
            self._take_over(found)
        return found

    def status(self) -> dict[str, Any]:
        """Return mode, accounts, and whether a restart forgets them, for operators."""
        if self._pinned:
            return {"mode": "pinned", "accounts": sorted(self._pinned)}
        learned = self.learned()
        shown: dict[str, Any] = {
            "mode": "learning",
            "learned": learned.account_id if learned else None,
            "learned_at": learned.learned_at if learned else None,
            "persisted": self._file is not None and self._fault is None,
        }
        return shown if self._fault is None else shown | {"error": self._fault}

    def _learn(self, account: str) -> Learned:
        with self._lock:
            known = self.learned()
            if known is not None:
                return known
            learned = Learned(account, round(self._clock(), 3))
            if self._file is not None:
                try:
                    learned = self._file.claim(learned)
                except (OSError, ValueError) as error:
                    self._unwritten = True
                    self._report_fault(error)
            self._take_over(learned)
            return learned

    def _take_over(self, learned: Learned | None) -> None:
        before, self._learned = self._learned, learned
        if learned is not None and (before is None or before.account_id != learned.account_id):
            LOG.warning(
                "fal_account_learned",
                extra={
                    "account_id": learned.account_id,
                    "advice": "if it is yours, put it into FAL_ACCOUNT_IDS",
                },
            )

    def _report_fault(self, error: Exception) -> None:
        fault = "unreadable" if isinstance(error, OSError) else "malformed"
        if self._fault != fault:
            LOG.warning("fal_account_file", extra={"reason": fault, "detail": str(error)[:200]})
        self._fault = fault
