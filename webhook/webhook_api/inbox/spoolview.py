"""Looking at spool files from outside their processes, without owning or changing them: for the command line."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from webhook_api.inbox.spoolfile import BROKEN, COLUMNS, SUFFIX, live_bytes, row_of

TABLES: Final = ("deliveries", "rejected")


@dataclass(frozen=True, slots=True)
class FileView:
    """One spool file, as it is now."""

    name: str
    owned: bool
    """A living process has it. Otherwise the next API process, or ``spool drain``, takes it."""
    broken: bool
    """It was put aside as damaged. ``spool export`` reads what can still be read."""
    rows: int | None
    arrivals: int | None
    rejected: int | None
    bytes: int
    """On the disk, its log included."""
    live_bytes: int | None
    oldest_at: datetime | None
    oldest_seconds: float | None
    error: str | None = None


def paths(directory: Path) -> list[Path]:
    """All spool files of a directory, those that were put aside too. Raises OSError."""
    return sorted(path for path in directory.iterdir() if path.name.endswith((SUFFIX, SUFFIX + BROKEN)))


def look(path: Path, now: float | None = None) -> FileView:
    """Look at one file."""
    broken = path.name.endswith(BROKEN)
    size = sum(file.stat().st_size for file in (path, path.with_name(path.name + "-wal")) if file.exists())
    found: dict[str, Any] = dict.fromkeys(("rows", "arrivals", "rejected", "live_bytes", "oldest"))
    error = None
    try:
        with contextlib.closing(_read_only(path)) as connection:
            rows, arrivals, oldest = connection.execute(
                "select count(*), coalesce(sum(arrivals), 0), min(received_at) from deliveries"
            ).fetchone()
            rejected = connection.execute("select count(*) from rejected").fetchone()[0]
            found = {
                "rows": rows, "arrivals": arrivals, "rejected": rejected, "oldest": oldest,
                "live_bytes": live_bytes(connection),
            }  # fmt: skip
    except sqlite3.Error as fault:
        error = f"{type(fault).__name__}: {fault}"[:200]
    oldest = found.pop("oldest")
    age = None if oldest is None else round(max(0.0, (time.time() if now is None else now) - oldest), 1)
    return FileView(
        name=path.name, owned=not broken and owned(path), broken=broken, bytes=size, error=error,
        oldest_at=None if oldest is None else datetime.fromtimestamp(oldest, UTC), oldest_seconds=age, **found,
    )  # fmt: skip


def owned(path: Path) -> bool:
    """Whether a living process owns the file."""
    try:
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def export(path: Path) -> Iterator[dict[str, Any]]:
    """Each row of a file as a document like the archive's, also those of a damaged file that can still be read."""
    with contextlib.closing(_read_only(path)) as connection:
        for table in TABLES:
            for seq in _numbers(connection, table):
                with contextlib.suppress(sqlite3.Error):
                    record = connection.execute(
                        f"select seq, {COLUMNS} from {table} where seq = ?",  # noqa: S608  (constants)
                        (seq,),
                    ).fetchone()
                    if record is not None:
                        yield _document(path, table, record)


def _numbers(connection: sqlite3.Connection, table: str) -> list[int]:
    """Sequence numbers of a table: from both ends, as far as each can be read."""
    found: set[int] = set()
    for order in ("", " desc"):
        with contextlib.suppress(sqlite3.Error):
            for (seq,) in connection.execute(f"select seq from {table} order by seq{order}"):  # noqa: S608
                found.add(seq)
    return sorted(found)


def _document(path: Path, table: str, record: tuple[Any, ...]) -> dict[str, Any]:
    row = row_of(record)
    about = {"file": path.name, "seq": record[0], "table": table, "whole": row is not None}
    if row is None:
        return about | {
            "request_id": str(record[2]), "source": str(record[1]),
            "body_base64": base64.b64encode(bytes(record[6] or b"")).decode(),
        }  # fmt: skip
    delivery = row.delivery
    return about | {
        "source": delivery.source, "request_id": delivery.request_id, "dedup_key": delivery.dedup_key,
        "status": delivery.status, "gateway_request_id": delivery.gateway_request_id,
        "training_type_hint": delivery.training_type_hint, "account_id": delivery.account_id,
        "edge_request_id": delivery.edge_request_id, "probe": delivery.probe, "aside": delivery.aside,
        "received_at": datetime.fromtimestamp(row.received_at, UTC).isoformat(), "arrivals": row.arrivals,
        "headers": dict(delivery.headers), "body_sha256": delivery.body_sha256,
        "body_base64": base64.b64encode(delivery.body).decode(),
    }  # fmt: skip


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=2.0, isolation_level=None)
