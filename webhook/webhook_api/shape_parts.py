"""What deliveries are made of: bodies, credentials (right and wrong), and ways of sending. The shapes are in ``shapes``."""

from __future__ import annotations

import base64
import gzip
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from nacl.signing import SigningKey

from webhook_api.auth.signing import (
    FAL_HEADERS,
    SECRET_HEADER,
    SIGNATURE_HEADER,
    STANDARD_HEADERS,
    TIMESTAMP_HEADER,
    sign,
)
from webhook_api.auth.standard import sign_symmetric

MEDIA: Final = "https://v3.fal.media/files/example"
LORA_NAME: Final = "pytorch_lora_weights.safetensors"
CONFIG_NAME: Final = "config.json"
SEED: Final = 2**53 + 111
"""A seed that no float can hold; fal's are as large."""
LIMIT: Final = 10 * 1024 * 1024
"""The default of WEBHOOK_BODY_LIMIT_BYTES."""

Authorise = Callable[["Credentials", str, bytes], dict[str, str]]
Build = Callable[[str, str], bytes]


class ShapeError(Exception):
    """A shape needs something that was not given. ``reason``: no_key, no_secret, no_standard_secret, unknown_shape."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a sender may use. ``key`` is a development key, never fal's own."""

    key: SigningKey | None = None
    account_id: str = "dev-account"
    secret: str | None = None
    clock: Callable[[], float] = time.time
    standard_secret: bytes | None = field(default=None, repr=False)
    """Of a sender with Standard Webhooks."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One request, ready to be posted."""

    request_id: str
    body: bytes
    headers: dict[str, str]
    transport: str = "plain"
    """How it is sent: plain, chunked, truncated (less than Content-Length says, then the end)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of delivery. ``expect`` is the HTTP status that a correct service gives."""

    name: str
    about: str
    build: Build
    """From request id and base address of the media to the body."""
    authorise: Authorise
    expect: int = 200
    also: tuple[int | None, ...] = ()
    """Other right answers: a proxy on the way may be the one that refuses. None: no answer, the connection ends."""
    transport: str = "plain"
    same_id: bool = False
    """All requests of one command are the same delivery."""
    needs: str = "key"
    """What it is authorised with: key, secret, standard (a sender of WEBHOOK_SOURCES), nothing."""
    large: bool = False
    """Its body has megabytes."""


def outgoing(shape: Shape, credentials: Credentials, request_id: str, media: str = MEDIA) -> Outgoing:
    """Build one request of a shape. Raises ShapeError when a credential is missing."""
    body = shape.build(request_id, media.rstrip("/"))
    headers = {"Content-Type": "application/json", "User-Agent": "webhook-api-send/1"}
    return Outgoing(
        request_id, body, headers | shape.authorise(credentials, request_id, body), shape.transport
    )


# Credentials


