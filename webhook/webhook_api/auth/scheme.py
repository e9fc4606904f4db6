"""Which scheme a delivery uses. Nothing falls back: a delivery with any of fal's headers must verify as fal's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from webhook_api.auth.errors import AuthError
from webhook_api.auth.model import Claims, Headers, Verified, Verifier
from webhook_api.auth.signing import FAL_HEADERS, SECRET_HEADER
from webhook_api.metrics import AGE

Witness = Callable[[AuthError, Claims, Headers, bytes], None]
"""Told of every delivery whose credentials did not hold over its body. Must neither raise nor wait."""


@dataclass(frozen=True, slots=True)
class Authenticator:
    """The verifiers of all sources."""

    fal: Verifier
    manual: Verifier
    senders: Mapping[str, Verifier] = field(default_factory=dict)
    """Configured senders by name."""
    witness: Witness | None = None

    def claims(self, headers: Headers) -> Claims:
        """Read the credentials of fal or of a manual call, whichever the headers use. Raises AuthError."""
        if any(headers.get(name) is not None for name in FAL_HEADERS):
            return self.fal.claims(headers)
        if headers.get(SECRET_HEADER) is not None:
            return self.manual.claims(headers)
        raise AuthError(
            "missing_credentials",
            f"neither fal's signature headers nor {SECRET_HEADER} came with the request",
        )

    def claims_of(self, source: str, headers: Headers) -> Claims:
        """Read the credentials of the named source and of no other. Raises AuthError, also ``unknown_source``."""
        return self._verifier(source).claims(headers)

    def verify(self, claims: Claims, body: bytes) -> Verified:
        """Prove the claims. Raises AuthError."""
        return self._verifier(claims.source).verify(claims, body)

    def admit(self, claims: Claims, headers: Headers, body: bytes) -> Verified:
        """Prove the claims as ``verify`` does, count the age of what was signed, and keep a sample of what was not."""
        try:
            verified = self.verify(claims, body)
        except AuthError as error:
            if self.witness is not None:
                self.witness(error, claims, headers, body)
            raise
        if verified.age is not None:
            AGE.labels(source=verified.source).observe(max(0.0, verified.age))
        return verified

    def admit_now(self, claims: Claims, body: bytes) -> Verified | None:
        """Prove the claims as ``admit`` does where nobody may wait; ``None``: ``admit`` must decide.

        Raises AuthError, of which the witness hears nothing: whoever refuses asks ``admit`` first.
        """
        verifier = self._verifier(claims.source)
        verify_now = getattr(verifier, "verify_now", verifier.verify)
        verified: Verified | None = verify_now(claims, body)
        if verified is not None and verified.age is not None:
            AGE.labels(source=verified.source).observe(max(0.0, verified.age))
        return verified

    def _verifier(self, source: str) -> Verifier:
        if source == "fal":
            return self.fal
        if source == "manual":
            return self.manual
        verifier = self.senders.get(source)
        if verifier is None:
            raise AuthError("unknown_source", "no sender of this name is configured here")
        return verifier
