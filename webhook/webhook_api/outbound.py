"""Requests to servers of others that a delivery causes: one POST, bounded in time and bytes, without redirects.

The address comes from the settings, yet it is treated like one from outside: looked up once, refused where it is not
public unless `host:port` is listed exactly, and connected to as checked. No message of this module holds more of the
URL than scheme, host and port: a path may be a secret (Telegram's token is).

A server that hangs costs the worker little: only `slots` calls run at once, whoever finds none waits `SLOT_SECONDS`,
nobody waits while a call takes longer than `SLOW_SECONDS`, only `ADMITTED` deliveries wait for a call at all, and after
a failure a breaker refuses calls for a while. A server that asks to be left alone (`Retry-After`) is.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from webhook_api.states import Breaker, EffectError, Failure
from webhook_api.wire import Deadline, PinnedConnection, Resolver, host_header, is_public, resolve

MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer that are looked at."""
MAX_RETRY_AFTER: Final = 3600.0
"""Seconds for which a server may ask to be left alone."""
SLOT_SECONDS: Final = 1.0
SLOW_SECONDS: Final = 2.0
ADMITTED: Final = 32
"""Deliveries that leave a batch for a call of their own and have not made it. Others come again later."""
_ADMITTED_SECONDS: Final = 60.0
_CONNECT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is. `path` may be a secret, so it never stands in a `repr` or a message."""

    secure: bool
    host: str
    port: int
    path: str = field(repr=False)
    listed: bool
    """Whether `host:port` is listed: plain http and private addresses are allowed for it, and only for it."""

    def __str__(self) -> str:
        return f"http{'s' if self.secure else ''}://{host_header(self.host, self.port, secure=self.secure)}"


def read_place(url: str, listed: frozenset[str]) -> Place:
    """The place that a URL of the settings names. Raises ValueError, which says what is wrong with it."""
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError("it holds spaces or characters that no URL has")
    parts = urlsplit(url)
    host, port = (parts.hostname or "").lower(), parts.port
    if parts.scheme not in ("https", "http") or not host:
        raise ValueError("give an https address")
    if "@" in parts.netloc or "%" in parts.netloc or parts.fragment:
        raise ValueError("no login and no fragment may stand in it")
    secure = parts.scheme == "https"
    port = port or (443 if secure else 80)
    shown = f"[{host}]" if ":" in host else host
    is_listed = f"{shown}:{port}" in listed
    if not secure and not is_listed:
        raise ValueError(f"plain http needs {shown}:{port} in OUTBOUND_ALLOW_PRIVATE_HOSTS; use https")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(secure, host, port, path, is_listed)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said. `retry_after` in seconds, capped; None where it asked for nothing."""

    status: int
    body: bytes = field(repr=False)
    retry_after: float | None = None

    @property
    def good(self) -> bool:
        """Whether it is a 2xx."""
        return 200 <= self.status < 300


