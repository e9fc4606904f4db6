"""The directory that instances keep on the host's disk: the spool, and the last good keys of fal.

Read before the database is dumped: a delivery that was answered 200 is then in a spool file of this part, or has been
drained into the database that is dumped afterwards. What is in both is stored once, as always (decision 0411).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final

from webhook_api.backup import BackupError, Tally, Writer, members
from webhook_api.inbox.spoolfile import BROKEN, SUFFIX

PART: Final = "state"
_SMALL: Final = 1024 * 1024
"""Bytes of the largest other file that is taken along."""
_COPY: Final = ".backup-"
_BLOCK: Final = 1024 * 1024


def _files(home: Path) -> Iterator[tuple[str, Path]]:
    for folder in (home, home / "spool"):
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(folder.iterdir()):
                name = str(path.relative_to(home))
                kept = path.name.endswith((SUFFIX, SUFFIX + BROKEN)) or path.suffix == ".json"
                if path.is_file() and not path.is_symlink() and kept:
                    yield name, path


def measure(home: Path) -> Tally:
    """Count the files and their bytes."""
    tally = Tally(PART)
    for _, path in _files(home):
        log = path.with_name(path.name + "-wal")
        tally.add(path.stat().st_size + (log.stat().st_size if log.exists() else 0))
    return tally


def export(home: Path, stream: IO[bytes]) -> Tally:
    """Write a consistent copy of each spool file, whoever writes to it meanwhile, and the small files beside."""
    for left in home.glob(f"{_COPY}*"):  # of an export that was killed
        left.unlink(missing_ok=True)
    writer = Writer(stream, PART)
    for name, path in _files(home):
        try:
            if name.endswith(SUFFIX):
                _export_spool(home, name, path, writer)
            elif name.endswith(SUFFIX + BROKEN) or path.stat().st_size <= _SMALL:
                with path.open("rb") as source:
                    writer.add(name, os.fstat(source.fileno()).st_size, source, {})
        except FileNotFoundError:  # drained and removed since it was listed
            writer.tally.skipped += 1
    return writer.end()


def _export_spool(home: Path, name: str, path: Path, writer: Writer) -> None:
    copy = home / f"{_COPY}{uuid.uuid4().hex}"
    try:
        source = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=30)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target, pages=256)
        with copy.open("rb") as stream:
            writer.add(name, os.fstat(stream.fileno()).st_size, stream, {})
    except sqlite3.OperationalError as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise BackupError("refused", f"the spool file {path.name} cannot be copied: {error}") from error
    finally:
        for left in home.glob(f"{copy.name}*"):
            left.unlink(missing_ok=True)


def restore(home: Path, stream: IO[bytes]) -> Tally:
    """Put the files back. Spool files are drained by the next instance; files that are there are left as they are."""
    tally = Tally(PART)
    for member in members(stream, PART):
        pure = PurePosixPath(member.name)
        if pure.is_absolute() or ".." in pure.parts or len(pure.parts) > 2:
            raise BackupError("foreign", f"{member.name!r} is no name of a file of the service")
        target = home / pure
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            tally.skipped += 1
            continue
        making = target.with_name(f"{_COPY}{uuid.uuid4().hex}")
        try:
            descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as output:
                while block := member.body.read(_BLOCK):
                    output.write(block)
                output.flush()
                os.fsync(output.fileno())
            os.replace(making, target)
        finally:
            making.unlink(missing_ok=True)
        tally.add(member.size)
    return tally
