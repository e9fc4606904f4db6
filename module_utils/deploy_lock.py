"""The lock of a site on one host: one deployment at a time, and none that waits for a dead one.

The lock is the file ``run/deployment.lock`` (JSON) in the site's directory: which run has it, who started that, since
when, from which version, what for. It is replaced as a whole, and only under a flock of ``run/.guard``, which the kernel
takes back from a process that dies.

A run is dead, and its lock free, when the Ansible process that it belongs to is on this machine and has ended. Over SSH
there is no such process: then the lock ends with its lease, unless the run renews it. Leases are counted on the boot clock,
so that setting the host's time does not end one. The lock also names the run's process on its controller: another run from
there can see that it is gone, and break the lock (role lock).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils.run_process import ProcessTable, RunProcess
from ansible.module_utils.whole_files import guarded, read_file, remove_file, write_file

DIRECTORY = "run"
LOCK = "deployment.lock"
GUARD = ".guard"
RUN_ID = re.compile(r"^d-[0-9]{8}T[0-9]{6}-[0-9a-f]{6}$")
#: Seconds for which a lock file that nobody can read counts as held.
UNREADABLE_LEASE = 600
#: Seconds between two looks while waiting.
PAUSE = 0.25
_TEXTS = ("run", "owner", "purpose", "version", "since", "until", "boot")


class LockError(Exception):
    """The lock cannot be had, or is not ours.

    `reason`: locked (somebody else has it), lost (we had it, and no longer do), invalid (a bad argument), io.
    `holder`: who has it, if somebody does.
    """

    def __init__(self, reason: str, message: str, holder: Holder | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.holder = holder


@dataclass(frozen=True)
class Clock:
    """The host's times: of day (for people, and across boots), and since boot (for leases)."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    since_boot: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Holder:
    """Who has the lock. Times are ISO 8601, UTC."""

    run: str
    owner: str
    purpose: str
    version: str
    since: str
    #: End of the lease: as a time of day, and in seconds since the boot named.
    until: str
    until_boot: float
    boot: str
    process: RunProcess | None = None
    #: The run's process on its controller, which is another machine.
    controller: RunProcess | None = None
    #: False for a lock file that is no lock: half-written by a failing disk, or changed by hand.
    readable: bool = True

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """From the lock file's text; None when that is no lock."""
        try:
            found = json.loads(text)
        except ValueError:
            return None
        if not isinstance(found, dict) or any(not isinstance(found.get(name), str) for name in _TEXTS):
            return None
        ends = found.get("until_boot")
        if isinstance(ends, bool) or not isinstance(ends, int | float) or parse_time(found["until"]) is None:
            return None
        texts = {name: found[name] for name in _TEXTS}
        processes = {name: RunProcess.from_record(found.get(name)) for name in ("process", "controller")}
        return cls(**texts, until_boot=float(ends), **processes)

    def text(self) -> str:
        """The lock file's text."""
        fields = {name: getattr(self, name) for name in (*_TEXTS, "until_boot")}
        processes = {
            name: process.as_record() if process else None
            for name, process in (("process", self.process), ("controller", self.controller))
        }
        return json.dumps(fields | processes, indent=2, sort_keys=True) + "\n"

    def facts(self, *, dead: bool) -> dict[str, Any]:
        """What programs are told of it."""
        names = ("run", "owner", "purpose", "version", "since", "until", "readable")
        pid = self.process.pid if self.process else None
        controller = self.controller.as_record() if self.controller else None
        return {name: getattr(self, name) for name in names} | {
            "pid": pid,
            "dead": dead,
            "controller": controller,
        }

    def described(self) -> str:
        """Who, what and since when, in one phrase."""
        if not self.readable:
            return f"somebody whose lock file cannot be read, since {self.since}"
        version = f" of version {self.version}" if self.version else ""
        where = (
            f"process {self.process.pid} of this machine"
            if self.process
            else f"until {self.until} unless renewed"
        )
        return f"{self.owner} ({self.purpose}{version}, run {self.run}) since {self.since}, {where}"


@dataclass(frozen=True)
class Taken:
    """The lock as it was had: by whom, whether it was ours before, and which dead run's it was."""

    holder: Holder
    changed: bool
    dead: Holder | None = None


def new_run_id(now: datetime | None = None) -> str:
    """An id for a run: its time, and what makes it its own."""
    return f"d-{(now or datetime.now(UTC)):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def parse_time(text: object) -> datetime | None:
    """An ISO 8601 time with its zone; None when it is none."""
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo else None


