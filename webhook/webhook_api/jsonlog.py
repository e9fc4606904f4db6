"""Logs as one JSON object a line, with the request's id, and without bodies or secrets.

``extra={...}`` of a log call becomes fields of the object. Names that could hold a secret or a body are written
as ``[withheld]`` whatever the caller passes, so a careless call cannot leak.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api.logpipe import handler_for

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the HTTP request (or of the delivery that a worker handles) which is being served."""

_EDGE_ID: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_WITHHELD: Final = ("secret", "password", "passwd", "authorization", "cookie", "api_key", "access_key", "body",
                    "payload", "private", "dsn", "conninfo", "database_url", "redis_url")  # fmt: skip
_MAX_TEXT: Final = 4000


def request_id_of(given: str | None) -> str:
    """Return the edge's id of a request, or one of our own in place of none or nonsense."""
    return given if given and _EDGE_ID.fullmatch(given) else os.urandom(16).hex()


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: ts (UTC, RFC 3339), level, logger, event, request_id, then extras."""

    def __init__(self, **static: str) -> None:
        super().__init__()
        self._static = static

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its newline."""
        entry: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _cut(record.getMessage()),
            **self._static,
        }
        request_id = REQUEST_ID.get()
        if request_id:
            entry["request_id"] = request_id
        for name, value in record.__dict__.items():
            if name not in _STANDARD:
                entry[name] = _field(name, value)
        if record.exc_info:
            entry["exception"] = _cut(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=True, default=_text)


def configure(level: str, **static: str) -> None:
    """Send all logs of the process to standard error as JSON. ``static`` fields stand in every line."""
    handler = handler_for(sys.stderr)
    handler.setFormatter(JsonFormatter(**static))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    # No line shows where in the code, in which thread or process it was written, so none need look for it (the logging
    # module's own documentation, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # urllib3 names every address that it calls, and an address may hold a signed query.
    for noisy in ("urllib3", "psycopg.pool", "werkzeug"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


@functools.lru_cache(maxsize=1024)
def _is_withheld(name: str) -> bool:
    # Names are the code's, so they are few; looking at each of them for every line took half of a line's time.
    lowered = name.lower()
    harmless = lowered.endswith(("_bytes", "_sha256", "_count"))
    return not harmless and any(word in lowered for word in _WITHHELD)


def _field(name: str, value: Any) -> Any:
    if _is_withheld(name):
        return "[withheld]"
    return _cut(value) if isinstance(value, str) else value


def _text(value: object) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes withheld]"
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"
