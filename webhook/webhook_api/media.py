"""Downloads of media that a delivery names, from exactly the hosts that are allowed.

The URLs come out of a body, so they are hostile until shown otherwise (server-side request forgery): only https to
hosts on an exact list, no redirects, every resolved address must be public, and the connection goes to the very
address that was checked (no second look-up), with the host's name kept for TLS and `Host`. Bytes and time are capped,
and a body that ends early is an error, never a short file. Plain http is for tests, for named `host:port` only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from webhook_api.states import Failure
from webhook_api.wire import Deadline, PinnedConnection, Resolver, host_header, is_public, resolve

_READ: Final = 64 * 1024
_CONTROL: Final = re.compile(r"[\x00-\x20\x7f\\]")
#: What could lead out of a prefix, as the server may read it.
_WAY_OUT: Final = re.compile(r"//|%2e|%2f|%5c|/\.\.?(?:/|$)", re.ASCII | re.IGNORECASE)
_DATA_URI: Final = re.compile(
    r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+\"-]+)*)(;base64)?,", re.ASCII | re.IGNORECASE
)
_USER_AGENT: Final = "aisha-webhook-archiver"


class MediaError(Exception):
    """A media file could not be read. `reason` is machine-readable, `kind` says whether another try can help."""

    def __init__(self, kind: Failure, reason: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class MediaPolicy:
    """What may be downloaded. Sizes in bytes, times in seconds."""

    https_hosts: frozenset[str]
    """Hosts, or `host/prefix/` where only what lies below the prefix is allowed (a bucket on a host of many)."""
    http_hosts: frozenset[str] = frozenset()
    """`host:port` that may be asked over plain http, at any address. For tests."""
    max_bytes: int = 2 * 1024**3
    max_seconds: float = 900.0
    connect_seconds: float = 10.0
    read_seconds: float = 30.0


@dataclass(frozen=True)
class Target:
    """A URL that the policy allows."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def host_header(self) -> str:
        """Value of `Host`: the port only where it is not the scheme's own."""
        return host_header(self.host, self.port, secure=self.secure)


def check_url(url: str, policy: MediaPolicy) -> Target:
    """The target that `url` names. Raises `MediaError` (permanent) for everything the policy doesn't allow."""
    if len(url) > 4096 or not url.isascii() or _CONTROL.search(url):
        raise MediaError(
            Failure.PERMANENT, "media_url_invalid", "the URL is too long or holds forbidden characters"
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise MediaError(Failure.PERMANENT, "media_url_invalid", "the URL cannot be read") from None
    if not host or "@" in parts.netloc or "%" in parts.netloc:
        raise MediaError(Failure.PERMANENT, "media_url_invalid", "the URL names no plain host")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if parts.scheme == "https":
        if port not in (None, 443) or not _host_allowed(host, parts.path, policy.https_hosts):
            raise MediaError(
                Failure.PERMANENT,
                "media_host_refused",
                f"{parts.netloc} (or its path) is not in ARCHIVE_ALLOWED_HOSTS; add it there if these files are wanted",
            )
        return Target(True, host, 443, path)
    if parts.scheme == "http":
        shown = f"[{host}]" if ":" in host else host
        if f"{shown}:{port or 80}" in policy.http_hosts:
            return Target(False, host, port or 80, path)
        raise MediaError(
            Failure.PERMANENT, "media_scheme_refused", f"plain http to {parts.netloc} is not allowed"
        )
    raise MediaError(
        Failure.PERMANENT, "media_scheme_refused", f"URLs of scheme {parts.scheme[:20]!r} are not read"
    )


def _host_allowed(host: str, path: str, allowed: frozenset[str]) -> bool:
    if host in allowed:
        return True
    for entry in allowed:
        name, slash, rest = entry.partition("/")
        if slash and name == host and path.startswith(f"/{rest}"):
            return not _WAY_OUT.search(path)
    return False


def choose_address(target: Target, resolver: Resolver) -> str:
    """The one address to connect to. A host with any address that isn't public is refused as a whole."""
    try:
        addresses = resolver(target.host, target.port)
    except (OSError, UnicodeError) as error:
        raise MediaError(
            Failure.UNREACHABLE, "media_host_unknown", f"{target.host} has no address: {error}"
        ) from None
    if not addresses:
        raise MediaError(Failure.UNREACHABLE, "media_host_unknown", f"{target.host} has no address")
    if target.secure and not all(is_public(address) for address in addresses):
        raise MediaError(
            Failure.THEIRS,
            "media_address_refused",
            f"{target.host} resolves to an address that is not public",
        )
    return addresses[0]


class Readable(Protocol):
    """What an upload reads from."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; empty at the end."""


@dataclass
class Meter:
    """Counts and hashes what passes, and stops it at the cap."""

    max_bytes: int
    size: int = 0
    _sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, data: bytes) -> None:
        """Account for `data`. Raises `MediaError` when the cap is passed."""
        self.size += len(data)
        if self.size > self.max_bytes:
            raise MediaError(
                Failure.PERMANENT, "media_too_large", f"the file is larger than {self.max_bytes} bytes"
            )
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        """Lower-case hex digest of all that passed."""
        return self._sha256.hexdigest()


