"""How the instances and the certificate are: asked in the background, so that no page ever waits for them."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api.config_console import ConsoleSettings

EVERY: Final = 10.0
CERTIFICATE_EVERY: Final = 600.0
TIMEOUT: Final = 2.0
MOST: Final = 50_000
"""Bytes of an answer that are read."""
LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Instance:
    """What one instance said of itself. ``document`` is empty when it did not answer."""

    address: str
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its own name, else its address."""
        return str(self.document.get("instance") or self.address)

    @property
    def status(self) -> str:
        """healthy, degraded, unhealthy, or away."""
        return str(self.document.get("status") or "away")

    @property
    def troubles(self) -> list[str]:
        """Why it is not healthy, a few words each: ``redis: unreachable``, ``keys: stale``, ``spool: 3``."""
        checks = self.document.get("checks")
        found = []
        for name in checks if isinstance(checks, dict) else ():
            check = self.check(str(name))
            if check.get("ok") is False:
                found.append(f"{name}: {check.get('error', 'failed')}")
            elif check.get("stale") is True:
                found.append(f"{name}: stale")
            elif name == "spool" and check.get("rows"):
                found.append(f"{name}: {check['rows']}")
        return [text[:80] for text in found[:10]]

    def check(self, name: str) -> dict[str, Any]:
        """One of its checks; empty when it has none of this name."""
        checks = self.document.get("checks")
        found = checks.get(name) if isinstance(checks, dict) else None
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen last."""

    instances: tuple[Instance, ...] = ()
    certificate_ends: datetime | None = None
    at: datetime | None = None


class Monitor:
    """A thread that asks."""

    def __init__(self, settings: ConsoleSettings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.seen = Seen()

    def start(self) -> None:
        """Begin to ask, where there is anybody to ask."""
        if self._settings.instances or self._settings.edge:
            self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _run(self) -> None:
        ends, next_look = None, 0.0
        while not self._stop.is_set():
            try:
                if self._settings.edge and time.monotonic() >= next_look:
                    ends = certificate_ends(self._settings.edge)
                    next_look = time.monotonic() + (CERTIFICATE_EVERY if ends else EVERY)
                found = tuple(Instance(address, ask(address)) for address in self._settings.instances)
                self.seen = Seen(found, ends, datetime.now(UTC))
            except Exception:  # a defect must not end what keeps looking
                LOG.exception("monitor_defect")
            self._stop.wait(EVERY)


def ask(address: str) -> dict[str, Any]:
    """The document of an instance's /health; empty when there is none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=TIMEOUT) as response:
            text = response.read(MOST)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(MOST)
    except OSError:
        return {}
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def certificate_ends(edge: str) -> datetime | None:
    """When the certificate of ``host:port`` ends. It is looked at, not trusted: it may be self-signed."""
    host, _, port = edge.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, int(port)), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            return not_after(tls.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def not_after(der: bytes) -> datetime:
    """The end of a certificate's validity (RFC 5280, 4.1). Raises ValueError."""
    certificate, _ = _element(der)
    fields, _ = _element(certificate)
    if fields[:1] == b"\xa0":  # the version, which the oldest certificates lack
        _, fields = _element(fields)
    for _ in range(3):  # serial number, signature algorithm, issuer
        _, fields = _element(fields)
    validity, _ = _element(fields)
    _, rest = _element(validity)
    text, _ = _element(rest)
    form = "%y%m%d%H%M%SZ" if rest[:1] == b"\x17" else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode("ascii"), form).replace(tzinfo=UTC)


def _element(data: bytes) -> tuple[bytes, bytes]:
    """Content of the first DER element, and what comes after it."""
    if len(data) < 2:
        raise ValueError("cut off")
    length, start = data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("cut off")
    return data[start : start + length], data[start + length :]
