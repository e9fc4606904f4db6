"""Backups of a site on its host: one directory each, written part by part as streams, proven by checksums.

A backup is made in `.partial-ID` and gets its name by a rename when its list of checksums stands: what has a name is
whole. A part is the output of a command, a tar of files, the images of a registry, or a given text; none of it is held
in memory. The list, SHA256SUMS, is one that `sha256sum --check` reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

FORMAT = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
PARTIAL = ".partial-"
BLOCK = 1024 * 1024
PROGRESS_SECONDS = 1.0
ID = re.compile(r"^[a-z0-9][a-z0-9_.-]*-[0-9]{8}T[0-9]{6}Z$")
_SUM = re.compile(r"^([0-9a-f]{64})  ([A-Za-z0-9._-]+)$")


class SiteBackupError(Exception):
    """A backup cannot be made, read or restored.

    `reason`: no_space, no_backup, damaged, foreign, newer, command, io, busy. `str()` gives fault and remedy.
    """

    def __init__(self, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{message}. {remedy}" if remedy else message)
        self.reason = reason


def new_id(site: str, now: datetime) -> str:
    """The name of a backup that starts now; names sort by time."""
    return f"{site}-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}"


# -- streams -----------------------------------------------------------------------------------------------------------


class Meter:
    """A file that is written through: counts, digests, and tells how far it is in a progress file now and then."""

    def __init__(self, target: IO[bytes], part: str, progress: Path | None, expected: int = 0) -> None:
        self._target = target
        self._digest = hashlib.sha256()
        self._part = part
        self._progress = progress
        self._expected = expected
        self._started = self._told = time.monotonic()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Write, count, and tell."""
        self._target.write(data)
        self._digest.update(data)
        self.size += len(data)
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._told = now
            self._tell(now)
        return len(data)

    def _tell(self, now: float) -> None:
        if self._progress is None:
            return
        seconds = round(now - self._started, 1)
        text = json.dumps(
            {"part": self._part, "bytes": self.size, "expected": self._expected, "seconds": seconds}
        )
        with contextlib.suppress(OSError):  # a full disk stops the part itself
            self._progress.write_text(f"{text}\n")

    def flush(self) -> None:
        """Hand everything on."""
        self._target.flush()

    @property
    def sha256(self) -> str:
        """Digest of all that was written."""
        return self._digest.hexdigest()


def run_into(command: Sequence[str], sink: Any, timeout: float) -> str:
    """Stream a command's standard output into `sink`; returns the end of its standard error.

    The command and its children are killed when it takes longer than `timeout` seconds, or when writing fails.
    """
    with tempfile.TemporaryFile() as errors:
        process = _start(command, stdout=subprocess.PIPE, stderr=errors)
        with _watched(process, command, timeout):
            assert process.stdout is not None  # noqa: S101
            while block := process.stdout.read(BLOCK):
                sink.write(block)
            process.wait()
        return _ended(process, command, errors)


