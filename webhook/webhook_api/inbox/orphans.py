"""Draining files that no process owns, on request and in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from webhook_api.db import Connection
from webhook_api.inbox.batch import prepare
from webhook_api.inbox.drain import BATCH_BYTES, BATCH_ROWS, drain, forget
from webhook_api.inbox.spoolfile import SUFFIX, SpoolBroken, SpoolFile

_TRIES: Final = 3
"""How often rows that somebody holds are asked for."""


def drain_orphans(connection: Connection, directory: Path) -> dict[str, Any]:
    """Drain every file that no living process owns.

    Returns how many files and rows, and how many are rejected, left or broken. Raises psycopg.Error and OSError; what
    was not drained then still stands in its file.
    """
    prepare(connection)
    result = {"files": 0, "drained": 0, "rejected": 0, "left": 0, "broken": 0}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            file = SpoolFile.adopt(path)
            if file is not None:
                _drain(connection, file, result)
        except SpoolBroken:
            result["broken"] += 1
    return result


def _drain(connection: Connection, file: SpoolFile, result: dict[str, int]) -> None:
    result["files"] += 1
    fruitless = 0
    try:
        while file.rows and fruitless < _TRIES:
            rows = file.head(BATCH_ROWS, BATCH_BYTES)
            if not rows:
                file.recount()
                fruitless += 1
                continue
            done = drain(connection, file, rows)
            result["drained"] += len(done.taken) + done.repeated
            fruitless = 0 if done.taken or done.repeated or done.rejected else fruitless + 1
        result["left"] += file.rows
        result["rejected"] += file.rejected()
    finally:
        if file.close():
            forget(connection, file.id)
