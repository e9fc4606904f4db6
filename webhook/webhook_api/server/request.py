"""Requests as they come in, read piece by piece with llhttp (httptools) and bounded in every direction.

The reader never touches a socket: it is fed bytes and says what they amounted to.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

MAX_TARGET: Final = 4094
"""Bytes of a request's target."""
MAX_FIELDS: Final = 60
MAX_FIELD: Final = 8190
"""Bytes of one header's name and value."""
MAX_HEAD: Final = 65_536
"""Bytes of all headers together."""
CHUNK_LINE: Final = 64
"""Bytes of a chunk's header that are looked at."""
_CHUNK: Final = re.compile(rb"\n0*([0-9A-Fa-f]{1,16})(?:;[^\n]*)?\r\n\Z")
_TARGET: Final = re.compile(rb"[\x21-\x7e]+")
_SINGLE: Final = frozenset({"host", "content-type", "content-length", "transfer-encoding"})
"""Headers whose second occurrence makes a message ambiguous."""


@dataclass(slots=True)
class Fault:
    """Why a request cannot be read. The connection ends with the answer. ``reason`` stands in errors.HTTP_STATUS."""

    reason: str
    message: str
    request_id: str | None = None
    """As the sender or nginx named the request, when that much was read."""


class Headers:
    """Headers by name in any case; what came twice is joined by a comma."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values
        """By lower-case name."""

    def get(self, name: str, /) -> str | None:
        """The header's value, or None."""
        return self.values.get(name.lower())


@dataclass(slots=True)
class Request:
    """One request, complete unless ``refused``."""

    method: str
    target: str
    version: str
    headers: Headers
    body: bytes
    keep_alive: bool
    refused: bool = False
    """It will be refused whatever its body says, so the body was not read; the connection cannot be used again."""


Gate = Callable[[str, str, Headers], int | Fault | None]
"""Asked when the headers stand: method, target, headers. Returns how large the body may be; ``None``: whatever it says,
the request is refused, so it need not be read; a Fault: it is not even a request that the application should see."""


