"""The message that fal signs, and signing it with a development key."""

from __future__ import annotations

import base64
import hashlib
from typing import Any, Final

from nacl.signing import SigningKey

REQUEST_ID_HEADER: Final = "X-Fal-Webhook-Request-Id"
USER_ID_HEADER: Final = "X-Fal-Webhook-User-Id"
TIMESTAMP_HEADER: Final = "X-Fal-Webhook-Timestamp"
SIGNATURE_HEADER: Final = "X-Fal-Webhook-Signature"
FAL_HEADERS: Final = (REQUEST_ID_HEADER, USER_ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER)
SECRET_HEADER: Final = "X-Webhook-Secret"  # noqa: S105  (a header's name)
STANDARD_HEADERS: Final = ("Webhook-Id", "Webhook-Timestamp", "Webhook-Signature")
"""Of Standard Webhooks."""


def message(request_id: str, user_id: str, timestamp: int | str, body: bytes) -> bytes:
    """Return what is signed: four lines, the last being the hex SHA-256 of the raw body, without a final newline.

    Contract: fal.ai, model-apis/inference/webhooks, "Signature verification".
    """
    return f"{request_id}\n{user_id}\n{timestamp}\n{hashlib.sha256(body).hexdigest()}".encode()


def sign(key: SigningKey, request_id: str, user_id: str, timestamp: int | str, body: bytes) -> dict[str, str]:
    """Return the four headers of a delivery, signed as fal signs."""
    signature = key.sign(message(request_id, user_id, timestamp, body)).signature
    return {
        REQUEST_ID_HEADER: request_id,
        USER_ID_HEADER: user_id,
        TIMESTAMP_HEADER: str(timestamp),
        SIGNATURE_HEADER: signature.hex(),
    }


def public_jwks(*keys: SigningKey) -> dict[str, Any]:
    """Return the JWKS document (RFC 8037) with the public half of each key."""
    return {"keys": [_jwk(bytes(key.verify_key)) for key in keys]}


def _jwk(public: bytes) -> dict[str, str]:
    x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "x": x}