class MediaStream:
    """An open file: `read` until empty, then `size` and `sha256` describe what was read, checked for length."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        meter: Meter,
        length: int | None,
        content_type: str,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._read = read
        self._meter = meter
        self._buffer = bytearray()
        self._ended = False
        self._on_end = on_end
        self.length = length
        self.content_type = content_type

    @property
    def size(self) -> int:
        """Bytes read so far."""
        return self._meter.size

    @property
    def sha256(self) -> str:
        """Digest of the bytes read so far."""
        return self._meter.sha256

    def read(self, size: int = -1, /) -> bytes:
        """Exactly `size` bytes, fewer only at the end. Raises `MediaError` where the end comes too early."""
        if size < 0:
            raise ValueError("a media stream is read in bounded pieces")
        while len(self._buffer) < size and not self._ended:
            piece = self._read(min(_READ, size - len(self._buffer)))
            if piece:
                self._meter.add(piece)
                self._buffer += piece
            else:
                self._finish()
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _finish(self) -> None:
        self._on_end()
        if self.length is not None and self._meter.size != self.length:
            raise MediaError(
                Failure.THEIRS,
                "media_length_differs",
                f"{self._meter.size} of {self.length} announced bytes arrived",
            )
        self._ended = True


class MediaClient:
    """Opens media URLs under a policy. Safe to share between threads: every download has its own connection."""

    def __init__(
        self, policy: MediaPolicy, resolver: Resolver = resolve, context: ssl.SSLContext | None = None
    ) -> None:
        self.policy = policy
        self._resolver = resolver
        self._context = context or ssl.create_default_context()

    @contextmanager
    def open(
        self, url: str, declared_size: int | None = None, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[MediaStream]:
        """Open `url` (https, allowed http, or data:) for reading.

        `declared_size` is the delivery's own claim; it is only needed where the server announces no length.
        `stop` is polled, and ends the download when true. Raises `MediaError`.
        """
        if url[:5].lower() == "data:":
            yield self._decode(url)
            return
        target = check_url(url, self.policy)
        connection = PinnedConnection(
            target.host,
            target.port,
            choose_address(target, self._resolver),
            self._context if target.secure else None,
            connect_seconds=self.policy.connect_seconds,
            read_seconds=self.policy.read_seconds,
        )
        try:
            with Deadline(self.policy.max_seconds, stop, connection) as deadline:
                with _translated(target, deadline):
                    stream = self._stream(_request(connection, target), declared_size, target, deadline)
                # Outside `_translated`: what the reader's own side throws is not the media host's fault.
                yield stream
        finally:
            connection.close()

    def _decode(self, uri: str) -> MediaStream:
        data, content_type = decode_data_uri(uri)
        view = memoryview(data)
        position = 0

        def read(size: int) -> bytes:
            nonlocal position
            piece = bytes(view[position : position + size])
            position += len(piece)
            return piece

        return MediaStream(read, Meter(self.policy.max_bytes), len(data), content_type)

    def _stream(
        self, response: http.client.HTTPResponse, declared: int | None, target: Target, deadline: Deadline
    ) -> MediaStream:
        length = _announced_length(response, declared)
        if length is not None and length > self.policy.max_bytes:
            raise MediaError(
                Failure.PERMANENT,
                "media_too_large",
                f"{length} bytes are announced, {self.policy.max_bytes} are allowed",
            )

        def read(size: int) -> bytes:
            with _translated(target, deadline):
                return response.read1(size)

        content_type = response.headers.get_content_type()
        return MediaStream(read, Meter(self.policy.max_bytes), length, content_type, lambda: _check(deadline))


def _request(connection: PinnedConnection, target: Target) -> http.client.HTTPResponse:
    """Send the GET, and return a response that is worth reading."""
    try:
        connection.connect()
    except ssl.SSLError:
        raise
    except OSError as error:
        raise MediaError(
            Failure.UNREACHABLE, "media_unreachable", f"{target.host} cannot be reached: {error}"
        ) from None
    connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", target.host_header)
    connection.putheader("User-Agent", _USER_AGENT)
    connection.putheader("Accept-Encoding", "identity")
    connection.putheader("Connection", "close")
    connection.endheaders()
    response = connection.response = connection.getresponse()
    if 300 <= response.status < 400:
        raise MediaError(Failure.THEIRS, "media_redirect", f"{target.host} redirects, which is not followed")
    if response.status != 200:
        raise MediaError(
            Failure.THEIRS, f"media_http_{response.status}", f"{target.host} answered {response.status}"
        )
    if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
        raise MediaError(
            Failure.THEIRS, "media_encoded", f"{target.host} sent an encoding that was not asked for"
        )
    return response


def _announced_length(response: http.client.HTTPResponse, declared: int | None) -> int | None:
    """Bytes to expect; None for a chunked body, which tells its own end."""
    if response.chunked:
        return None
    lengths = set(response.headers.get_all("Content-Length") or ())
    if len(lengths) > 1 or (lengths and not re.fullmatch(r"[0-9]{1,18}", next(iter(lengths)), re.ASCII)):
        raise MediaError(Failure.THEIRS, "media_length_invalid", "the answer's Content-Length cannot be read")
    if lengths:
        return int(lengths.pop())
    if declared is None:
        raise MediaError(
            Failure.THEIRS,
            "media_length_unknown",
            "neither the server nor the delivery says how long the file is",
        )
    return declared


def _check(deadline: Deadline) -> None:
    """Raise what the deadline has to say, if anything."""
    if deadline.stopped:
        raise MediaError(
            Failure.INTERRUPTED, "stopping", "the download was interrupted because the worker stops"
        )
    if deadline.expired:
        raise MediaError(Failure.THEIRS, "media_timeout", "the download took too long")


@contextmanager
def _translated(target: Target, deadline: Deadline) -> Iterator[None]:
    """Turn what the network throws into `MediaError`."""
    try:
        yield
    except MediaError:
        _check(deadline)
        raise
    except ssl.SSLCertVerificationError as error:
        raise MediaError(
            Failure.THEIRS, "media_certificate", f"{target.host}'s certificate: {error.verify_message}"
        ) from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        _check(deadline)
        reason = "media_timeout" if isinstance(error, TimeoutError) else "media_broken"
        message = f"{target.host}: {type(error).__name__}: {error}"
        raise MediaError(Failure.THEIRS, reason, message) from None


def decode_data_uri(uri: str) -> tuple[bytes, str]:
    """Bytes and media type of an RFC 2397 URI. Raises `MediaError` (permanent) when it is malformed."""
    match = _DATA_URI.match(uri)
    if match is None:
        raise MediaError(Failure.PERMANENT, "media_data_invalid", "the data: URI has no readable head")
    content_type = (match[1] or "text/plain").lower()
    text = uri[match.end() :]
    try:
        raw = unquote_to_bytes(text)
        if match[3] is None:
            return raw, content_type
        return base64.b64decode(raw, validate=True), content_type
    except (binascii.Error, ValueError):
        raise MediaError(
            Failure.PERMANENT, "media_data_invalid", "the data: URI's base64 is malformed"
        ) from None
