"""Deliveries of every known shape, for ``webhook-api send`` and for tests: what is sent and what must come back."""

from __future__ import annotations

from typing import Any, Final

from webhook_api import shape_parts as part
from webhook_api.auth.signing import REQUEST_ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, USER_ID_HEADER
from webhook_api.shape_parts import (
    CONFIG_NAME,
    LIMIT,
    LORA_NAME,
    MEDIA,
    SEED,
    Authorise,
    Build,
    Credentials,
    Outgoing,
    Shape,
    ShapeError,
    by_key,
    by_secret,
    by_standard,
    fal,
    fal_text,
    old,
    outgoing,
)

_DETAIL: Final = {
    "detail": [{"loc": ["body", "prompt"], "msg": "field required", "type": "value_error.missing"}]
}
_NOT_SERIALIZABLE: Final = "Response payload is not JSON serializable. Fetch it from the queue."
_PORTRAIT: Final = fal("OK", part.portrait)


def custom(body: bytes, *, manual: bool) -> Shape:
    """Return a shape with a body of the caller's own."""
    return Shape("custom", "body from a file", part.raw(body), by_secret if manual else by_key)


def _aside(name: str, about: str, build: Build) -> Shape:
    return Shape(name, f"fal: signed, {about} (kept aside)", build, by_key)


def _odd(name: str, about: str, members: str) -> Shape:
    return Shape(name, f"fal: signed, {about} (taken, with an anomaly)", fal_text(members), by_key)


def _refused(name: str, about: str, authorise: Authorise, expect: int = 401, **more: Any) -> Shape:
    return Shape(name, f"fal: {about}", _PORTRAIT, authorise, expect, **more)


