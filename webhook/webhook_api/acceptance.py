"""From a proven origin and raw bytes to the row that will stand in the inbox. No I/O, and no web framework.

A body that cannot be read, or a signature that is out of its time, is no reason to refuse what is authentic: the sender
would send the same again, up to 31 times. It is kept aside (state ``dead``, ``aside`` says why), and a person decides.
"""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from typing import Any, Final

from webhook_api import bodies
from webhook_api.auth.model import TOLERANCE, Headers, Verified
from webhook_api.auth.signing import FAL_HEADERS, STANDARD_HEADERS
from webhook_api.inbox.model import Delivery
from webhook_api.metrics import ANOMALIES, ASIDE, BODY, DELIVERIES

LOG: Final = logging.getLogger(__name__)
PROBE_PREFIX: Final = "probe-"
KEPT_HEADERS: Final = (*FAL_HEADERS, *STANDARD_HEADERS, "Content-Type", "User-Agent")
"""Headers that are kept with a delivery: enough to verify it again. No secret is among them."""
HEADER_MAX: Final = 500
"""Characters of one header that are kept, unless a signature needs them."""
SIGNATURES_MAX: Final = 8192
NOT_JSON_ANOMALIES: Final = frozenset({"not_a_number", "duplicate_key"})
"""Oddities for which a person's call is refused. Signed deliveries are taken: nobody could send them better."""


def delivery(
    verified: Verified,
    body: bytes,
    headers: Headers,
    *,
    edge_request_id: str | None,
    training_type: str | None = None,
) -> Delivery:
    """Build the row. Raises BodyError for a body that was not signed and cannot be read.

    ``training_type`` is what the query said. It stands outside the signature, so the body's own word goes first.
    """
    sha256 = hashlib.sha256(body).hexdigest()
    common: dict[str, Any] = {
        "source": verified.source,
        "body": body,
        "body_sha256": sha256,
        "account_id": verified.account_id,
        "headers": kept_headers(headers),
        "edge_request_id": edge_request_id,
    }
    try:
        event = bodies.parse(body, verified.shape)
    except bodies.BodyError as error:
        if not verified.signed:
            raise
        return _malformed(verified, error, sha256, common)
    _note_anomalies(verified, event)
    key = bodies.dedup_key(event.status, bodies.identity(body))
    return Delivery(
        request_id=event.request_id,
        dedup_key=key if verified.aside is None else bodies.aside_key(verified.aside, key),
        status=event.status,
        gateway_request_id=event.gateway_request_id,
        training_type_hint=event.hints.training_type or bodies.training_type(training_type),
        probe=event.request_id.startswith(PROBE_PREFIX),
        state="pending" if verified.aside is None else "dead",
        last_error=_why_aside(verified),
        aside=verified.aside,
        **common,
    )


def account(stored: Delivery, outcome: str) -> None:
    """Count a delivery that is durable now."""
    DELIVERIES.labels(source=stored.source, status=stored.status, outcome=outcome).inc()
    BODY.observe(len(stored.body))
    if stored.aside is not None:
        ASIDE.labels(source=stored.source, reason=stored.aside).inc()
        LOG.error(
            "delivery_kept_aside",
            extra={
                "reason": stored.aside, "source": stored.source, "delivery_request_id": stored.request_id,
                "detail": stored.last_error,
            },
        )  # fmt: skip


def kept_headers(headers: Headers) -> dict[str, str]:
    """Return what is kept of the headers, by their names in lower case."""
    found = ((name, headers.get(name)) for name in KEPT_HEADERS)
    return {name.lower(): _kept(name, value) for name, value in found if value is not None}


def _kept(name: str, value: str) -> str:
    return bodies.clean_text(value)[: SIGNATURES_MAX if name.endswith("Signature") else HEADER_MAX]


def _malformed(verified: Verified, error: bodies.BodyError, sha256: str, common: dict[str, Any]) -> Delivery:
    request_id = error.request_id or verified.request_id or f"unknown-{sha256[:32]}"
    also = _why_aside(verified)
    key = bodies.dedup_key("unknown", bodies.identity(common["body"]))
    return Delivery(
        request_id=request_id,
        dedup_key=bodies.aside_key("malformed", key),
        status="unknown",
        probe=request_id.startswith(PROBE_PREFIX),
        state="dead",
        last_error=f"malformed body ({error.reason}): {error}" + (f"; {also}" if also else ""),
        aside="malformed",
        **common,
    )


def _why_aside(verified: Verified) -> str | None:
    if verified.aside is None:
        return None
    if verified.aside == "account":
        return f"from the fal account {verified.account_id}, and another one was learned here"
    # Without the age itself: attempts at the same delivery must make the same row.
    where = "before it arrived" if verified.aside == "stale" else "ahead of this machine's clock"
    return f"signed at {_utc(verified.signed_at)}, more than {TOLERANCE} s {where}"


def _utc(seconds: int | None) -> str:
    try:
        return datetime.fromtimestamp(seconds or 0, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        # A timestamp has up to twelve digits, a year has four.
        return f"{seconds} (Unix time)"


def _note_anomalies(verified: Verified, event: bodies.Event) -> None:
    odd = event.anomalies & NOT_JSON_ANOMALIES
    if odd and not verified.signed:
        raise bodies.BodyError(
            "not_json", f"the body is not strict JSON: {', '.join(sorted(odd))}", event.request_id
        )
    anomalies = set(event.anomalies)
    # Standard Webhooks' id names the message, fal's the request.
    if verified.source == "fal" and verified.request_id != event.request_id:
        same = verified.request_id == event.gateway_request_id
        anomalies.add("gateway_id_in_header" if same else "other_id_in_header")
        LOG.warning(
            "delivery_id_differs",
            extra={"delivery_request_id": event.request_id, "header_request_id": verified.request_id},
        )
    for anomaly in anomalies:
        ANOMALIES.labels(anomaly=anomaly).inc()
