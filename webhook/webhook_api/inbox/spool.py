"""The spool: where deliveries stand on the local disk while the database is away. Bounded, and never a hang.

Each process appends to a file of its own and adopts files whose owner is gone. All appending is done by one thread, so
that a disk that hangs holds no request longer than its deadline; those that come at the same time share one sync.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from webhook_api.db import DatabaseUnavailable
from webhook_api.inbox.allowance import LARGE_BYTES, extra
from webhook_api.inbox.group import Bounds, GroupCommit, QueueFull, WaitedTooLong
from webhook_api.inbox.model import Delivery, Stored
from webhook_api.inbox.spoolfile import SUFFIX, Entry, GivenUp, SpoolBroken, SpoolFile, SpoolFull
from webhook_api.metrics import SPOOL_BYTES, SPOOL_FAILURES, SPOOL_OLDEST, SPOOL_ROWS, SPOOLED

LOG: Final = logging.getLogger(__name__)
ROW_BYTES: Final = 4096
"""What a row weighs in the file beside its body, at most."""
RESERVE_BYTES: Final = 256 * 1024 * 1024
"""What is left free on the disk for everybody else."""
BOUNDS: Final = Bounds(
    rows=64, bytes=4 * 1024 * 1024, waiting=1024, waiting_bytes=64 * 1024 * 1024, alone=LARGE_BYTES
)
TYPICAL_BYTES: Final = 65536
"""With less room than this the spool counts as full."""
FAILURES: Final = 3
"""So many failed writes in a row, and a new file takes the place of ours."""
SILENCE: Final = 10.0
"""Seconds after which a spool that nobody could look at counts as unusable."""
LOOK_GRACE: Final = 5.0
"""Seconds that may have gone by since the last look when the keeper comes back from a long batch."""
STUCK: Final = 1.0
"""Seconds after which a write that has not come back is not waited for, beside what its bytes may take."""
_SLOTS: Final = 1 << 20
_MANY: Final = 255


class Present:
    """Which requests may stand in the spool, in 1 MiB however many they are.

    Counts by hash: "no" is certain, "yes" may be another request's, which then goes through the spool needlessly.
    """

    def __init__(self) -> None:
        self._slots = bytearray(_SLOTS)
        self._total = 0
        self._lock = threading.Lock()

    def __contains__(self, request_id: str) -> bool:
        return self._total > 0 and self._slots[hash(request_id) % _SLOTS] > 0

    def add(self, request_id: str) -> None:
        """Count one more row of the request."""
        slot = hash(request_id) % _SLOTS
        with self._lock:
            self._total += 1
            if self._slots[slot] < _MANY:
                self._slots[slot] += 1

    def remove(self, request_id: str) -> None:
        """Count one less. A slot that was full stays so until nothing is left at all."""
        slot = hash(request_id) % _SLOTS
        with self._lock:
            self._total = max(0, self._total - 1)
            if self._total == 0:
                self._slots = bytearray(_SLOTS)
            elif 0 < self._slots[slot] < _MANY:
                self._slots[slot] -= 1

    def clear(self) -> None:
        """Count from nothing."""
        with self._lock:
            if self._total:
                self._total, self._slots = 0, bytearray(_SLOTS)


class Cancelled(TimeoutError):
    """It took too long and was called off in time: it has no effect."""


class Job:
    """Something that a :class:`Hand` does. Either whoever waits calls it off, or its effect becomes final: not both."""

    def __init__(self, call: Callable[[Callable[[], bool]], Any], patience: float) -> None:
        self.call = call
        self.patience = patience
        self.answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.called_off = False
        self._final = False
        self._lock = threading.Lock()

    def settle(self) -> bool:
        """Whether the effect may become final. From then on nobody can call it off."""
        with self._lock:
            self._final = not self.called_off
            return self._final

    def call_off(self) -> bool:
        """Whether it is certain now that it has no effect."""
        with self._lock:
            self.called_off = not self._final
            return self.called_off


class Hand:
    """A thread that does what may hang, so that the caller need not."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._stuck_at: float | None = None
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def do(
        self, call: Callable[[Callable[[], bool]], Any], seconds: float, patience: float | None = None
    ) -> Any:
        """Return what ``call`` returns or raises.

        ``call`` gets what it has to ask before its effect is final. Raises TimeoutError when it takes longer than
        ``seconds``: Cancelled when it has no effect. Who comes later than ``patience`` after its begin does not wait.
        """
        stuck_at = self._stuck_at
        if stuck_at is not None and time.monotonic() > stuck_at:
            raise Cancelled
        job = Job(call, STUCK if patience is None else patience)
        self._work.put(job)
        try:
            result = job.answer.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise (Cancelled if job.call_off() else TimeoutError) from None
        if isinstance(result, BaseException):
            raise result
        return result

    def _loop(self) -> None:
        while True:
            job = self._work.get()
            if job.called_off:
                del job
                continue
            self._stuck_at = time.monotonic() + job.patience
            try:
                result: Any = job.call(job.settle)
            except BaseException as error:
                result = error
            self._stuck_at = None
            job.answer.put(result)
            # Neither the call nor its answer, with the bodies in them, has to stay until the next one.
            del job, result