def iso(moment: datetime) -> str:
    """ISO 8601, UTC, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


class DeployLock:
    """The lock of the site whose directory is `site`."""

    def __init__(
        self, site: str | Path, table: ProcessTable | None = None, clock: Clock | None = None
    ) -> None:
        self.directory = Path(site) / DIRECTORY
        self._table = table or ProcessTable()
        self._clock = clock or Clock()

    def facts(self, holder: Holder | None) -> dict[str, Any] | None:
        """A holder as modules return it."""
        return holder.facts(dead=self.is_dead(holder)) if holder else None

    # Asking

    def read(self) -> Holder | None:
        """Who has the lock, dead or alive; None when nobody does."""
        try:
            found = read_file(self.directory / LOCK)
        except UnicodeDecodeError:
            return self._unreadable((self.directory / LOCK).stat())
        except OSError as error:
            raise _io(error) from error
        if found is None:
            return None
        return Holder.parse(found[0]) or self._unreadable(found[1])

    def is_dead(self, holder: Holder) -> bool:
        """Whether a holder's run has ended without giving the lock back."""
        over: bool | None = self._table.is_over(holder.process) if holder.process else None
        if over is not None:
            return over
        if holder.boot == self._table.boot():
            return self._clock.since_boot() >= holder.until_boot
        until = parse_time(holder.until)
        return until is None or self._clock.now() >= until

    def check(self, run: str) -> Holder:
        """The lock, which must be `run`'s; LockError `lost` when it is somebody else's, or nobody's."""
        return self._ours(self.read(), run)

    # Changing

    def acquire(
        self,
        run: str,
        owner: str,
        purpose: str = "deploy",
        version: str = "",
        lease: float = 600,
        wait: float = 0,
        controller: RunProcess | None = None,
    ) -> Taken:
        """Take the lock, within `wait` seconds. LockError `locked` says who has it. Ours already: renewed."""
        if not RUN_ID.match(run):
            raise LockError("invalid", f"{run!r} is no id of a run (d-20261123T040000-1a2b3c)")
        process = self._table.ansible_run()
        deadline = self._clock.since_boot() + wait
        while True:
            wanted = Holder(run, owner, purpose, version, "", "", 0.0, "", process, controller)
            taken, holder = self._try(wanted, lease)
            if taken:
                return taken
            left = deadline - self._clock.since_boot()
            if left <= 0:
                raise self._locked(holder, wait)
            self._clock.sleep(min(PAUSE, left))

    def renew(self, run: str, lease: float = 600) -> Holder:
        """Give our lease its whole length again."""
        with self._alone():
            holder = self._leased(self._ours(self.read(), run), lease)
            self._write(holder)
        return holder

    def release(self, run: str) -> bool:
        """Give the lock back. False when it was not ours: then nothing is changed."""
        with self._alone():
            holder = self.read()
            return bool(holder and holder.run == run and remove_file(self.directory / LOCK))

    def break_(self, run: str = "") -> Holder | None:
        """Take the lock away from whoever has it; with `run`, only from that run. Who had it."""
        with self._alone():
            holder = self.read()
            if holder is None:
                return None
            if run and holder.run != run:
                raise LockError(
                    "lost", f"run {run} has no lock here: it is held by {holder.described()}", holder
                )
            remove_file(self.directory / LOCK)
        return holder

    # Inside

    def _try(self, wanted: Holder, lease: float) -> tuple[Taken | None, Holder | None]:
        with self._alone():
            found = self.read()
            if found and found.run == wanted.run:
                holder = self._leased(replace(found, process=wanted.process), lease)
                self._write(holder)
                return Taken(holder, changed=False), None
            if found and not self.is_dead(found):
                return None, found
            holder = self._leased(replace(wanted, since=iso(self._clock.now())), lease)
            self._write(holder)
            return Taken(holder, changed=True, dead=found), None

    def _leased(self, holder: Holder, lease: float) -> Holder:
        ends = datetime.fromtimestamp(self._clock.now().timestamp() + lease, UTC)
        return replace(
            holder, until=iso(ends), until_boot=self._clock.since_boot() + lease, boot=self._table.boot()
        )

    def _unreadable(self, status: os.stat_result) -> Holder:
        written = datetime.fromtimestamp(status.st_mtime, UTC)
        until = datetime.fromtimestamp(status.st_mtime + UNREADABLE_LEASE, UTC)
        return Holder("", "unknown", "unknown", "", iso(written), iso(until), 0.0, "", readable=False)

    def _ours(self, holder: Holder | None, run: str) -> Holder:
        if holder is None:
            message = f"the lock of run {run} is gone: somebody broke it. What this run has not done yet it must not do"
            raise LockError("lost", f"{message}. Start it again")
        if holder.run != run:
            raise LockError(
                "lost",
                f"run {run} no longer has the lock: it is held by {holder.described()}. Start it again",
                holder,
            )
        return holder

    def _locked(self, holder: Holder | None, wait: float) -> LockError:
        who = holder.described() if holder else "somebody"
        waited = f" Waited {wait:g} s for it." if wait else ""
        remedy = "Wait for it, give more time (-e lock_wait_seconds=…), or, when you know that it is dead:"
        named = f" -e lock_break={holder.run}" if holder and holder.run else " -e lock_break=any"
        return LockError(
            "locked",
            f"another deployment has the lock: {who}.{waited} {remedy} ansible-playbook playbooks/unlock.yml{named}",
            holder,
        )

    def _write(self, holder: Holder) -> None:
        write_file(self.directory / LOCK, holder.text(), mode=0o600)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            make_run_directory(self.directory)
            with guarded(self.directory / GUARD):
                yield
        except OSError as error:
            raise _io(error) from error


def make_run_directory(directory: Path) -> None:
    """The site's directory `run`, for root alone."""
    if not directory.is_dir():
        directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)


def _io(error: OSError) -> LockError:
    where = f" ({error.filename})" if error.filename else ""
    said = f"the lock cannot be used: {error.strerror or error}{where}"
    return LockError("io", f"{said}. Check free space and rights of the site's directory")
