"""A clock and a source of public keys that a test holds in its hands."""

from __future__ import annotations

import threading

from nacl.signing import SigningKey
from webhook_api.auth.keys import KeySourceError

from tests.support.falfake import jwks

NOW = 1_800_000_000


class Clock:
    """Unix seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        """The time."""
        return self.now


class Source:
    """Keys in memory that can fail, and hang."""

    name = "memory"

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = keys
        self.error: KeySourceError | None = None
        self.fetches = 0
        self.go = threading.Event()
        """Set: answer at once."""
        self.go.set()

    def fetch(self) -> bytes:
        """The document, or the error."""
        self.fetches += 1
        self.go.wait(60)
        if self.error:
            raise self.error
        return jwks(*self.keys)
