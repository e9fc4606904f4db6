"""What the verifiers take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

TOLERANCE: Final = 300
"""Seconds that the sender's clock and ours may differ, as fal and Standard Webhooks document."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What the headers say, in valid form but not yet proven."""

    source: str
    """``fal``, ``manual``, or the name of a configured sender."""
    request_id: str | None = None
    account_id: str | None = None
    timestamp: int | None = None
    """Unix seconds."""
    credential: str = ""
    """Signature(s) or shared secret. Never logged."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A proven origin."""

    source: str
    request_id: str | None = None
    """The id that the signature covers; the body usually says the same."""
    account_id: str | None = None
    age: float | None = None
    """Seconds since the sender signed; negative when its clock is ahead."""
    signed_at: int | None = None
    """Unix seconds, as the sender's clock had them."""
    aside: str | None = None
    """Why an authentic delivery must not be processed: ``stale``, ``future``, ``account``. ``None``: it may be."""
    signed: bool = True
    """Whether the credential covers the body. Nobody could send such a body better, so it is never refused."""
    shape: str = "fal"
    """How the body is to be read: a name of :data:`webhook_api.bodies.SHAPES`."""


class Headers(Protocol):
    """Headers by name, in any case: Werkzeug's, or a dict whose names are written as in ``signing``."""

    def get(self, name: str, /) -> str | None:
        """Return the header's value, or None."""
        ...


class Verifier(Protocol):
    """One scheme. ``claims`` needs no body, so that garbage is refused before a body is read."""

    def claims(self, headers: Headers) -> Claims:
        """Read the headers strictly. Raises AuthError."""
        ...

    def verify(self, claims: Claims, body: bytes) -> Verified:
        """Prove the claims over the raw body. Raises AuthError."""
        ...


def out_of_window(age: float) -> str | None:
    """``stale``, ``future``, or ``None`` for what was signed at most TOLERANCE seconds ago or ahead."""
    if age > TOLERANCE:
        return "stale"
    return "future" if age < -TOLERANCE else None
