"""What a run has done so far, noted at every step, and its one record in the end."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.deploy_lock import (
    DIRECTORY,
    DeployLock,
    LockError,
    iso,
    make_run_directory,
    new_run_id,
)
from ansible.module_utils.deploy_record import DeployRecords, RecordError
from ansible.module_utils.rollout.model import Release, RolloutError, Settings

GUARD = ".rollout"
PAUSE = 0.2
#: Seconds by which the deployment's lease is made longer at each step.
LEASE = 900.0


@contextmanager
def only_one(site_dir: Path, wait: float, sleep: Callable[[float], None] = time.sleep) -> Iterator[int]:
    """Be the only rollout on this host; the descriptor of the lock. `RolloutError` (locked) after `wait` seconds.

    The deployment's lock belongs to a run of ansible-playbook. When that is killed, its module may still be at work here;
    and when the module is killed, a command that it began and gave the descriptor to.
    """
    make_run_directory(site_dir / DIRECTORY)
    path = site_dir / DIRECTORY / GUARD
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + wait
        while not _taken(descriptor):
            if time.monotonic() >= deadline:
                who = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
                raise RolloutError(
                    "locked",
                    f"another rollout is at work on this host ({who}); waited {wait:g} s for it",
                    "It ends by itself: see run/deployment.json in the site's directory, and run again after it",
                )
            sleep(PAUSE)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} since {iso(datetime.now(UTC))}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def at_work(site_dir: Path) -> str:
    """Which rollout is at work on this host ("process N since TIME"); empty for none. Needs no lock, and holds up nobody."""
    try:
        descriptor = os.open(site_dir / DIRECTORY / GUARD, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
    finally:
        os.close(descriptor)
    return ""


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Journal:
    """Progress and record of one run on one host."""

    def __init__(
        self,
        settings: Settings,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._records = DeployRecords(settings.site_dir)
        self._lock = DeployLock(settings.site_dir)
        self._now, self._clock = now, clock
        self._begun = clock()
        self.id = settings.run or new_run_id()
        self._started = now()
        self.record: dict[str, Any] = {}
        self.inherited: list[str] = []
        self._open = False

    def check_lock(self) -> None:
        """`RolloutError` (locked) when this run no longer has the deployment's lock. Without a run there is none to have."""
        if not self._settings.run:
            return
        try:
            self._lock.check(self._settings.run)
        except LockError as error:
            raise RolloutError("locked", str(error)) from error

    def check_nobody_else(self) -> None:
        """`RolloutError` (locked) when the deployment's lock is another run's, be that alive or not."""
        holder = self._lock.read()
        if holder and holder.run != self.id:
            raise RolloutError("locked", f"the lock is another run's: {holder.described()}")

    def recover(self) -> dict[str, Any] | None:
        """Close the record of a run that was killed. Its record; what it had replaced is ours to undo as well."""
        closed: dict[str, Any] | None = self._records.close_interrupted(self.id)
        if closed:
            self.inherited = [str(name) for name in closed.get("changed") or []]
        return closed

    def begin(self, release: Release, current: str | None) -> None:
        """The run is in hand."""
        self._draft(release, current)
        self._records.begin(self.record)
        self._open = True

    def _draft(self, release: Release, current: str | None) -> None:
        settings = self._settings
        self.record = {
            "id": self.id,
            "host": settings.host,
            "kind": settings.kind,
            "started": iso(self._started),
            "who": settings.owner,
            "controller": settings.controller,
            "from": current,
            "to": release.id,
            "images": release.images,
            "reason": settings.reason or None,
            "failed_at": None,
            "changed": [],
            "steps": [],
            "version": settings.version,
        }

    def take_long(self, seconds: float) -> None:
        """The step at hand may take so long: the deployment's lock is to last for it."""
        if self._settings.run:
            with suppress(LockError):
                self._lock.renew(self._settings.run, LEASE + seconds)

    @contextmanager
    def step(self, name: str, service: str = "") -> Iterator[None]:
        """One step: noted when it begins, and with its seconds when it has ended, however that was."""
        entry: dict[str, Any] = {"step": name, "service": service or None, "seconds": None}
        begun = self._clock()
        if self._open:
            self.record["steps"].append(entry)
            self._note()
        try:
            yield
        finally:
            entry["seconds"] = round(self._clock() - begun, 2)

    def touching(self, service: str) -> None:
        """From now on that service may be another than before."""
        if service not in self.record["changed"]:
            self.record["changed"].append(service)
            self._note()

    @property
    def touched(self) -> list[str]:
        """Services that this run, or an interrupted one before it, has begun to change; in that order."""
        return list(dict.fromkeys([*self.inherited, *self.record.get("changed", [])]))

    def finish(self, result: str, reason: str = "", failed_at: str = "") -> dict[str, Any]:
        """Append the record."""
        self._close(result, reason, failed_at)
        self._records.finish(self.record)
        self._open = False
        return self.record

    def _close(self, result: str, reason: str = "", failed_at: str = "") -> None:
        ended = self._now()
        self.record |= {
            "ended": iso(ended),
            "seconds": round(self._clock() - self._begun, 1),
            "result": result,
            "reason": reason or self.record.get("reason"),
            "failed_at": failed_at or None,
        }

    def after_failure(self) -> bool:
        """Whether the newest record of this host is of a run that did not succeed."""
        return any(record["result"] not in ("done", "unchanged") for record in self._records.read(1))

    def troubled(self) -> bool:
        """Whether the run before on this host did not succeed, or did not end."""
        return self._records.in_hand() is not None or self.after_failure()

    def unchanged(self, release: Release) -> Mapping[str, Any]:
        """Record a run that had nothing to do."""
        self.begin(release, release.id)
        return self.finish("unchanged")

    def as_unchanged(self, release: Release) -> Mapping[str, Any]:
        """The record of such a run, which is not written: whether it stays one, the proof that follows says."""
        self._draft(release, release.id)
        self._close("unchanged")
        return self.record

    def _note(self) -> None:
        # A full disk or a lost lock stops nothing that has begun: half done would be worse.
        with suppress(RecordError):
            self._records.begin(self.record)
        if self._settings.run:
            with suppress(LockError):
                self._lock.renew(self._settings.run, LEASE)
