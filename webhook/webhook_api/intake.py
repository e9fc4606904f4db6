"""Intake: size, headers, signature, parse, one committed row, and only then 200.

Each step is a function that returns what the next one needs or raises with a ``reason``; the view reads as that list.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import BoundedSemaphore
from typing import Any, Final

from flask import Blueprint, Flask, Request, Response, current_app, g, jsonify, request

from webhook_api import acceptance, bodies
from webhook_api.auth import Authenticator, AuthError, Headers, Verified
from webhook_api.errors import Refusal
from webhook_api.inbox import Delivery, Inbox, Stored, allowance
from webhook_api.metrics import STORE

LOG: Final = logging.getLogger(__name__)
DISCARD_BYTES: Final = 65536
"""Size of the pieces in which the body of a refused request is read and forgotten."""
LARGE_BYTES: Final = bodies.LARGE
"""From this size on a body needs room: it is held several times over (bytes, text, tree, the database's copy)."""
LARGE_AT_ONCE: Final = 3
"""Large bodies at once: 3 x 10 MB x 6 copies fit into an instance's memory, 16 threads of them do not."""
ROOM_SECONDS: Final = 1.5
"""How long a large body waits for room before its sender is asked to come again."""
blueprint = Blueprint("intake", __name__, url_prefix="/api/v1")


@dataclass(frozen=True, slots=True)
class Intake:
    """What the views need."""

    authenticator: Authenticator
    inbox: Inbox
    body_limit_bytes: int
    large: BoundedSemaphore = field(default_factory=lambda: BoundedSemaphore(LARGE_AT_ONCE))
    """Room for large bodies."""


def init_app(app: Flask, intake: Intake) -> None:
    """Give the application the intake."""
    app.extensions["intake"] = intake
    app.register_blueprint(blueprint)


@blueprint.post("/avatar/status_update")
def status_update() -> Response:
    """Take a delivery of fal or of a manual call. 200 means: it is durable."""
    return _take(None)


@blueprint.post("/sources/<source>")
def source_delivery(source: str) -> Response:
    """Take a delivery of a named source."""
    return _take(source)


def _take(source: str | None) -> Response:
    intake = _intake()
    with _room(intake):
        verified, body = _receive(intake, source)
        delivery = acceptance.delivery(
            verified, body, request.headers,
            edge_request_id=g.request_id, training_type=request.args.get("training_type"),
        )  # fmt: skip
        g.verified, g.delivery = time.perf_counter(), delivery
        with STORE.time():
            stored = g.stored = intake.inbox.store(delivery, until=_until(len(body)))
    g.outcome = outcome(delivery, stored)
    account(delivery, stored, verified.age, time.perf_counter() - g.started)
    g.logged = True
    return jsonify(received(delivery, stored))


def _until(size: int) -> float | None:
    """When a large delivery has to be stored (monotonic). What it has waited and was worked on counts."""
    if not allowance.is_large(size):
        return None
    return time.monotonic() + allowance.store_seconds(size, time.perf_counter() - g.started)


def outcome(delivery: Delivery, stored: Stored) -> str:
    """One word for what became of a delivery."""
    return "kept_aside" if delivery.aside else stored.outcome


def account(delivery: Delivery, stored: Stored, age: float | None, seconds: float) -> None:
    """Count and log a delivery that is durable. This line stands for the request's own."""
    became = outcome(delivery, stored)
    acceptance.account(delivery, became)
    LOG.log(
        logging.WARNING if became == "another_result" else logging.INFO,
        "delivery_stored",
        extra={
            "outcome": became, "delivery_id": stored.id, "source": delivery.source,
            "delivery_request_id": delivery.request_id, "status": delivery.status, "attempts": stored.attempts,
            "size_bytes": len(delivery.body), "age_seconds": age, "duration_ms": round(seconds * 1000, 1),
        },
    )  # fmt: skip


def received(delivery: Delivery, stored: Stored) -> dict[str, Any]:
    """The document that the sender gets."""
    return {
        "status": "received",
        "request_id": delivery.request_id,
        "message": OUTCOME_MESSAGES[outcome(delivery, stored)],
        "delivery_id": stored.id,
        "duplicate": not stored.created,
    }


@blueprint.post("/avatar/test_webhook")
def test_webhook() -> Response:
    """Check a delivery as ``status_update`` does and say how it was understood. Nothing is stored."""
    intake = _intake()
    with _room(intake):
        verified, body = _receive(intake, None)
        event = bodies.parse(body, verified.shape)
    return jsonify(
        status="ok",
        request_id=event.request_id,
        message="understood; nothing was stored",
        understood={
            "source": verified.source, "aside": verified.aside, "status": event.status,
            "shape": event.shape, "final": event.final,
            "training_type": event.hints.training_type, "error": event.error,
            "anomalies": sorted(event.anomalies),
        },
    )  # fmt: skip


OUTCOME_MESSAGES: Final = {
    "stored": "the delivery is stored",
    "duplicate": "the delivery was already known",
    "another_result": "another result of this request was known; this one is stored as well",
    "variant": "the delivery was already known with another body; both are kept",
    "spooled": "the delivery is kept on this instance's disk until the database is back",
    "kept_aside": "the delivery is genuine but cannot be processed as it came; it is kept aside",
}


def _intake() -> Intake:
    intake = current_app.extensions["intake"]
    assert isinstance(intake, Intake)  # noqa: S101  (for the type checker; init_app sets it)
    return intake


@contextlib.contextmanager
def _room(intake: Intake) -> Iterator[None]:
    """Hold a place for a large body, or of a length that nobody declared, from its first byte to its row."""
    length = request.content_length
    if length is not None and length <= LARGE_BYTES:
        yield
        return
    if not intake.large.acquire(timeout=ROOM_SECONDS):
        _discard_body(request, 2 * intake.body_limit_bytes)
        raise Refusal("busy", "too many large deliveries at once: come again")
    try:
        yield
    finally:
        intake.large.release()


def _receive(intake: Intake, source: str | None) -> tuple[Verified, bytes]:
    """Return who sent the request, proven, and its raw body. ``None``: the headers say which source it is."""
    authenticator = intake.authenticator
    try:
        headers = request.headers
        refuse_unread(headers, intake.body_limit_bytes)
        claims = authenticator.claims_of(source, headers) if source else authenticator.claims(headers)
    except (Refusal, AuthError):
        _discard_body(request, 2 * intake.body_limit_bytes)
        raise
    body = read_body(request, intake.body_limit_bytes)
    return authenticator.admit(claims, request.headers, body), body


def _discard_body(incoming: Request, at_most: int) -> None:
    """Take what a refused sender is still sending, without keeping it.

    Otherwise the connection is reset under the sender, who then sees no answer at all (nginx: a 502).
    """
    stream, taken = incoming.environ["wsgi.input"], 0
    with contextlib.suppress(OSError):
        while taken < at_most and (piece := stream.read(DISCARD_BYTES)):
            taken += len(piece)


def refuse_unread(headers: Headers, limit: int) -> None:
    """Raise Refusal for what the headers say about the body. Nothing of it needs to be read for that."""
    encoding = (headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise Refusal(
            "content_encoding", "compressed bodies are not taken: the signature covers the bytes as sent"
        )
    declared_length(headers, limit)


def declared_length(headers: Headers, limit: int) -> int | None:
    """Return the Content-Length, ``None`` when there is none. Raises Refusal for an odd one and above the limit."""
    declared = headers.get("Content-Length")
    if declared is None or declared == "":
        return None
    if not re.fullmatch(r"[0-9]{1,18}", declared):
        raise Refusal("bad_content_length", "Content-Length is not a whole number")
    if int(declared) > limit:
        raise Refusal("too_large", f"the body is larger than {limit} bytes")
    return int(declared)


def read_body(incoming: Request, limit: int) -> bytes:
    """Read the whole raw body, or refuse it: never a part of it.

    Flask's own limit cuts a chunked body off without a word (Werkzeug 3.1.9), so the stream is read directly, one
    byte further than the limit.
    """
    declared = declared_length(incoming.headers, limit)
    stream = incoming.environ["wsgi.input"]
    try:
        body: bytes = stream.read(limit + 1 if declared is None else declared)
    except OSError as error:
        raise Refusal("incomplete_body", "the connection ended before the body") from error
    if len(body) > limit:
        raise Refusal("too_large", f"the body is larger than {limit} bytes")
    if declared is not None and len(body) != declared:
        raise Refusal("incomplete_body", "the body is shorter than its Content-Length")
    return body