def read_retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` asks for (RFC 9110: a number or a date), within 0 and `MAX_RETRY_AFTER`."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), MAX_RETRY_AFTER)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)


class NotSent(EffectError):
    """The call was not made, or did not reach the server: nothing of it can have had an effect."""


class Outbound:
    """One server that is posted to. Shared by the worker's threads; every call has its own connection."""

    def __init__(
        self,
        name: str,
        place: Place,
        slots: threading.BoundedSemaphore,
        *,
        seconds: float = 10.0,
        resolver: Resolver = resolve,
        context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name` begins every reason (`forward_unreachable`); `seconds` bounds a whole exchange."""
        self.name = name
        self.place = place
        self._slots = slots
        self._seconds = seconds
        self._resolver = resolver
        self._context = (context or ssl.create_default_context()) if place.secure else None
        self._clock = clock
        self._breaker = Breaker(clock)
        self._quiet_until = 0.0
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._admitted: dict[int, float] = {}

    def admit(self, delivery_id: int) -> None:
        """Let a delivery go on to `post`, or raise `EffectError`: no call would be made now, or too many wait for one."""
        self.refuse_early()
        now = self._clock()
        with self._lock:
            for known, since in list(self._admitted.items()):
                if now - since > _ADMITTED_SECONDS:
                    del self._admitted[known]
            if delivery_id not in self._admitted and len(self._admitted) >= ADMITTED:
                raise self._not_sent("busy", f"too many deliveries wait for {self.place}")
            self._admitted[delivery_id] = now

    def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        stop: Callable[[], bool] = lambda: False,
        delivery_id: int | None = None,
    ) -> Answer:
        """POST `body`, and return the answer, whatever its status. `delivery_id`: which admission this uses up.

        Raises `EffectError`: `unreachable` without an answer (a day's patience), `interrupted` when `stop` says so.
        """
        if delivery_id is not None:
            with self._lock:
                self._admitted.pop(delivery_id, None)
        self.refuse_early()
        if not self._slots.acquire(timeout=SLOT_SECONDS):
            raise self._not_sent("busy", f"too many calls to {self.place} are still running")
        running = threading.get_ident()
        with self._lock:
            self._running[running] = self._clock()
        try:
            answer = self._exchange(path, body, headers, stop)
        except EffectError as error:
            if error.kind is not Failure.INTERRUPTED:
                self._breaker.failed()
            raise
        finally:
            with self._lock:
                del self._running[running]
            self._slots.release()
        self._note(answer)
        return answer

    def leave_alone(self, seconds: float) -> None:
        """Make no call for so long: the server asked for it."""
        self._quiet_until = max(self._quiet_until, self._clock() + min(seconds, MAX_RETRY_AFTER))

    def refuse_early(self) -> None:
        """Raise `EffectError` when no call would be made now."""
        quiet = self._quiet_until - self._clock()
        if quiet > 0:
            raise self._not_sent("asked_to_wait", f"{self.place} asked to be left alone", wait=quiet)
        if self._breaker.is_open():
            raise self._not_sent("unavailable", f"{self.place} failed a moment ago")
        with self._lock:
            slowest = self._clock() - min(self._running.values(), default=self._clock())
        if slowest > SLOW_SECONDS:
            raise self._not_sent("busy", f"{self.place} takes its time: {slowest:.0f} s by now")

    def _note(self, answer: Answer) -> None:
        if answer.status >= 500:
            self._breaker.failed()
        else:
            self._breaker.succeeded()
        if answer.status in (429, 503) and answer.retry_after:
            self.leave_alone(answer.retry_after)

    def _error(self, reason: str, message: str, kind: Failure = Failure.UNREACHABLE) -> EffectError:
        return EffectError(kind, f"{self.name}_{reason}", message)

    def _not_sent(self, reason: str, message: str, wait: float = 0.0) -> NotSent:
        return NotSent(Failure.UNREACHABLE, f"{self.name}_{reason}", message, wait=wait)

    def _address(self) -> str:
        try:
            addresses = self._resolver(self.place.host, self.place.port)
        except (OSError, UnicodeError) as error:
            raise self._not_sent("host_unknown", f"{self.place.host} has no address: {error}") from None
        if not addresses:
            raise self._not_sent("host_unknown", f"{self.place.host} has no address")
        if not self.place.listed and not all(is_public(address) for address in addresses):
            raise self._not_sent(
                "address_refused",
                f"{self.place.host} has an address that is not public; if that is meant, list "
                f"{self.place.host}:{self.place.port} in OUTBOUND_ALLOW_PRIVATE_HOSTS",
            )
        return addresses[0]

    def _exchange(
        self, path: str, body: bytes, headers: Mapping[str, str], stop: Callable[[], bool]
    ) -> Answer:
        connection = PinnedConnection(
            self.place.host,
            self.place.port,
            self._address(),
            self._context,
            connect_seconds=min(_CONNECT_SECONDS, self._seconds),
            read_seconds=self._seconds,
        )
        try:
            with Deadline(self._seconds, stop, connection) as deadline:
                try:
                    connection.connect()
                except (OSError, ValueError) as error:
                    failed = self._translated(error, deadline)
                    if failed.kind is Failure.INTERRUPTED:
                        raise failed from None
                    raise NotSent(failed.kind, failed.reason, str(failed)) from None
                try:
                    return self._talk(connection, path, body, headers)
                except (http.client.HTTPException, OSError, ValueError) as error:
                    raise self._translated(error, deadline) from None
        finally:
            connection.close()

    def _talk(
        self, connection: PinnedConnection, path: str, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        connection.putrequest("POST", path, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", host_header(self.place.host, self.place.port, secure=self.place.secure))
        connection.putheader("Content-Length", str(len(body)))
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("Connection", "close")
        for name, value in headers.items():
            connection.putheader(name, value)
        # It may answer before it has read everything (413, 401): what it says counts more than how it hung up.
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.endheaders(body)
        response = connection.response = connection.getresponse()
        return Answer(
            response.status,
            response.read(MAX_ANSWER),
            read_retry_after(response.headers.get("Retry-After"), time.time()),
        )

    def _translated(self, error: Exception, deadline: Deadline) -> EffectError:
        """What the network threw, without more of the URL than may be shown."""
        if deadline.stopped:
            return self._error("stopping", "interrupted because the worker stops", Failure.INTERRUPTED)
        if deadline.expired or isinstance(error, TimeoutError):
            return self._error("timeout", f"{self.place} did not answer within {self._seconds:g} s")
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._error("certificate", f"{self.place}: its certificate: {error.verify_message}")
        what = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return self._error("unreachable", f"{self.place}: {what}")
