"""Answers as bytes, and the one JSON shape of errors for what never reaches the application."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from webhook_api.errors import HTTP_STATUS, RETRY_AFTER
from webhook_api.server.request import Fault

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_TAKEN: Final = (
    b"HTTP/1.1 200 OK\r\nServer: gunicorn\r\nDate: %b\r\nConnection: %b\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nX-Request-Id: %b\r\n\r\n%b"
)
_KEEP: Final = (b"close", b"keep-alive")


class _Date:
    """The Date header, made once a second."""

    second = 0
    text = b""


def date() -> bytes:
    """The current time as HTTP writes it."""
    now = int(time.time())
    if now != _Date.second:
        _Date.second, _Date.text = now, formatdate(now, usegmt=True).encode()
    return _Date.text


def answer(
    status: str, headers: Iterable[tuple[str, str]], body: bytes, *, keep_alive: bool, head: bool = False
) -> bytes:
    """Put an answer together. ``status`` is code and phrase; ``head``: the request wants no body."""
    lines = [f"HTTP/1.1 {status}", "Server: gunicorn", f"Date: {date().decode()}"]
    lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (b"" if head else body)


def taken(request_id: bytes, body: bytes, *, keep_alive: bool) -> bytes:
    """200 with a JSON body: the answer to a delivery, quickly."""
    return _TAKEN % (date(), _KEEP[keep_alive], len(body), request_id, body)


def refused(reason: str, message: str, request_id: str, *, keep_alive: bool) -> bytes:
    """An error in the one shape."""
    status = HTTP_STATUS[reason]
    body = (json.dumps({"error": reason, "message": message, "request_id": request_id}) + "\n").encode()
    headers = [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("X-Request-Id", request_id),
    ]
    if status == 503:
        headers.append(("Retry-After", str(RETRY_AFTER)))
    return answer(f"{status} {_REASONS[status]}", headers, body, keep_alive=keep_alive)


def of_fault(fault: Fault, request_id: str | None = None) -> bytes:
    """The answer to what could not be read. The connection ends with it."""
    return refused(fault.reason, fault.message, request_id or uuid.uuid4().hex, keep_alive=False)
