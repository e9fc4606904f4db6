"""From when to when a certificate holds, read from its PEM text with the standard library alone (RFC 5280, X.690)."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17


class CertificateUnreadable(ValueError):
    """The text holds no certificate that can be read."""


def first_certificate(pem: str) -> bytes:
    """The first certificate's DER bytes: a server's own one, in a chain."""
    found = _PEM.search(pem)
    try:
        return base64.b64decode(found.group(1), validate=False) if found else b""
    except binascii.Error:
        return b""


def validity(pem: str) -> tuple[datetime, datetime]:
    """From when to when the first certificate holds. CertificateUnreadable when there is none."""
    try:
        _, certificate, _ = _element(first_certificate(pem))
        _, signed, _ = _element(certificate)
        tag, _, rest = _element(signed)
        fields = rest if tag == _VERSION else signed
        for _ in range(3):  # serial number, signature algorithm, issuer
            _, _, fields = _element(fields)
        tag, period, _ = _element(fields)
        if tag != _SEQUENCE:
            raise CertificateUnreadable("its validity is not where it belongs")
        kind, begins, rest = _element(period)
        other, ends, _ = _element(rest)
        return _time(kind, begins), _time(other, ends)
    except (IndexError, ValueError) as error:
        raise CertificateUnreadable(f"no certificate can be read: {error}") from error


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """(tag, content, what follows) of the DER element that `data` begins with."""
    tag, length, start = data[0], data[1], 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
    if start + length > len(data):
        raise ValueError("it is cut off")
    return tag, data[start : start + length], data[start + length :]


def _time(tag: int, text: bytes) -> datetime:
    """UTCTime has two digits for the year: 50 to 99 mean the last century (RFC 5280, 4.1.2.5.1)."""
    said = text.decode("ascii")
    if tag == _UTC_TIME:
        said = ("19" if int(said[:2]) >= 50 else "20") + said
    return datetime.strptime(said, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
