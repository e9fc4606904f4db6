"""The one exception of authentication."""

from __future__ import annotations


class AuthError(Exception):
    """A delivery cannot be attributed.

    ``reason``: missing_credentials, missing_header, malformed_header, keys_unknown, bad_signature,
    account_not_allowed, secret_not_configured, bad_secret, unknown_source. It is the metric's label and the log's
    field; ``webhook_api.errors.HTTP_STATUS`` maps it to an answer. ``account_not_allowed`` means that the signature
    itself was valid. What is authentic but too old is no error: see ``Verified.aside``.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)