@dataclass(frozen=True, slots=True)
class SpoolState:
    """What is in the spool of this process, and whether it can take more."""

    ok: bool
    rows: int
    bytes: int
    """Of the whole directory: all processes share the bound."""
    oldest_seconds: float | None
    files: int
    rejected: int
    error: str | None = None

    def shown(self) -> dict[str, Any]:
        """As /health shows it."""
        document: dict[str, Any] = {
            "ok": self.ok,
            "rows": self.rows,
            "bytes": self.bytes,
            "oldest_seconds": self.oldest_seconds,
            "rejected": self.rejected,
        }
        return document if self.error is None else document | {"error": self.error}


class Spool:
    """The spool of one process. ``start`` it after the fork."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        reserve_bytes: int = RESERVE_BYTES,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._wall = wall
        self._own: SpoolFile | None = None
        self._orphans: list[SpoolFile] = []
        self._present = Present()
        self._used = 0
        self._error: str | None = "not_started"
        self._hand: Hand | None = None
        self._opening = threading.Lock()
        self._failures = 0
        self._looked_at = time.monotonic()
        self._not_looking = 0.0
        self._group: GroupCommit[Entry, int] = GroupCommit(self._write, bounds=BOUNDS)
        self._state = SpoolState(False, 0, 0, None, 0, 0, "not_started")

    # What requests use

    def holds(self, request_id: str) -> bool:
        """Whether deliveries of this request (may) stand here, so that the next one has to queue behind them."""
        return request_id in self._present

    def put(self, delivery: Delivery, received_at: float, *, unsure: bool, seconds: float) -> Stored:
        """Return when the delivery is on the disk. Raises DatabaseUnavailable, within ``seconds``."""
        entry = Entry(delivery, received_at, unsure)
        self._present.add(delivery.request_id)
        try:
            arrivals: int | BaseException = self._group.submit(entry, _size(entry), seconds)
        except Exception as error:
            arrivals = error
        outcome = self._settle(entry, arrivals)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def put_many(self, entries: Sequence[Entry], seconds: float) -> list[Stored | DatabaseUnavailable | None]:
        """Put entries on the disk with one sync. What could not be is refused; ``None``: for a reason of its own."""
        for entry in entries:
            self._present.add(entry.delivery.request_id)
        try:
            results = self._write(entries, seconds)
        except Exception as error:
            results = [error] * len(entries)
        settled = [self._settle(entry, result) for entry, result in zip(entries, results, strict=True)]
        return [outcome if isinstance(outcome, Stored | DatabaseUnavailable) else None for outcome in settled]

    def _settle(self, entry: Entry, arrivals: int | BaseException) -> Stored | BaseException:
        """What became of an entry, counted."""
        if isinstance(arrivals, int):
            if arrivals > 1:
                self._present.remove(entry.delivery.request_id)
            SPOOLED.inc()
            return Stored(None, arrivals == 1, arrivals, variant=False, spooled=True)
        # What may yet get onto the disk stays counted.
        late = isinstance(arrivals, TimeoutError) and not isinstance(arrivals, Cancelled)
        if not late and not getattr(arrivals, "taken", False):
            self._present.remove(entry.delivery.request_id)
        if isinstance(arrivals, QueueFull | WaitedTooLong | SpoolFull | SpoolBroken | OSError):
            return self._refusal(arrivals)
        return arrivals

    @property
    def available(self) -> bool:
        """Whether it can take a delivery now, as far as is known."""
        return self._error is None and time.monotonic() - self._looked_at < SILENCE + self._not_looking

    @property
    def rows(self) -> int:
        """How many rows stand in this process's files."""
        own = self._own
        return sum(file.rows for file in self._orphans) + (own.rows if own else 0)

    def state(self) -> SpoolState:
        """What it held when it was last looked at, at most about a second ago. Touches no disk."""
        if self._error is None and not self.available:
            return replace(self._state, ok=False, error="no_answer")
        return self._state

    # What the keeper's thread uses

    def start(self) -> None:
        """Adopt the files without an owner, and open one of this process's own."""
        self._hand = Hand("spool-writer")
        self.adopt()
        self.refresh()

    def stop(self) -> None:
        """Give all files up. What is in them waits for the next process."""
        files, self._own, self._error = self.files(), None, "stopped"
        self._orphans = []
        for file in files:
            file.close()

    def files(self) -> list[SpoolFile]:
        """The files of this process, in the order in which they are to be drained."""
        own = self._own
        return [*self._orphans, *([own] if own else [])]

    @contextlib.contextmanager
    def not_looking(self, seconds: float) -> Iterator[None]:
        """Nobody looks at the disk meanwhile, for so long at most: that is no sign of a fault."""
        self._not_looking = seconds
        try:
            yield
        finally:
            self._looked_at = max(self._looked_at, time.monotonic() - LOOK_GRACE)
            self._not_looking = 0.0

    def adopt(self) -> int:
        """Take over files whose owner is gone. Returns how many."""
        mine = {file.path for file in self.files()}
        adopted = 0
        for path in self._paths():
            if path in mine:
                continue
            try:
                file = SpoolFile.adopt(path)
            except SpoolBroken as error:
                self._alarm("corrupt" if error.corrupt else "disk", f"{path.name}: {error}")
                continue
            except OSError as error:
                self._alarm("disk", f"{path.name}: {error}")
                continue
            if file is not None:
                adopted += self._take_over(file)
        return adopted

    def _take_over(self, file: SpoolFile) -> int:
        if file.rows == 0:
            self._done_with(file)
            return 0
        for request_id in file.request_ids():
            self._present.add(request_id)
        self._orphans.append(file)
        LOG.warning("spool_adopted", extra={"file": file.path.name, "rows": file.rows})
        return 1

    def forget_all(self) -> None:
        """Begin to count afresh when nothing is here and nothing is coming."""
        if self.rows == 0 and self._group.idle:
            self._present.clear()

    def drained(self, file: SpoolFile, request_ids: Sequence[str]) -> None:
        """Forget requests whose rows have left the file, and a file that is empty and not our own."""
        for request_id in request_ids:
            self._present.remove(request_id)
        if file.rows == 0:
            if file in self._orphans:
                self._orphans.remove(file)
                self._done_with(file)
            else:
                file.shrink()

    def _done_with(self, file: SpoolFile) -> None:
        """Remove a file that is drained; one with rows that cannot be stored is put aside for a person."""
        if file.rejected():
            self._alarm(
                "rejected", f"{file.path.name} holds rows that cannot be stored: spool export shows them"
            )
            file.put_aside(unless_rows=True)
        else:
            file.close()

    def detach(self, file: SpoolFile) -> None:
        """Write to another file from now on, if this one is ours."""
        with self._opening:
            if file is self._own:
                self._own = None
                self._orphans.append(file)

    def give_up(self, file: SpoolFile, error: SpoolBroken) -> None:
        """Put a file aside that cannot be used any more, with an alarm. A new one takes its place."""
        self._alarm("corrupt" if error.corrupt else "disk", f"{file.path.name}: {error}")
        self.detach(file)
        if file in self._orphans:
            self._orphans.remove(file)
        if error.corrupt:
            file.put_aside()
        else:
            file.close(remove_empty=False)

    def refresh(self) -> None:
        """Look at the disk: open a file of our own when there is none, measure, and say what was found."""
        error = None
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._ready()
            self._used = self._measure()
            error = self._lack(TYPICAL_BYTES)
        except (SpoolBroken, OSError) as fault:
            error = "broken"
            self._alarm("disk", str(fault))
        self._error = error
        self._state = self._look(error)
        self._looked_at = time.monotonic()
        SPOOL_ROWS.set(self._state.rows)
        SPOOL_BYTES.set(self._state.bytes)
        SPOOL_OLDEST.set(self._state.oldest_seconds or 0.0)

    def _look(self, error: str | None) -> SpoolState:
        files = self.files()
        oldest, rejected = [], 0
        for file in files:
            with contextlib.suppress(SpoolBroken):
                rejected += file.rejected()
                if file.rows:
                    oldest.append(file.oldest())
        ages = [self._wall() - moment for moment in oldest if moment is not None]
        age = round(max(0.0, max(ages)), 1) if ages else None
        return SpoolState(error is None, self.rows, self._used, age, len(files), rejected, error)

    # The bound

    def _lack(self, more: int) -> str | None:
        """Why ``more`` bytes cannot be taken, in one word."""
        if self._used + more > self._max_bytes:
            return "full"
        disk = os.statvfs(self._directory)
        return "disk_full" if disk.f_bavail * disk.f_frsize - more < self._reserve_bytes else None

    def _measure(self) -> int:
        own, total = self._own, 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    # Our own file counts by what is in it, and its log (16 MiB at most) not at all.
                    if own is None or not entry.name.startswith(own.path.name):
                        total += entry.stat(follow_symlinks=False).st_size
        return total + (own.live_bytes() if own else 0)

    def _paths(self) -> list[Path]:
        try:
            found = [path for path in self._directory.iterdir() if path.suffix == SUFFIX]
            return sorted(found, key=lambda path: path.stat().st_mtime)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._alarm("disk", str(error))
            return []

    # Writing

    def _write(self, entries: Sequence[Entry], seconds: float) -> Sequence[int | BaseException]:
        """Write a batch, for :class:`GroupCommit`."""
        if self._hand is None:
            raise SpoolBroken("not started", corrupt=False)
        patience = STUCK + extra(sum(_size(entry) for entry in entries))
        result: Sequence[int | BaseException] = self._hand.do(
            lambda settle: self._append(entries, settle), seconds, patience
        )
        return result

    def _append(self, entries: Sequence[Entry], settle: Callable[[], bool]) -> Sequence[int | BaseException]:
        results: list[int | BaseException] = [SpoolFull() for _ in entries]
        fit, more = [], 0
        for position, entry in enumerate(entries):
            size = _size(entry)
            if self._lack(more + size) is None:
                more += size
                fit.append(position)
        if fit:
            counts = self._append_to_own([entries[position] for position in fit], settle)
            self._used += more
            for position, count in zip(fit, counts, strict=True):
                results[position] = count
        return results

    def _append_to_own(
        self, entries: Sequence[Entry], settle: Callable[[], bool]
    ) -> Sequence[int | BaseException]:
        """Append to our file, or to a new one when ours proves to be unusable."""
        own = self._ready()
        try:
            counts: Sequence[int | BaseException] = own.append(entries, settle)
        except SpoolBroken as error:
            self._failures += 1
            if not error.lost and self._failures < FAILURES:
                raise
            self._replace(own, error)
            counts = self._ready().append(entries, settle)
        except ValueError:
            # One of them cannot be written as it is: the others shall not suffer for it.
            return [self._single(own, entry, settle) for entry in entries]
        self._failures = 0
        return counts

    def _ready(self) -> SpoolFile:
        """Our own file, made when there is none."""
        with self._opening:
            if self._own is None:
                self._own = SpoolFile.create(self._directory)
            return self._own

    def _single(self, own: SpoolFile, entry: Entry, settle: Callable[[], bool]) -> int | BaseException:
        try:
            return own.append([entry], settle)[0]
        except (ValueError, SpoolBroken, GivenUp) as error:
            return error

    def _replace(self, own: SpoolFile, error: SpoolBroken) -> None:
        """Stop writing to a file that failed. What it holds is drained as far as it can be read."""
        self._alarm("corrupt" if error.corrupt else "disk", f"{own.path.name}: {error}")
        self.detach(own)

    def _refusal(self, error: Exception) -> DatabaseUnavailable:
        if isinstance(error, SpoolFull):
            reason, text = "spool_full", "the spool is full"
        elif isinstance(error, QueueFull | WaitedTooLong):
            reason, text = "busy", "too many deliveries wait for the spool"
        else:
            late = isinstance(error, TimeoutError)
            reason = "spool_failed"
            text = "the spool was not written in time" if late else "the spool cannot be written"
        SPOOL_FAILURES.labels(reason=reason).inc()
        return DatabaseUnavailable(reason, text)

    def _alarm(self, reason: str, detail: str) -> None:
        SPOOL_FAILURES.labels(reason=reason).inc()
        LOG.error("spool_failed", extra={"reason": reason, "detail": detail[:300]})


def _size(entry: Entry) -> int:
    return len(entry.delivery.body) + ROW_BYTES
