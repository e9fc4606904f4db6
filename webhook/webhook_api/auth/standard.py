"""Standard Webhooks (standardwebhooks.com): HMAC-SHA256 (``v1``) and Ed25519 (``v1a``) over id, time and body.

Signed is ``id "." timestamp "." body``. The header ``webhook-signature`` holds one or more signatures with a space
between, each ``version,base64``; one that matches is enough, and several keys may be valid at a time: that is how keys
are rotated. Why not the library ``standardwebhooks``: docs/decisions/0401.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from webhook_api.auth.errors import AuthError
from webhook_api.auth.model import Claims, Headers, Verified, out_of_window
from webhook_api.auth.signing import STANDARD_HEADERS

SECRET_PREFIX: Final = "whsec_"  # noqa: S105  (a prefix)
PUBLIC_KEY_PREFIX: Final = "whpk_"
SECRET_BYTES: Final = range(16, 129)
"""The specification asks senders for 24 to 64."""
MAX_SIGNATURES: Final = 8
"""Signatures in one header. More are refused: each is tried with each key."""

# No dot in an id: the signed text would be ambiguous. No comma: that is a header that came twice.
_ID: Final = re.compile(r"[A-Za-z0-9_~:|@+=/-]{1,255}")
_TIMESTAMP: Final = re.compile(r"[1-9][0-9]{0,11}")
_SIGNATURES: Final = re.compile(
    r"[a-z0-9]{1,8},[A-Za-z0-9+/]{1,512}={0,2}(?: [a-z0-9]{1,8},[A-Za-z0-9+/]{1,512}={0,2})*"
)
_PATTERNS: Final = tuple(zip(STANDARD_HEADERS, (_ID, _TIMESTAMP, _SIGNATURES), strict=True))
_HEADER_MAX: Final = 8192
_V1: Final = re.compile(r"[A-Za-z0-9+/]{43}=")
_V1A: Final = re.compile(r"[A-Za-z0-9+/]{86}==")


class MalformedKey(ValueError):
    """A configured secret or key has no valid form. The message never quotes it."""


class StandardVerifier:
    """Verifies the deliveries of one sender. Every secret and every key is tried with every signature."""

    def __init__(
        self,
        source: str,
        *,
        secrets: tuple[bytes, ...] = (),
        public_keys: tuple[VerifyKey, ...] = (),
        shape: str = "fal",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        self._secrets = secrets
        self._public_keys = public_keys
        self._shape = shape
        self._clock = clock

    def claims(self, headers: Headers) -> Claims:
        """Read the three headers. Raises AuthError missing_header or malformed_header."""
        delivery_id, timestamp, signatures = (
            self._header(headers, name, pattern) for name, pattern in _PATTERNS
        )
        if signatures.count(" ") >= MAX_SIGNATURES:
            raise AuthError("malformed_header", f"more than {MAX_SIGNATURES} signatures in one header")
        return Claims(self._source, delivery_id, None, int(timestamp), signatures)

    def verify(self, claims: Claims, body: bytes) -> Verified:
        """Prove origin, then look at the time."""
        signed = message(claims.request_id or "", claims.timestamp or 0, body)
        if not self._any_matches(claims.credential, signed):
            raise AuthError("bad_signature", f"no key of {self._source} matches a signature")
        age = self._clock() - (claims.timestamp or 0)
        return Verified(
            self._source,
            claims.request_id,
            None,
            age,
            claims.timestamp,
            out_of_window(age),
            shape=self._shape,
        )

    def _header(self, headers: Headers, name: str, pattern: re.Pattern[str]) -> str:
        value = headers.get(name)
        if value is None:
            raise AuthError("missing_header", f"the header {name} is missing")
        if len(value) > _HEADER_MAX or not pattern.fullmatch(value):
            raise AuthError("malformed_header", f"the header {name} does not have the documented form")
        return value

    def _any_matches(self, signatures: str, signed: bytes) -> bool:
        for entry in signatures.split(" "):
            version, _, encoded = entry.partition(",")
            if version == "v1" and self._symmetric(encoded, signed):
                return True
            if version == "v1a" and self._asymmetric(encoded, signed):
                return True
        return False

    def _symmetric(self, encoded: str, signed: bytes) -> bool:
        # The texts are compared, not what they decode to: base64 has several texts for the same bytes.
        if not _V1.fullmatch(encoded):
            return False
        given, found = encoded.encode(), False
        for secret in self._secrets:
            found |= hmac.compare_digest(_hmac(secret, signed), given)
        return found

    def _asymmetric(self, encoded: str, signed: bytes) -> bool:
        if not _V1A.fullmatch(encoded):
            return False
        signature = base64.b64decode(encoded)
        if base64.b64encode(signature).decode() != encoded:
            return False
        return any(_matches(key, signed, signature) for key in self._public_keys)


def message(delivery_id: str, timestamp: int | str, body: bytes) -> bytes:
    """Return what is signed."""
    return f"{delivery_id}.{timestamp}.".encode() + body


def sign_symmetric(secret: bytes, delivery_id: str, timestamp: int, body: bytes) -> str:
    """Return a ``v1`` signature as it stands in the header (the effect `forward` signs with it)."""
    return "v1," + _hmac(secret, message(delivery_id, timestamp, body)).decode()


def read_secret(text: str) -> bytes:
    """Read ``whsec_…`` (base64, with or without padding). Raises MalformedKey."""
    if not text.startswith(SECRET_PREFIX):
        raise MalformedKey(f"a secret begins with {SECRET_PREFIX}")
    secret = _decode(text.removeprefix(SECRET_PREFIX))
    if secret is None or len(secret) not in SECRET_BYTES:
        raise MalformedKey(
            f"a secret is {SECRET_PREFIX} and base64 of {SECRET_BYTES.start} to {SECRET_BYTES.stop - 1} bytes"
        )
    return secret


def read_public_key(text: str) -> VerifyKey:
    """Read ``whpk_…`` (base64 of 32 bytes). Raises MalformedKey."""
    raw = _decode(text.removeprefix(PUBLIC_KEY_PREFIX)) if text.startswith(PUBLIC_KEY_PREFIX) else None
    if raw is None or len(raw) != 32:
        raise MalformedKey(f"a public key is {PUBLIC_KEY_PREFIX} and base64 of 32 bytes")
    return VerifyKey(raw)


def _hmac(secret: bytes, signed: bytes) -> bytes:
    return base64.b64encode(hmac.digest(secret, signed, hashlib.sha256))


def _decode(text: str) -> bytes | None:
    bare = text.rstrip("=")
    if not re.fullmatch(r"[A-Za-z0-9+/]+", bare) or len(text) - len(bare) > 2:
        return None
    try:
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None


def _matches(key: VerifyKey, signed: bytes, signature: bytes) -> bool:
    try:
        key.verify(signed, signature)
    except BadSignatureError:
        return False
    return True
