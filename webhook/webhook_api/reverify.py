"""A delivery that was kept is proven once more: from the archive, from the inbox, or from a file.

What was received is the record: the kept headers and the raw bytes. Its time is judged as it was when it arrived, so an
old delivery is not "stale" today. A key that has been rotated since no longer verifies what it signed: then the key set
of that time is needed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from webhook_api.auth import AuthError, FalVerifier, KeyStore
from webhook_api.auth.model import Verifier, out_of_window
from webhook_api.sources import Sender

UNSIGNED: Final = frozenset({"manual", "reconcile"})
"""Sources whose deliveries carry no proof over the body: a shared secret, or our own question to fal."""


class ReverifyError(Exception):
    """There is nothing to verify. ``reason``: not_a_delivery, missing, unknown_source."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about one delivery."""

    delivery_id: int | None
    source: str
    request_id: str | None
    where: str
    """Where it was read from: archive, database, file."""
    received_at: str | None
    valid: bool
    """The bytes are those that arrived, and their signature is right and was in its time (or it was kept aside)."""
    sha256: bool
    """Whether the bytes have the digest that was noted when they arrived."""
    signature: bool | None
    """None: deliveries of this source are not signed."""
    age_seconds: float | None
    """From signature to arrival."""
    aside: str | None
    """``stale`` or ``future`` at the time of arrival."""
    account_id: str | None
    reason: str | None = None
    """Why it is not valid."""
    message: str | None = None

    def document(self) -> dict[str, Any]:
        """As JSON shows it."""
        return asdict(self)


class _Headers:
    """Kept headers, in any case."""

    def __init__(self, kept: Mapping[str, Any]) -> None:
        self._kept = {str(name).lower(): str(value) for name, value in kept.items()}

    def get(self, name: str, /) -> str | None:
        return self._kept.get(name.lower())


@dataclass(frozen=True, slots=True)
class Verifiers:
    """What proves: fal's keys, and the configured senders."""

    keys: KeyStore
    senders: tuple[Sender, ...] = ()

    def of(self, source: str, received: float, account: str | None) -> Verifier:
        """The verifier of a source, whose clock stands at the arrival. Any account: it was judged when it arrived."""
        if source == "fal":
            return FalVerifier(self.keys, frozenset({account or ""}), lambda: received)
        for sender in self.senders:
            if sender.name == source:
                return sender.verifier()
        raise ReverifyError("unknown_source", f"no sender {source} is configured here")


def documents(data: bytes) -> Iterator[dict[str, Any]]:
    """Read an archived delivery, or a segment of many (a line each). Raises ReverifyError."""
    lines = [line for line in data.splitlines() if line.strip()]
    try:
        parsed = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        # Older releases wrote one document over several lines.
        try:
            parsed = [json.loads(data)]
        except (ValueError, RecursionError) as error:
            raise ReverifyError("not_a_delivery", "this is no archived delivery: it is not JSON") from error
    if not parsed:
        raise ReverifyError("not_a_delivery", "this is no archived delivery: it is empty")
    for document in parsed:
        if not isinstance(document, dict) or not {"headers", "body_base64", "body_sha256", "source"} <= set(
            document
        ):
            raise ReverifyError(
                "not_a_delivery",
                "this is no archived delivery: headers, body_base64, body_sha256 and source are expected",
            )
        yield document


def check(document: Mapping[str, Any], verifiers: Verifiers, where: str) -> Report:
    """Verify one delivery again. Raises ReverifyError, and AuthError(keys_unknown) when there are no keys."""
    try:
        body = base64.b64decode(document["body_base64"], validate=True)
        received = document.get("received_at")
        moment = datetime.fromisoformat(received).timestamp() if received else None
    except (binascii.Error, ValueError, TypeError) as error:
        raise ReverifyError("not_a_delivery", f"this is no archived delivery: {error}") from error
    source, kept = str(document["source"]), document["headers"]
    common: dict[str, Any] = {
        "delivery_id": document.get("delivery_id"),
        "source": source,
        "request_id": document.get("request_id"),
        "where": where,
        "received_at": received,
        "sha256": hashlib.sha256(body).hexdigest() == document["body_sha256"],
        "account_id": document.get("account_id"),
    }
    if source in UNSIGNED:
        return _judged(common, signature=None, age=None, aside=None)
    headers = _Headers(kept if isinstance(kept, Mapping) else {})
    account = headers.get("X-Fal-Webhook-User-Id")
    try:
        verifier = verifiers.of(source, moment or 0.0, account)
        claims = verifier.claims(headers)
        verified = verifier.verify(claims, body)
    except AuthError as error:
        if error.reason == "keys_unknown":
            raise
        said = f"{error}; if the keys have changed since, give those of that time (--jwks)"
        return _judged(common, signature=False, age=None, aside=None, reason=error.reason, message=said)
    age = (moment if moment is not None else float(claims.timestamp or 0)) - float(claims.timestamp or 0)
    late = out_of_window(age)
    # An operator who had it processed all the same knew what it was.
    expected = late if document.get("replayed_at") else document.get("aside")
    account = verified.account_id or common["account_id"]
    return _judged({**common, "account_id": account}, signature=True, age=age, aside=late, expected=expected)


def _judged(
    common: Mapping[str, Any],
    *,
    signature: bool | None,
    age: float | None,
    aside: str | None,
    expected: str | None = None,
    reason: str | None = None,
    message: str | None = None,
) -> Report:
    if not common["sha256"]:
        reason, message = "other_bytes", "these are not the bytes that arrived: their digest is another one"
    elif reason is None and aside is not None and expected != aside:
        reason, message = aside, f"it was {aside} when it arrived, and is not marked as such"
    rounded = None if age is None else round(age, 3)
    values = {**common, "signature": signature, "age_seconds": rounded, "aside": aside}
    return Report(**values, valid=reason is None, reason=reason, message=message)
