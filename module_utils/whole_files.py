"""Files that are replaced as a whole, and directories that one process at a time changes."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: How often a guard that somebody holds is tried again, in seconds. It is held for some milliseconds.
GUARD_PAUSE = 0.01


def read_file(path: Path) -> tuple[str, os.stat_result] | None:
    """A file's text and its status; None when it is not there. Never follows a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "r", encoding="utf-8", newline="") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a regular file")
        return stream.read(), status


def write_file(
    path: Path, text: str, *, mode: int, owner: int | None = None, group: int | None = None
) -> None:
    """Replace a file as a whole, durably: nobody sees half of it, and nobody but `owner` (default: us) sees it early."""
    descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            wanted = (os.geteuid() if owner is None else owner, os.getegid() if group is None else group)
            if wanted != (os.geteuid(), os.getegid()):
                os.fchown(stream.fileno(), *wanted)
            os.fchmod(stream.fileno(), mode)
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(path.parent)


def give_file(path: Path, *, mode: int, owner: int, group: int) -> None:
    """Give a file to another reader. It stays the same file for those who have it open or mounted."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, owner, group)
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> bool:
    """Remove a file durably. Whether there was one."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    sync_directory(path.parent)
    return True


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory last."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def guarded(path: Path, *, seconds: float = 60.0) -> Iterator[None]:
    """Be the only one who has the guard file `path`. It goes with the process; TimeoutError after `seconds`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} was held by another process for {seconds:g} s") from None
                time.sleep(GUARD_PAUSE)
        yield
    finally:
        os.close(descriptor)
