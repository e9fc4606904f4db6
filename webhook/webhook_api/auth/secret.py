"""The shared secret of the bot's own and manual calls, in the header X-Webhook-Secret."""

from __future__ import annotations

import hmac

from webhook_api.auth.errors import AuthError
from webhook_api.auth.model import Claims, Headers, Verified
from webhook_api.auth.signing import SECRET_HEADER
from webhook_api.metrics import PREVIOUS_SECRET


class SecretVerifier:
    """Compares the header with the configured secret in constant time. Without a secret all are refused.

    ``previous``: the one that it has replaced, accepted as well until every caller has the new one.
    """

    def __init__(self, secret: str | None, previous: str | None = None) -> None:
        self._secret = secret.encode() if secret else None
        self._previous = previous.encode() if previous else None

    @property
    def configured(self) -> bool:
        """Whether there is a secret at all."""
        return self._secret is not None

    def claims(self, headers: Headers) -> Claims:
        """Check the secret already here: it does not depend on the body."""
        given = headers.get(SECRET_HEADER)
        if given is None:
            raise AuthError("missing_header", f"the header {SECRET_HEADER} is missing")
        self._matches(given)
        return Claims(source="manual")

    def verify(self, claims: Claims, body: bytes) -> Verified:  # noqa: ARG002  (the Verifier protocol)
        """Nothing is left to prove: the secret does not cover the body."""
        return Verified(source=claims.source, signed=False)

    def _matches(self, given: str) -> None:
        if self._secret is None:
            raise AuthError(
                "secret_not_configured", "no FAL_WEBHOOK_SECRET is configured: manual calls are refused"
            )
        sent = given.encode("utf-8", "surrogateescape")
        current = hmac.compare_digest(sent, self._secret)
        # Also where the first one has matched: the time tells nobody which it was.
        previous = self._previous is not None and hmac.compare_digest(sent, self._previous)
        if previous and not current:
            PREVIOUS_SECRET.inc()
        if not (current or previous):
            raise AuthError("bad_secret", f"the header {SECRET_HEADER} does not hold the configured secret")