_VALID: Final = (
    Shape("portrait-ok", "fal: portrait training done", fal("OK", part.portrait, error=None), by_key),
    Shape("style-ok", "fal: style training done",
          fal("OK", lambda _media: {"finetune_id": "ft-0123456789"}), by_key),
    Shape("portrait-incomplete", "fal: done, but without the files", fal("OK", lambda _media: {}), by_key),
    Shape("error-422", "fal: refused input",
          fal("ERROR", lambda _media: _DETAIL, error="Invalid status code: 422"), by_key),
    Shape("error-text", "fal: failed, detail as text",
          fal("ERROR", lambda _media: {"detail": "out of memory"}, error="Invalid status code: 500"), by_key),
    Shape("ok-null-payload", "fal: done, result must be fetched",
          fal("OK", lambda _media: None, payload_error=_NOT_SERIALIZABLE), by_key),
    Shape("data-uri", "fal: with a file of 20 KB in the body", fal("OK", part.data_uri(20_000)), by_key),
    Shape("data-uri-large", "fal: with a file of 3 MB in the body", fal("OK", part.data_uri(3_000_000)), by_key,
          large=True),
    Shape("unknown-request", "fal: no avatar knows this request (parked)", _PORTRAIT, by_key),
    Shape("duplicates", "fal: the same delivery --count times (one row)", _PORTRAIT, by_key, same_id=True),
    Shape("gateway-retry", "fal: the same, each under another gateway id (one row)", part.retried, by_key, same_id=True),
    Shape("another-result", "fal: another result of the same request each time", part.another_result, by_key,
          same_id=True),
    Shape("old-queued", "older: queued", old("queued", progress=0), by_secret, needs="secret"),
    Shape("old-progress", "older: in progress", old("IN_PROGRESS", progress=40), by_secret, needs="secret"),
    Shape("old-completed", "older: portrait training done", part.old_portrait, by_secret, needs="secret"),
    Shape("old-failed", "older: failed", old("failed", error="CUDA out of memory"), by_secret, needs="secret"),
    Shape("cancelled", "older: cancelled", old("CANCELLED"), by_secret, needs="secret"),
)  # fmt: skip
_ODD_BODIES: Final = (
    _aside("not-json", "but not JSON", part.raw(b"{not json")),
    _aside("cut-off", "but JSON that ends too soon", fal_text('"payload":{"images":[')),
    _aside("empty", "without a body", part.raw(b"")),
    _aside("not-utf8", "but not UTF-8", part.raw(b'{"request_id":"\xff\xfe","status":"OK"}')),
    _aside("not-an-object", "a list", part.raw(b'["OK"]')),
    _aside("too-deep", "nested 100,000 deep", part.raw(b"[" * 100_000)),
    _aside("no-body-id", "without an id in the body", part.raw(b'{"status":"OK","payload":{}}')),
    _aside("invalid-status", "with a status that nobody knows", fal("SURPRISE", part.portrait)),
    _odd("nan", "NaN and Infinity", '"payload":{"loss":NaN,"best":-Infinity}'),
    _odd("duplicate-keys", "a key twice", '"payload":{"finetune_id":"a","finetune_id":"b"}'),
    _odd("nul", "U+0000 in a text", '"payload":{"finetune_id":"a\\u0000b"}'),
    _odd("surrogate", "half a surrogate pair in a text", '"payload":{"finetune_id":"a\\ud800b"}'),
    _odd("huge-integer", "a whole number of 5,000 digits", f'"payload":{{"seed":{"9" * 5000}}}'),
    _odd("huge-float", "a number beyond all floats", '"payload":{"loss":1e999}'),
    Shape("no-id", "older: without an id", part.raw(b'{"status":"completed"}'), by_secret, 400, needs="secret"),
    Shape("old-not-json", "older: not JSON", part.raw(b"{not json"), by_secret, 400, needs="secret"),
    Shape("old-nan", "older: NaN is no JSON", part.old_text('"progress":NaN'), by_secret, 400, needs="secret"),
    Shape("old-duplicate-keys", "older: a key twice", part.old_text('"error":"a","error":"b"'), by_secret, 400,
          needs="secret"),
    Shape("old-invalid-status", "older: with a status that nobody knows", old("done?"), by_secret, 400, needs="secret"),
)  # fmt: skip
_NOT_PROVEN: Final = (
    _refused("forged", "signed with a key of somebody else", part.forged, needs="nothing"),
    _refused("tampered", "another body than the signed one", part.tampered),
    _refused("borrowed-id", "another request id than the signed one", part.borrowed_id),
    Shape("stale", "fal: signed more than 300 s ago (kept aside)", _PORTRAIT, part.shifted(-3600)),
    Shape("future", "fal: signed more than 300 s ahead (kept aside)", _PORTRAIT, part.shifted(3600)),
    _refused("other-account", "another customer of fal (403 where accounts are pinned)", part.other_account, 403),
    _refused("missing-header", "without the signature header", part.without(SIGNATURE_HEADER)),
    _refused("missing-request-id", "without the request id header", part.without(REQUEST_ID_HEADER)),
    _refused("missing-user-id", "without the user id header", part.without(USER_ID_HEADER)),
    _refused("missing-timestamp", "without the timestamp header", part.without(TIMESTAMP_HEADER)),
    _refused("short-signature", "a signature with a digit too few", part.SHORT_SIGNATURE),
    _refused("spaced-signature", "a signature with a space in it", part.SPACED_SIGNATURE),
    _refused("doubled-signature", "the signature header twice", part.DOUBLED_SIGNATURE),
    _refused("odd-timestamp", "a timestamp with a sign", part.ODD_TIMESTAMP),
    _refused("grouped-timestamp", "a timestamp with an underscore", part.GROUPED_TIMESTAMP),
    Shape("wrong-secret", "older: with a wrong secret", old("completed"), part.wrong_secret, 401, needs="nothing"),
    Shape("unauthenticated", "without any credentials", old("completed"), part.nothing, 401, needs="nothing"),
)  # fmt: skip
_TRANSPORT: Final = (
    Shape("gzip", "fal: compressed", part.compressed(_PORTRAIT), part.with_header("Content-Encoding", "gzip"), 415),
    Shape("chunked", "fal: in chunks, without a length", _PORTRAIT, by_key, transport="chunked"),
    Shape("oversize", "fal: a byte over 10 MiB", part.padded(_PORTRAIT, LIMIT + 1), by_key, 413, large=True),
    Shape("chunked-oversize", "fal: in chunks, a byte over 10 MiB", part.padded(_PORTRAIT, LIMIT + 1), by_key, 413,
          transport="chunked", large=True),
    Shape("truncated", "fal: the connection ends before the body (400, or no answer)", _PORTRAIT, by_key, 400,
          (None,), transport="truncated"),
    Shape("huge-header", "fal: a header of 40,000 bytes (431; 400 of nginx)", _PORTRAIT,
          part.with_header("X-Padding", "x" * 40_000), 431, (400,), transport="huge"),
)  # fmt: skip
_STANDARD: Final = (
    Shape("standard-ok", "Standard Webhooks: a prediction of Replicate is done", part.replicate("succeeded"),
          by_standard, needs="standard"),
    Shape("standard-failed", "Standard Webhooks: a prediction has failed",
          part.replicate("failed", error="CUDA out of memory"), by_standard, needs="standard"),
    Shape("standard-forged", "Standard Webhooks: with a secret of somebody else", part.replicate("succeeded"),
          part.standard_forged, 401, needs="standard"),
    Shape("standard-stale", "Standard Webhooks: signed more than 300 s ago (kept aside)", part.replicate("succeeded"),
          part.standard_shifted(-3600), needs="standard"),
    Shape("standard-unsigned", "Standard Webhooks: without the signature header", part.replicate("succeeded"),
          part.standard_unsigned, 401, needs="standard"),
)  # fmt: skip

SHAPES: Final = {
    shape.name: shape for shape in (*_VALID, *_ODD_BODIES, *_NOT_PROVEN, *_TRANSPORT, *_STANDARD)
}
"""Every shape by its name."""

__all__ = [
    "CONFIG_NAME", "LORA_NAME", "MEDIA", "SEED", "SHAPES", "Credentials", "Outgoing", "Shape", "ShapeError", "custom",
    "outgoing",
]  # fmt: skip
