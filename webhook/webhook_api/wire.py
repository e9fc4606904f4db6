"""One HTTP exchange with an address that was looked up and checked before: no second look-up, bounded in time.

What names a host may be hostile (a URL out of a delivery), or merely wrong (a setting). Either way the connection goes
to the very address that was checked, while `Host` and TLS speak of the host's name.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
#: Resolves (host, port) to addresses, best first. Raises OSError.
Resolver = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """Addresses of `host` from the system's resolver, in its order of preference. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _embedded(address: IPAddress) -> IPAddress:
    """The IPv4 address that an IPv6 one carries (mapped, NAT64, 6to4), otherwise the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.sixtofour is not None:
            return address.sixtofour
    return address


def is_public(text: str) -> bool:
    """Whether an address belongs to the public internet: no private, loopback, link-local, shared or multicast one."""
    try:
        address = _embedded(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def host_header(host: str, port: int, *, secure: bool) -> str:
    """Value of `Host`: the port only where it is not the scheme's own."""
    name = f"[{host}]" if ":" in host else host
    return name if port == (443 if secure else 80) else f"{name}:{port}"


class PinnedConnection(http.client.HTTPConnection):
    """Connects to an address that was already checked, while `Host` and TLS speak of the host's name."""

    def __init__(
        self,
        host: str,
        port: int,
        address: str,
        context: ssl.SSLContext | None,
        *,
        connect_seconds: float,
        read_seconds: float,
    ) -> None:
        super().__init__(host, port, timeout=connect_seconds)
        self._address = address
        self._connect_seconds = connect_seconds
        self._read_seconds = read_seconds
        self._context = context
        self.wire: socket.socket | None = None
        """The socket, also after http.client has handed it over to the response (`Connection: close`)."""
        self.response: http.client.HTTPResponse | None = None

    def connect(self) -> None:
        """Open the connection, with TLS where a context was given."""
        sock = socket.create_connection((self._address, self.port), timeout=self._connect_seconds)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
            sock.settimeout(self._read_seconds)
        except BaseException:
            sock.close()
            raise
        self.sock = self.wire = sock

    def close(self) -> None:
        """Close the connection and the response that may have taken its socket over."""
        super().close()
        if self.response is not None:
            self.response.close()


class Deadline:
    """Ends an exchange that takes too long, or that the worker gives up, wherever it is just waiting.

    `expired` and `stopped` say afterwards which of the two it was.
    """

    def __init__(self, seconds: float, stop: Callable[[], bool], connection: PinnedConnection) -> None:
        self._ends = time.monotonic() + seconds
        self._stop = stop
        self._connection = connection
        self._over = threading.Event()
        self.expired = False
        self.stopped = False
        self._thread = threading.Thread(target=self._watch, name="wire-deadline", daemon=True)

    def __enter__(self) -> Deadline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.expired = time.monotonic() >= self._ends
            self.stopped = self._stop()
            if self.expired or self.stopped:
                sock = self._connection.wire
                if sock is not None:
                    with suppress(OSError):
                        # The plain socket's shutdown: an SSLSocket's own would drop TLS under the reader's feet.
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)
                # Not yet connected: look again until it is, or until connect's own timeout ends it.