def run_from(command: Sequence[str], source: IO[bytes], timeout: float) -> str:
    """Stream `source` into a command's standard input; returns the end of what it printed."""
    with tempfile.TemporaryFile() as output:
        process = _start(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        with _watched(process, command, timeout):
            assert process.stdin is not None  # noqa: S101
            with contextlib.suppress(BrokenPipeError):  # its exit code and its words say why
                while block := source.read(BLOCK):
                    process.stdin.write(block)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        return _ended(process, command, output)


def _start(command: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(command), **{"stdin": subprocess.DEVNULL, **streams}, start_new_session=True
        )
    except OSError as error:
        raise SiteBackupError("command", f"`{command[0]}` cannot be started: {error.strerror}") from error


@contextlib.contextmanager
def _watched(process: subprocess.Popen[bytes], command: Sequence[str], timeout: float) -> Iterator[None]:
    """Kill the process group when the block fails, and when it takes too long."""
    import threading

    late = threading.Event()

    def kill() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(timeout, kill)
    timer.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
    if late.is_set():
        raise SiteBackupError(
            "command", f"`{_named(command)}` took longer than {timeout:.0f} s", "Raise the timeout"
        )


def _ended(process: subprocess.Popen[bytes], command: Sequence[str], output: IO[bytes]) -> str:
    output.seek(max(0, output.seek(0, os.SEEK_END) - 4000))
    said = output.read().decode("utf-8", "replace").strip()
    if process.returncode != 0:
        lines = " | ".join([line for line in said.splitlines() if line.strip()][-6:])
        raise SiteBackupError("command", f"`{_named(command)}` ended with {process.returncode}: {lines}")
    return said


def _named(command: Sequence[str]) -> str:
    """Its program and last arguments; of one that is a whole script, the beginning."""
    lines = [argument.strip().partition("\n")[0] for argument in (command[0], *command[1:][-4:])]
    return " ".join(line if len(line) <= 80 else f"{line[:80]}…" for line in lines)


# -- files -------------------------------------------------------------------------------------------------------------


def tar_files(base: Path, names: Sequence[str], sink: Any) -> int:
    """Write files, directories and links below `base` as a tar; a name that is not there is left out. Their number."""
    count = 0
    with tarfile.open(mode="w|", fileobj=sink, format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            for path in _walk(base / name):
                member = tar.gettarinfo(str(path), arcname=str(path.relative_to(base)))
                if member is None or not (member.isreg() or member.isdir() or member.issym()):
                    continue  # a socket or a device is nothing to keep
                # Every file by its content: what two names share is two files after a restore.
                if member.isreg():
                    with path.open("rb") as stream:
                        tar.addfile(member, stream)
                else:
                    tar.addfile(member)
                count += 1
    return count


def _walk(path: Path) -> Iterator[Path]:
    if not path.is_symlink() and not path.exists():
        return
    yield path
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            yield from _walk(inner)


def untar_files(source: IO[bytes], base: Path, tops: Sequence[str]) -> int:
    """Write a tar's files below `base` with their modes and owners; returns their number.

    Only below the names in `tops`; nothing that leads out of `base` is written, wherever it stands in the tar.
    """
    count = 0
    try:
        with tarfile.open(mode="r|", fileobj=source) as tar:
            for member in tar:
                _check_member(member, tops)
                _write_member(tar, member, base)
                count += 1
    except tarfile.TarError as error:
        raise SiteBackupError("damaged", f"the files of the backup cannot be read: {error}") from error
    return count


def _check_member(member: tarfile.TarInfo, tops: Sequence[str]) -> None:
    pure = PurePosixPath(member.name)
    outside = pure.is_absolute() or ".." in pure.parts or not pure.parts or pure.parts[0] not in tops
    if member.issym():
        target = PurePosixPath(member.linkname)
        outside = outside or target.is_absolute() or ".." in target.parts
    if outside or not (member.isreg() or member.isdir() or member.issym()):
        raise SiteBackupError("foreign", f"the backup holds {member.name!r}, which has no place in a site")


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, base: Path) -> None:
    path = base / member.name
    for parent in reversed(path.relative_to(base).parents):
        if (base / parent).is_symlink():
            raise SiteBackupError(
                "foreign", f"{base / parent} is a link; the backup's files go into directories"
            )
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, member.uid, member.gid)
        path.chmod(member.mode & 0o7777)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".restoring-{path.name}")
    making.unlink(missing_ok=True)
    if member.issym():
        making.symlink_to(member.linkname)
    else:
        body = tar.extractfile(member)
        descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as output:
            if body is not None:
                shutil.copyfileobj(body, output, BLOCK)
            os.fchown(output.fileno(), member.uid, member.gid)
            os.fchmod(output.fileno(), member.mode & 0o7777)
    os.replace(making, path)


# -- backups -----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One file of a backup."""

    name: str
    file: str
    bytes: int
    sha256: str
    seconds: float
    said: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "name": self.name,
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "seconds": self.seconds,
            **({"detail": self.detail} if self.detail else {}),
        }


