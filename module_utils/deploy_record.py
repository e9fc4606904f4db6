"""What was deployed on a host, when and by whom: one JSON line a run, and the run in hand.

``deployments.jsonl`` in the site's directory holds the records, the oldest first; ``run/deployment.json`` is the record of
the run in hand, kept up to date by it. When a run dies, the next one finds it there and closes it as interrupted.

A record: id, host, kind (deploy, rollback, restore), started, ended, seconds, who, controller, from, to, images, result
(done, unchanged, failed, rolled_back, interrupted), reason, failed_at, changed, steps, version. Times are ISO 8601, UTC.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ansible.module_utils import docker_cli
from ansible.module_utils.deploy_lock import DIRECTORY, iso, make_run_directory, parse_time
from ansible.module_utils.whole_files import guarded, read_file, remove_file, sync_directory, write_file

RECORDS = "deployments.jsonl"
IN_HAND = "deployment.json"
GUARD = ".records"
KINDS = ("deploy", "rollback", "restore")
REASON = 2000
"""Characters of a reason that are kept: a build's last lines, and not its log."""
RESULTS = ("done", "unchanged", "failed", "rolled_back", "interrupted")
#: Lines that are kept; about 1.5 kB each.
KEEP = 5000
#: Records that are handed to the database first: all that are new, unless it was away for long.
FIRST_IMPORT = 100
#: Lines more than that before the oldest are cut off, so that not every run writes the whole file anew.
SLACK = 250


class RecordError(Exception):
    """A record cannot be written or read. `reason`: invalid, io, refused (by the database)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    """The records of a file's text, and how many lines are none (cut off by a crash, or changed by hand)."""
    records, damaged = [], 0
    for line in text.split("\n"):  # splitlines() would split inside what JSON leaves as it is (U+2028)
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            records.append(found)
        elif line.strip():
            damaged += 1
    return records, damaged


def as_line(record: Mapping[str, Any]) -> str:
    """A record as its line. RecordError `invalid` when it is none."""
    wrong = [name for name in ("id", "host", "started") if not isinstance(record.get(name), str)]
    wrong += [name for name, known in (("kind", KINDS), ("result", RESULTS)) if record.get(name) not in known]
    if wrong:
        raise RecordError("invalid", f"a record without a valid {', '.join(wrong)}: {dict(record)!r}")
    return json.dumps(record, sort_keys=True, ensure_ascii=False) + "\n"