def by_key(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign as fal does."""
    return signed(credentials, request_id, body)


def by_secret(credentials: Credentials, _request_id: str, _body: bytes) -> dict[str, str]:
    """Send the shared secret."""
    if credentials.secret is None:
        raise ShapeError("no_secret", "this shape is authorised by the shared secret: give --secret-file")
    return {SECRET_HEADER: credentials.secret}


def by_standard(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign as Standard Webhooks says, with a secret."""
    return standard(credentials, request_id, body)


def signed(
    credentials: Credentials,
    request_id: str,
    body: bytes,
    *,
    key: SigningKey | None = None,
    shift: int = 0,
    account: str | None = None,
) -> dict[str, str]:
    """fal's four headers. ``shift``: seconds by which the sender's clock is wrong."""
    chosen = key or credentials.key
    if chosen is None:
        raise ShapeError(
            "no_key", "this shape is signed: give --key-file (make one: webhook-api keys generate)"
        )
    timestamp = int(credentials.clock()) + shift
    return sign(chosen, request_id, account or credentials.account_id, timestamp, body)


def forged(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign with a key of somebody else."""
    return signed(credentials, request_id, body, key=SigningKey.generate())


def tampered(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign another body than the one that is sent."""
    return by_key(credentials, request_id, body + b" ")


def shifted(seconds: int) -> Authorise:
    """Sign at another time."""
    return lambda credentials, request_id, body: signed(credentials, request_id, body, shift=seconds)


def other_account(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign as another customer of fal."""
    return signed(credentials, request_id, body, account=f"{credentials.account_id}-other")


def without(name: str) -> Authorise:
    """Leave a header out."""

    def authorise(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
        return {
            header: value for header, value in by_key(credentials, request_id, body).items() if header != name
        }

    return authorise


def rewritten(name: str, change: Callable[[str], str]) -> Authorise:
    """Write one header in a way that a lenient parser would take."""

    def authorise(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
        headers = by_key(credentials, request_id, body)
        return headers | {name: change(headers[name])}

    return authorise


def borrowed_id(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Name another request than the one that was signed."""
    return by_key(credentials, request_id, body) | {FAL_HEADERS[0]: f"{request_id}-other"}


def wrong_secret(_credentials: Credentials, _request_id: str, _body: bytes) -> dict[str, str]:
    """Send a secret that is not the configured one."""
    return {SECRET_HEADER: secrets.token_hex(16)}


def nothing(_credentials: Credentials, _request_id: str, _body: bytes) -> dict[str, str]:
    """No credentials at all."""
    return {}


def with_header(name: str, value: str) -> Authorise:
    """Sign rightly, and add a header."""
    return lambda credentials, request_id, body: by_key(credentials, request_id, body) | {name: value}


def standard(
    credentials: Credentials, request_id: str, body: bytes, *, secret: bytes | None = None, shift: int = 0
) -> dict[str, str]:
    """The three headers of Standard Webhooks."""
    chosen = secret or credentials.standard_secret
    if chosen is None:
        raise ShapeError(
            "no_standard_secret", "this shape is of a sender in WEBHOOK_SOURCES: give --standard-secret-file"
        )
    timestamp = int(credentials.clock()) + shift
    values = (request_id, str(timestamp), sign_symmetric(chosen, request_id, timestamp, body))
    return dict(zip(STANDARD_HEADERS, values, strict=True))


def standard_forged(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Sign with a secret of somebody else."""
    return standard(credentials, request_id, body, secret=secrets.token_bytes(32))


def standard_shifted(seconds: int) -> Authorise:
    """Sign at another time."""
    return lambda credentials, request_id, body: standard(credentials, request_id, body, shift=seconds)


def standard_unsigned(credentials: Credentials, request_id: str, body: bytes) -> dict[str, str]:
    """Leave the signature out."""
    headers = standard(credentials, request_id, body)
    del headers[STANDARD_HEADERS[2]]
    return headers


SHORT_SIGNATURE: Final = rewritten(SIGNATURE_HEADER, lambda value: value[:-1])
SPACED_SIGNATURE: Final = rewritten(SIGNATURE_HEADER, lambda value: f"{value[:64]} {value[64:]}")
DOUBLED_SIGNATURE: Final = rewritten(SIGNATURE_HEADER, lambda value: f"{value}, {value}")
ODD_TIMESTAMP: Final = rewritten(TIMESTAMP_HEADER, lambda value: f"+{value}")
GROUPED_TIMESTAMP: Final = rewritten(TIMESTAMP_HEADER, lambda value: f"{value[:4]}_{value[4:]}")


# Bodies


def dump(document: Any) -> bytes:
    """JSON as fal writes it."""
    return json.dumps(document, separators=(",", ":")).encode()


def fal(status: str, payload: Callable[[str], Any], **extra: Any) -> Build:
    """A body of fal."""
    return lambda request_id, media: dump(
        {
            "request_id": request_id,
            "gateway_request_id": request_id,
            "status": status,
            "payload": payload(media),
            **extra,
        }
    )


def fal_text(members: str) -> Build:
    """A body of fal with members that no JSON writer would write."""
    return lambda request_id, _media: (
        f'{{"request_id":"{request_id}","gateway_request_id":"{request_id}","status":"OK",{members}}}'.encode(
            "utf-8", "surrogatepass"
        )
    )


def old(status: str, **extra: Any) -> Build:
    """A body of the bot and the older service."""
    comment = "user_id=123;avatar_id=abc;training_type=portrait"
    return lambda request_id, _media: dump(
        {"request_id": request_id, "status": status, "comment": comment, **extra}
    )


def old_text(members: str) -> Build:
    """The same with members that are no strict JSON."""
    return lambda request_id, _media: (
        f'{{"request_id":"{request_id}","status":"completed",{members}}}'.encode()
    )


def raw(body: bytes) -> Build:
    """These bytes."""
    return lambda _request_id, _media: body


def _file(media: str, name: str, content_type: str) -> dict[str, Any]:
    return {"url": f"{media}/{name}", "content_type": content_type, "file_name": name, "file_size": None}


def portrait(media: str) -> dict[str, Any]:
    """A portrait training's payload."""
    return {
        "diffusers_lora_file": _file(media, LORA_NAME, "application/octet-stream"),
        "config_file": _file(media, CONFIG_NAME, "application/json"),
        "seed": SEED,
    }


def old_portrait(request_id: str, media: str) -> bytes:
    """An older body with a portrait training's result."""
    return old("completed", progress=100, message="Training completed", result=portrait(media))(
        request_id, media
    )


def data_uri(size: int) -> Callable[[str], dict[str, Any]]:
    """A payload with ``size`` bytes of a file in it, as `sync_mode` models give it."""

    def payload(_media: str) -> dict[str, Any]:
        text = base64.b64encode(secrets.token_bytes(size)).decode()
        return {
            "images": [{"url": f"data:image/png;base64,{text}", "content_type": "image/png"}],
            "seed": SEED,
        }

    return payload


def retried(request_id: str, media: str) -> bytes:
    """A body of fal whose `gateway_request_id` is another one each time, as after an internal retry."""
    document = {
        "request_id": request_id,
        "gateway_request_id": secrets.token_hex(16),
        "status": "OK",
        "payload": portrait(media),
    }
    return dump(document)


def another_result(request_id: str, media: str) -> bytes:
    """A result that differs each time."""
    return fal("OK", lambda _media: {"finetune_id": f"ft-{secrets.token_hex(4)}"})(request_id, media)


def compressed(build: Build) -> Build:
    """The body as gzip."""
    return lambda request_id, media: gzip.compress(build(request_id, media))


def padded(build: Build, size: int) -> Build:
    """The body with spaces after it, up to ``size`` bytes."""
    return lambda request_id, media: build(request_id, media).ljust(size, b" ")


def replicate(status: str, **extra: Any) -> Build:
    """A body as Replicate writes it."""
    return lambda request_id, media: dump(
        {"id": request_id, "status": status, "output": [f"{media}/{LORA_NAME}"], "error": None, **extra}
    )