class Backups:
    """All backups of a site in one directory of its host, which root alone may enter."""

    def __init__(
        self, root: Path, site: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.root = root
        self.site = site
        self._now = now

    def free_bytes(self) -> int:
        """Room for root at the place of the backups, or at the nearest directory above that exists."""
        place = self.root
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize

    def begin(self, identity: str, need: int) -> dict[str, Any]:
        """Make the directory of a new backup. Leftovers of runs that died are removed."""
        if not ID.match(identity):
            raise SiteBackupError("foreign", f"{identity!r} is no name of a backup")
        self._clear_leftovers()
        free = self.free_bytes()
        if need > free:
            raise SiteBackupError(
                "no_space",
                f"The backup may take {_mb(need)} MB, and {self.root} has {_mb(free)} MB free",
                "Make room, name another place (backup_dir), keep fewer (backup_keep), or leave out images "
                "(-e backup_images=false)",
            )
        if (self.root / identity).exists():
            raise SiteBackupError("busy", f"The backup {identity} is there already", "Run again in a second")
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        place = self._partial(identity)
        place.mkdir(mode=0o700)
        return {"id": identity, "path": str(place), "free": free, "need": need}

    def _clear_leftovers(self) -> None:
        if not self.root.is_dir():
            return
        for left in self.root.glob(f"{PARTIAL}*"):
            with contextlib.suppress(OSError):
                if not _in_use(left):
                    shutil.rmtree(left, ignore_errors=True)

    def _partial(self, identity: str) -> Path:
        return self.root / f"{PARTIAL}{identity}"

    def write(
        self,
        identity: str,
        name: str,
        file: str,
        produce: Callable[[Meter], Any],
        progress: Path | None = None,
        expected: int = 0,
    ) -> Part:
        """Write one part: `produce` gets a file to write to, and returns what it says of it."""
        place = self._partial(identity)
        if not place.is_dir():
            raise SiteBackupError("no_backup", f"The backup {identity} was not begun, or is complete")
        started = time.monotonic()
        path = place / file
        with _busy(place), _io(f"write {path}"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as output:
                meter = Meter(output, name, progress, expected)
                said = produce(meter)
                output.flush()
                os.fsync(output.fileno())
        part = Part(name, file, meter.size, meter.sha256, round(time.monotonic() - started, 1))
        if isinstance(said, str):
            part.said = said
        elif isinstance(said, Mapping):
            part.detail = dict(said)
        (place / f"{file}.part").write_text(json.dumps(part.document()))
        return part

    def finish(self, identity: str, metadata: Mapping[str, Any], keep: int) -> dict[str, Any]:
        """Write manifest and checksums, give the backup its name, and remove the oldest beyond `keep`."""
        place = self._partial(identity)
        with _io(f"finish {place}"):
            notes = sorted(place.glob("*.part"))
            parts = [json.loads(note.read_text()) for note in notes]
            document = {
                "format": FORMAT,
                "id": identity,
                "site": self.site,
                "ended": self._now().isoformat(timespec="seconds"),
                **metadata,
                "parts": sorted(parts, key=lambda part: str(part["name"])),
            }
            text = json.dumps(document, indent=2, sort_keys=True) + "\n"
            _write(place / MANIFEST, text)
            sums = {part["file"]: part["sha256"] for part in parts}
            sums[MANIFEST] = hashlib.sha256(text.encode()).hexdigest()
            _write(place / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
            for note in notes:
                note.unlink()
            final = self.root / identity
            os.rename(place, final)
            _sync(self.root)
        return {"path": str(final), "manifest": document, "removed": self._prune(keep)}

    def _prune(self, keep: int) -> list[str]:
        removed = []
        for old in self.names()[max(keep, 1) :]:
            # The list of checksums goes first: a half-removed backup is none.
            (self.root / old / SUMS).unlink(missing_ok=True)
            shutil.rmtree(self.root / old, ignore_errors=True)
            removed.append(old)
        return removed

    def names(self) -> list[str]:
        """The complete backups of this site, the newest first."""
        pattern = re.compile(rf"^{re.escape(self.site)}-[0-9]{{8}}T[0-9]{{6}}Z$")
        if not self.root.is_dir():
            return []
        found = [
            path.name
            for path in self.root.iterdir()
            if pattern.match(path.name) and (path / SUMS).is_file() and (path / MANIFEST).is_file()
        ]
        return sorted(found, reverse=True)

    def abandon(self, identity: str) -> None:
        """Remove what a failed run has written."""
        shutil.rmtree(self._partial(identity), ignore_errors=True)

    def find(self, wanted: str) -> Path:
        """The directory of a backup: by path, by name, or the newest of this site (`latest`)."""
        if wanted in ("", "latest"):
            names = self.names()
            if not names:
                raise SiteBackupError(
                    "no_backup",
                    f"There is no backup of {self.site} in {self.root}",
                    "Make one (make backup), or name one: -e restore_from=/path/to/backup",
                )
            return self.root / names[0]
        path = Path(wanted) if wanted.startswith("/") else self.root / wanted
        if not path.is_dir():
            known = ", ".join(self.names()) or "none"
            raise SiteBackupError("no_backup", f"There is no backup {path}", f"There are: {known}")
        return path


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a backup, checked against its checksum. Raises for one that is not whole or too new."""
    try:
        sums = {
            match.group(2): match.group(1)
            for line in (path / SUMS).read_text().splitlines()
            if (match := _SUM.match(line))
        }
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise SiteBackupError(
            "damaged",
            f"{path} is no complete backup: {error.strerror} ({error.filename})",
            "Take another one; a run that was cut off leaves none that has a name",
        ) from error
    if sums.get(MANIFEST) != hashlib.sha256(text).hexdigest():
        raise SiteBackupError(
            "damaged", f"The manifest of {path} is not what {SUMS} says", "Take another one"
        )
    document: dict[str, Any] = json.loads(text)
    if int(document.get("format", 0)) > FORMAT:
        raise SiteBackupError(
            "newer",
            f"{path} has format {document['format']}, this version reads up to {FORMAT}",
            "Restore it with the version of the project that made it, or a newer one",
        )
    return document


def verify(path: Path) -> dict[str, Any]:
    """Read a backup from end to end; its manifest. Raises with every part that is missing, cut off or changed."""
    document = read_manifest(path)
    faults = []
    for part in document["parts"]:
        file = path / part["file"]
        try:
            size = file.stat().st_size
        except OSError:
            faults.append(f"{part['file']} is missing")
            continue
        if size != part["bytes"]:
            faults.append(f"{part['file']} has {size} of {part['bytes']} bytes: it was cut off")
        elif file_digest(file) != part["sha256"]:
            faults.append(f"{part['file']} is not what was written: its checksum differs")
    if faults:
        raise SiteBackupError(
            "damaged",
            f"The backup {path} is damaged: {'; '.join(faults)}",
            "Nothing was touched. Take another one",
        )
    return document


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def collect(base: Path, names: Sequence[str]) -> bytes:
    """A tar of small files, in memory: what is to be encrypted before it touches a disk."""
    sink = io.BytesIO()
    tar_files(base, names, sink)
    return sink.getvalue()


@contextlib.contextmanager
def _busy(place: Path) -> Iterator[None]:
    """Mark a directory as in use by this process."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _in_use(place: Path) -> bool:
    # Between two parts nobody holds it: what was touched within the hour is left alone.
    if time.time() - place.stat().st_mtime < 3600:
        return True
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mb(size: int) -> str:
    return f"{size / 1_000_000:,.0f}"


@contextlib.contextmanager
def _io(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SiteBackupError(
            "io", f"Cannot {action}: {error.strerror or error}", "Look at the disk's room and rights"
        ) from error
