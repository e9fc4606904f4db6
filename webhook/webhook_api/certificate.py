"""When the certificate ends that the edge shows: read from a TLS connection to it, as a client would see it.

The worker asks (setting `EDGE_TLS_ADDRESS`), not Prometheus: it stands beside nginx on every host, and its answer is
there for whoever reads `/metrics`. Whether the certificate is trusted is not judged here: a certificate that has signed
itself ends as well. Decision 0650.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from datetime import UTC, datetime
from typing import Final

from webhook_api.config import Settings
from webhook_api.metrics_upkeep import CERTIFICATE_ENDS, CERTIFICATE_UP

EVERY_SECONDS: Final = 3600.0
RETRY_SECONDS: Final = 60.0
"""After an attempt in vain: nginx may be starting."""
CONNECT_SECONDS: Final = 5.0
_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18

log = logging.getLogger(__name__)


class CertificateUnreadable(ValueError):
    """These bytes are no X.509 certificate."""


def not_after(der: bytes) -> float:
    """The end of an X.509 certificate's validity, in Unix time (RFC 5280, 4.1). Raises `CertificateUnreadable`.

    Read here: Python's `ssl` shows the fields of a certificate only where it trusts its issuer.
    """
    try:
        certificate = _inside(der, 0, _SEQUENCE)
        position, _ = _inside(der, certificate[0], _SEQUENCE)
        if der[position] == _VERSION:
            position = _skip(der, position)
        for _ in ("serial number", "signature algorithm", "issuer"):
            position = _skip(der, position)
        begins, _ = _inside(der, position, _SEQUENCE)
        return _moment(der, _skip(der, begins))
    except (IndexError, ValueError) as error:
        raise CertificateUnreadable(f"not an X.509 certificate: {error}") from None


def _header(der: bytes, position: int) -> tuple[int, int, int]:
    """Tag, and where the value of an element begins and ends (DER: X.690, 8.1.3)."""
    tag, length, begins = der[position], der[position + 1], position + 2
    if length >= 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[begins : begins + size], "big")
        begins += size
    if begins + length > len(der):
        raise ValueError("it is cut off")
    return tag, begins, begins + length


def _inside(der: bytes, position: int, tag: int) -> tuple[int, int]:
    found, begins, ends = _header(der, position)
    if found != tag:
        raise ValueError(f"tag {found:#x} in the place of {tag:#x}")
    return begins, ends


def _skip(der: bytes, position: int) -> int:
    return _header(der, position)[2]


def _moment(der: bytes, position: int) -> float:
    tag, begins, ends = _header(der, position)
    text = der[begins:ends].decode("ascii")
    if tag == _UTC_TIME:
        # Two digits of the year: 50 and above are the last century's (RFC 5280, 4.1.2.5.1).
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag {tag:#x} is no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def ask(host: str, port: int) -> float:
    """When the certificate ends that a server shows. Raises OSError, `CertificateUnreadable`."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # its end is asked for; nothing is sent
    with (
        socket.create_connection((host, port), CONNECT_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    return not_after(der or b"")


def look(host: str, port: int) -> bool:
    """Ask once and bring the metrics up to date; whether there was an answer."""
    try:
        ends = ask(host, port)
    except (OSError, CertificateUnreadable) as error:
        CERTIFICATE_UP.set(0)
        log.warning("certificate_unknown", extra={"address": f"{host}:{port}", "error": str(error)[:300]})
        return False
    CERTIFICATE_UP.set(1)
    CERTIFICATE_ENDS.set(ends)
    return True


def job(settings: Settings, stop: threading.Event) -> None:
    """Look every hour until `stop`."""
    if settings.edge_tls_address is None:
        return
    host, port = settings.edge_tls_address
    pause = 0.0
    while not stop.wait(pause):
        pause = EVERY_SECONDS if look(host, port) else RETRY_SECONDS
