"""``webhook-api backup``: what the service keeps outside PostgreSQL, as streams that a backup stores and a restore reads.

Three parts, each one tar stream whose last member, ``end.json``, counts what came before it: a stream without it was
cut off. The database itself is PostgreSQL's own business (``pg_dump``). Nothing is held in memory but one block.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, Final

END: Final = "end.json"
PREFIX: Final = "AISHA."
"""Of our own fields in a member's pax header."""
_END_MAX: Final = 65536


class BackupError(Exception):
    """A stream cannot be written or read. ``reason``: truncated, foreign, incompatible, refused."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(slots=True)
class Tally:
    """What went through: members and their bytes."""

    part: str
    count: int = 0
    bytes: int = 0
    skipped: int = 0

    def add(self, size: int) -> None:
        """Count one member."""
        self.count += 1
        self.bytes += size

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Writer:
    """A part on its way out."""

    def __init__(self, stream: IO[bytes], part: str) -> None:
        self._tar = tarfile.open(mode="w|", fileobj=stream, format=tarfile.PAX_FORMAT, encoding="utf-8")  # noqa: SIM115
        self.tally = Tally(part)

    def add(self, name: str, size: int, source: IO[bytes] | Any, fields: Mapping[str, str]) -> None:
        """Write one member of ``size`` bytes, read from ``source``. Raises OSError when the source ends early."""
        member = tarfile.TarInfo(f"{self.tally.part}/{name}")
        member.size, member.mtime, member.mode = size, int(time.time()), 0o600
        member.pax_headers = {f"{PREFIX}{key}": value for key, value in fields.items()}
        self._tar.addfile(member, source)
        self.tally.add(size)

    def end(self) -> Tally:
        """Write the last member."""
        text = json.dumps(self.tally.document(), sort_keys=True).encode()
        member = tarfile.TarInfo(END)
        member.size, member.mtime, member.mode = len(text), int(time.time()), 0o600
        self._tar.addfile(member, io.BytesIO(text))
        self._tar.close()
        return self.tally


class Body:
    """The bytes of a member. Raises BackupError when the stream ends in the middle of them."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream = stream
        self._name = name

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes; empty at the end."""
        try:
            return self._stream.read(size)
        except tarfile.TarError as error:
            raise BackupError(
                "truncated", f"the stream was cut off in the middle of {self._name!r}"
            ) from error


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a part on its way in; ``body`` is read before the next one is asked for."""

    name: str
    size: int
    fields: Mapping[str, str]
    body: Body


def members(stream: IO[bytes], part: str) -> Iterator[Member]:
    """Read a part. Raises BackupError when it is another one or when it was cut off."""
    count = size = 0
    end: dict[str, Any] | None = None
    try:
        with tarfile.open(mode="r|", fileobj=stream, encoding="utf-8") as tar:
            for found in tar:
                body = tar.extractfile(found)
                if body is None or end is not None:
                    raise BackupError("foreign", f"{found.name!r} has no place in a backup's part")
                if found.name == END:
                    end = json.loads(body.read(_END_MAX))
                    continue
                if not found.name.startswith(f"{part}/"):
                    raise BackupError("foreign", f"this is no part {part}: it holds {found.name!r}")
                fields = {
                    key.removeprefix(PREFIX): value
                    for key, value in found.pax_headers.items()
                    if key.startswith(PREFIX)
                }
                count, size = count + 1, size + found.size
                yield Member(found.name.removeprefix(f"{part}/"), found.size, fields, Body(body, found.name))
    except (tarfile.TarError, ValueError) as error:
        raise BackupError("truncated", f"the part {part} is damaged or was cut off: {error}") from error
    if end is None or (end.get("count"), end.get("bytes")) != (count, size):
        raise BackupError("truncated", f"the part {part} was cut off after {count} members")
