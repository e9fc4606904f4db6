"""fal's Ed25519 signature over request id, account, time and body (contract: fal.ai, inference/webhooks)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from webhook_api.auth.accounts import Accounts
from webhook_api.auth.errors import AuthError
from webhook_api.auth.keys import KeyStore
from webhook_api.auth.model import Claims, Headers, Verified, out_of_window
from webhook_api.auth.signing import FAL_HEADERS, message

# Strict on purpose: int() takes " 17" and "1_7", bytes.fromhex takes spaces. A header that came twice reaches us
# joined by a comma, which no pattern allows.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}")
_USER_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:|@+-]{0,199}")
_TIMESTAMP: Final = re.compile(r"[1-9][0-9]{0,11}")
_SIGNATURE: Final = re.compile(r"[0-9a-fA-F]{128}")
_PATTERNS: Final = tuple(zip(FAL_HEADERS, (_REQUEST_ID, _USER_ID, _TIMESTAMP, _SIGNATURE), strict=True))


class FalVerifier:
    """Verifies deliveries of fal. Every key is tried: fal sends no key id.

    ``accounts`` says which of fal's customers may deliver: the keys are the same for all of them. A plain set pins.
    """

    def __init__(
        self,
        keys: KeyStore,
        accounts: Accounts | frozenset[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._accounts = accounts if isinstance(accounts, Accounts) else Accounts(accounts)
        self._clock = clock

    def claims(self, headers: Headers) -> Claims:
        """Read the four headers. Raises AuthError missing_header or malformed_header."""
        values = [self._header(headers, name, pattern) for name, pattern in _PATTERNS]
        request_id, user_id, timestamp, signature = values
        return Claims("fal", request_id, user_id, int(timestamp), signature)

    def verify(self, claims: Claims, body: bytes) -> Verified:
        """Prove origin, then look at account and time, in this order: later findings imply a valid signature.

        The account goes before the time, so that no other customer of fal can have anything kept here.
        """
        self._signed(claims, body)
        return self._judged(claims, body)

    def verify_now(self, claims: Claims, body: bytes) -> Verified | None:
        """Verify with the keys that are known, as ``verify`` does but without waiting for any others.

        ``None``: these do not decide it, so ``verify`` must, where waiting is allowed. Raises AuthError.
        """
        keys = self._keys.known()
        if not _any_matches(keys, *_signed_bytes(claims, body)):
            return None
        return self._judged(claims, body)

    def _judged(self, claims: Claims, body: bytes) -> Verified:
        age = self._clock() - (claims.timestamp or 0)
        late = out_of_window(age)
        aside = self._accounts.admit(claims.account_id or "", len(body), fresh=late is None)
        return Verified("fal", claims.request_id, claims.account_id, age, claims.timestamp, aside or late)

    def _header(self, headers: Headers, name: str, pattern: re.Pattern[str]) -> str:
        value = headers.get(name)
        if value is None:
            raise AuthError("missing_header", f"the header {name} is missing")
        if not pattern.fullmatch(value):
            raise AuthError("malformed_header", f"the header {name} does not have the documented form")
        return value

    def _signed(self, claims: Claims, body: bytes) -> None:
        signed, signature = _signed_bytes(claims, body)
        keys = self._keys.current()
        if _any_matches(keys, signed, signature):
            return
        renewed = self._keys.renewed(keys)
        if renewed is not None and _any_matches(renewed, signed, signature):
            return
        raise AuthError("bad_signature", "no key of fal matches the signature")


def _signed_bytes(claims: Claims, body: bytes) -> tuple[bytes, bytes]:
    signed = message(claims.request_id or "", claims.account_id or "", claims.timestamp or 0, body)
    return signed, bytes.fromhex(claims.credential)


def _any_matches(keys: tuple[VerifyKey, ...], signed: bytes, signature: bytes) -> bool:
    return any(_matches(key, signed, signature) for key in keys)


def _matches(key: VerifyKey, signed: bytes, signature: bytes) -> bool:
    try:
        key.verify(signed, signature)
    except BadSignatureError:
        return False
    return True