class DeployRecords:
    """The records of the site whose directory is `site`."""

    def __init__(self, site: str | Path, keep: int = KEEP, slack: int = SLACK) -> None:
        self.path = Path(site) / RECORDS
        self.directory = Path(site) / DIRECTORY
        self._keep, self._slack = keep, slack

    # What was

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, durably, as one whole line; and cut off the oldest when there are too many."""
        line = as_line(record)
        with self._alone():
            self._append(line)

    def read(self, last: int | None = None) -> list[dict[str, Any]]:
        """The records, the oldest first; with `last`, only so many of the newest. Lines that are none are left out."""
        records, _ = parse_lines(self._text())
        return records if last is None else records[max(len(records) - last, 0) :]

    def lines(self, last: int | None = None) -> str:
        """The same as JSON lines, for `webhook-api deployments import`."""
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.read(last))

    def append_once(self, record: Mapping[str, Any]) -> bool:
        """Add a record unless its run has one on this host, or has begun one. Whether it was added."""
        noted = self.in_hand()
        if noted is not None and noted["id"] == record["id"]:
            return False
        if any(known["id"] == record["id"] for known in self.read()):
            return False
        self.append(record)
        return True

    # The run in hand

    def begin(self, record: Mapping[str, Any]) -> None:
        """Note the run in hand, or how far it has come."""
        with self._io():
            make_run_directory(self.directory)
            text = json.dumps(record, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
            write_file(self.directory / IN_HAND, text, mode=0o600)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Append the run's record, and have no run in hand any more."""
        line = as_line(record)
        with self._alone():
            self._append(line)
            remove_file(self.directory / IN_HAND)

    def in_hand(self) -> dict[str, Any] | None:
        """What the run in hand has noted; None when there is none. What cannot be read has an empty id."""
        with self._io():
            found = read_file(self.directory / IN_HAND)
        if found is None:
            return None
        try:
            noted = json.loads(found[0])
        except ValueError:
            noted = None
        if isinstance(noted, dict) and isinstance(noted.get("id"), str):
            return noted
        written = datetime.fromtimestamp(found[1].st_mtime, UTC)
        return {"id": "", "host": "", "kind": "deploy", "started": iso(written)}

    def interrupted(self, run: str) -> dict[str, Any] | None:
        """What a run before `run` has left in hand. Only who holds the lock may draw the conclusion that it is dead."""
        noted = self.in_hand()
        return None if noted is None or noted["id"] == run else noted

    def close_interrupted(self, run: str, now: datetime | None = None) -> dict[str, Any] | None:
        """Record what a run before `run` has left in hand as interrupted. Its record; None when there was none."""
        noted = self.interrupted(run)
        if noted is None:
            return None
        closed = closed_record(noted, now or datetime.now(UTC))
        with self._alone():
            known = {record["id"] for record in parse_lines(self._text())[0][-50:]}
            if closed["id"] and closed["id"] not in known:  # it may have died after its last line
                self._append(as_line(closed))
            remove_file(self.directory / IN_HAND)
        return closed

    # Inside

    def _append(self, line: str) -> None:
        created = not self.path.exists()
        descriptor = os.open(
            self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640
        )
        with os.fdopen(descriptor, "r+b", buffering=0) as stream:
            os.fchmod(stream.fileno(), 0o640)
            size = stream.seek(0, os.SEEK_END)
            # Half a line at the end is what a crash in the middle of a write has left: it stays a line of its own.
            torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
            try:
                _write_all(stream.fileno(), (b"\n" if torn else b"") + line.encode())
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), size)  # no half lines of a full disk
                raise
        if created:
            sync_directory(self.path.parent)
        self._cut()

    def _cut(self) -> None:
        lines = self._text().rstrip("\n").split("\n")
        if len(lines) > self._keep + self._slack:
            write_file(self.path, "\n".join(lines[-self._keep :]) + "\n", mode=0o640)

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._io():
            make_run_directory(self.directory)
            with guarded(self.directory / GUARD):
                yield

    @contextmanager
    def _io(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            message = f"deployment records cannot be kept: {error.strerror or error}{where}"
            raise RecordError(
                "io", f"{message}. Check free space and rights of the site's directory"
            ) from error


def bring_into_database(
    records: DeployRecords, container: str, timeout: float, run: docker_cli.Runner = docker_cli.run
) -> int:
    """Hand the records to a container of the service. How many the database had not; RecordError `refused`, DockerError."""
    imported = known = 0
    for last in (FIRST_IMPORT, None):
        command = [
            "docker",
            "exec",
            "--interactive",
            container,
            "webhook-api",
            "deployments",
            "import",
            "--json",
        ]
        done = run(command, stdin=records.lines(last), timeout=timeout)
        try:
            answer = json.loads(done.out)
            imported, known = imported + int(answer["new"]), int(answer["known"])
        except (ValueError, KeyError, TypeError):
            said = docker_cli.last_lines(done.err or done.out, 3)
            raise RecordError("refused", f"{container} says: {said or 'nothing'}") from None
        if known or imported < FIRST_IMPORT:
            break
    return imported


def _write_all(descriptor: int, data: bytes) -> None:
    """Append all of it: one write almost always."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def closed_record(noted: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """The record of a run that ended without closing its own."""
    at = noted.get("failed_at") or _last_step(noted.get("steps"))
    reason = "the run ended before it was done (killed, or the connection or the host was lost)"
    started = parse_time(noted.get("started"))
    seconds = round((now - started).total_seconds(), 1) if started else None
    closed = {
        "ended": iso(now),
        "seconds": seconds,
        "result": "interrupted",
        "reason": f"{reason}, last at: {at}" if at else reason,
    }
    known = {
        "host": str(noted.get("host") or ""),
        "started": noted["started"] if started else iso(now),
        "kind": noted.get("kind") if noted.get("kind") in KINDS else "deploy",
    }
    return {**noted, **known, **closed}


def stopped_record(run: Mapping[str, Any], current: str | None, now: datetime) -> dict[str, Any]:
    """The record of a run that ended on a host before anything was rolled out there: `current` went on serving.

    `run` has id, host, kind, started, who, controller, version, reason and failed_at (the task).
    """
    started = parse_time(run.get("started"))
    return {
        "id": str(run["id"]),
        "host": str(run["host"]),
        "kind": run.get("kind") if run.get("kind") in KINDS else "deploy",
        "started": run["started"] if started else iso(now),
        "ended": iso(now),
        "seconds": round((now - started).total_seconds(), 1) if started else None,
        "who": str(run.get("who") or ""),
        "controller": str(run.get("controller") or ""),
        "from": current,
        "to": None,
        "images": {},
        "changed": [],
        "steps": [],
        "version": str(run.get("version") or ""),
        "result": "failed",
        "reason": str(run.get("reason") or "see the log of the run")[:REASON],
        "failed_at": str(run.get("failed_at") or "") or None,
    }


def _last_step(steps: object) -> str:
    if not isinstance(steps, Sequence) or not steps or not isinstance(steps[-1], Mapping):
        return ""
    return " ".join(str(steps[-1][name]) for name in ("step", "service") if steps[-1].get(name))