class Reader:
    """Reads the requests of one connection."""

    __slots__ = (
        "_body", "_chunk", "_fields", "_gate", "_head_bytes", "_headers", "_limit", "_parser", "_size", "_tail", "_target",
        "body_started", "expects_continue", "fault", "ready", "started", "turned_away",
    )  # fmt: skip

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._parser = HttpRequestParser(self)
        self.ready: deque[Request] = deque()
        """Complete requests, in order."""
        self.fault: Fault | None = None
        """Nothing more can be read."""
        self.turned_away = False
        """The last request of ``ready`` is refused without its body: nothing more is read."""
        self.started: float | None = None
        """When the first byte of the request that is being read came (monotonic); ``None``: between requests."""
        self.body_started = False
        self.expects_continue = False
        """The sender waits for ``100 Continue`` before it sends the body."""
        self._begin()

    def _begin(self) -> None:
        self._target = b""
        self._headers: dict[str, str] = {}
        self._fields = 0
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._size = 0
        self._limit = 0
        self._chunk: int | None = None
        self._tail = b""
        self.body_started = False

    @property
    def buffered(self) -> int:
        """Bytes of a body that is not complete."""
        return self._size

    def refuse(self, fault: Fault) -> None:
        """Read nothing more, and let go what is here: it must not take the room of others while its sender is told."""
        if self.fault is None and not self.turned_away:
            self.fault = fault
            self._body.clear()
            self._size = 0

    def feed(self, data: bytes) -> None:
        """Read on. Afterwards look at ``ready``, ``fault`` and ``expects_continue``."""
        if self.started is None:
            self.started = time.monotonic()
        if not self.body_started:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._set_fault("bad_request", "the request asks for another protocol")
        except (HttpParserCallbackError, HttpParserError) as error:
            # A callback that failed is a defect of ours; what it was stands in its context.
            defect = isinstance(error, HttpParserCallbackError)
            self._set_fault(
                "internal" if defect else "bad_request",
                "an unexpected fault" if defect else f"the request is not valid HTTP/1.1: {str(error)[:100]}",
            )
        if self.body_started and "transfer-encoding" in self._headers:
            self._look_at_chunk(data)
        if not self.body_started and self.started is not None and self._head_bytes > MAX_HEAD:
            self._set_fault("headers_too_large", f"the headers are larger than {MAX_HEAD} bytes")

    def _look_at_chunk(self, data: bytes) -> None:
        """Refuse a chunk for what it announces. The parser says only that one begins, and gives its bytes.

        So the header's line is what stands before those of its bytes that ``data`` ends with.
        """
        seen = self._tail + data
        if self._chunk is None:
            self._tail = seen[-CHUNK_LINE:]
            return
        line = seen[max(0, len(seen) - self._chunk - CHUNK_LINE) : len(seen) - self._chunk]
        found = _CHUNK.search(line)
        if found and self._size - self._chunk + int(found[1], 16) > self._limit:
            self._set_fault("too_large", f"the body is larger than {self._limit} bytes")
        self._chunk, self._tail = None, b""

    def _set_fault(self, reason: str, message: str) -> None:
        self.refuse(Fault(reason, message, self._headers.get("x-request-id")))

    # What the parser calls. Nothing is raised in here: the parser would wrap it.

    def on_message_begin(self) -> None:
        """A request begins."""
        if self.started is None:
            self.started = time.monotonic()

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._target += url
        if len(self._target) > MAX_TARGET:
            self._set_fault("uri_too_long", f"the request's target is longer than {MAX_TARGET} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole header, or a trailer, which is read and forgotten: it cannot say anything about the request."""
        if self.body_started:
            return
        self._fields += 1
        if self._fields > MAX_FIELDS or len(name) + len(value) > MAX_FIELD:
            self._set_fault(
                "headers_too_large", f"more than {MAX_FIELDS} headers, or one larger than {MAX_FIELD} bytes"
            )
            return
        if b"_" in name:
            # In a WSGI environment X_Y and X-Y are one name, so the one could stand in for the other.
            return
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip(" \t")
        known = self._headers.get(key)
        if known is None:
            self._headers[key] = text
        elif key in _SINGLE:
            self._set_fault("bad_request", f"the header {key} came more than once")
        else:
            self._headers[key] = f"{known},{text}"

    def on_headers_complete(self) -> None:
        """Decide what happens with the body."""
        self.body_started = True
        if self.fault is not None:
            return
        if not _TARGET.fullmatch(self._target):
            self._set_fault("bad_request", "the request's target is not printable ASCII")
            return
        if self._parser.should_upgrade():
            self._set_fault("bad_request", "no other protocol than HTTP/1.1 is spoken here: send no Upgrade")
            return
        if self._parser.get_http_version() not in {"1.0", "1.1"}:
            self._set_fault("bad_request", "the only versions of HTTP that are spoken here are 1.0 and 1.1")
            return
        coding = self._headers.get("transfer-encoding")
        if coding is not None and coding.lower() != "chunked":
            self._set_fault("transfer_coding", "the only transfer coding that is taken is chunked")
            return
        expected = self._headers.get("expect")
        if expected is not None and expected.lower() != "100-continue":
            self._set_fault("expectation", "the only expectation that is met is 100-continue")
            return
        allowed = self._gate(self._method(), self._target.decode("latin-1"), Headers(self._headers))
        if allowed is None:
            self._turn_away()
            return
        if isinstance(allowed, Fault):
            self._set_fault(allowed.reason, allowed.message)
            return
        self._limit = allowed
        self.expects_continue = expected is not None and self._parser.get_http_version() == "1.1"

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self.fault is not None or self.turned_away:
            return
        self._size += len(piece)
        if self._chunk is not None:
            self._chunk += len(piece)
        if self._size > self._limit:
            self._set_fault("too_large", f"the body is larger than {self._limit} bytes")
            return
        self._body.append(piece)

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        self._chunk = 0

    def on_chunk_complete(self) -> None:
        """A chunk is here in whole: its bytes were counted, whatever it had announced."""
        self._chunk = None

    def on_message_complete(self) -> None:
        """A request is complete."""
        self.expects_continue = False
        if self.fault is None and not self.turned_away:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self.ready.append(self._request(body, keep_alive=bool(self._parser.should_keep_alive())))
        self._begin()
        self.started = None

    def _turn_away(self) -> None:
        request = self._request(b"", keep_alive=False)
        request.refused = True
        self.ready.append(request)
        self.turned_away = True

    def _request(self, body: bytes, *, keep_alive: bool) -> Request:
        return Request(
            self._method(),
            self._target.decode("latin-1"),
            self._parser.get_http_version(),
            Headers(self._headers),
            body,
            keep_alive,
        )

    def _method(self) -> str:
        return self._parser.get_method().decode("latin-1")
