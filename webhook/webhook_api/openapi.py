"""The OpenAPI 3.1 document of the HTTP interface, served at /api/v1/openapi.json.

Statuses and reasons of errors come from :data:`webhook_api.errors.HTTP_STATUS`, so they cannot differ from what the
service gives. That the rest is true is held by tests/unit/webhook/test_openapi_document.py (routes, methods, answers) and by
schemathesis against a running service (tests/integration/webhook/test_openapi.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

from flask import Blueprint, Response, jsonify

from webhook_api.auth.signing import FAL_HEADERS, SECRET_HEADER, STANDARD_HEADERS
from webhook_api.bodies import STATUS_WORDS, STATUSES
from webhook_api.config import Settings
from webhook_api.errors import HTTP_STATUS
from webhook_api.intake import OUTCOME_MESSAGES

PATH: Final = "/api/v1/openapi.json"
TRANSPORT: Final = frozenset(
    {"bad_request", "read_timeout", "uri_too_long", "expectation", "headers_too_large", "transfer_coding"}
)
"""Reasons that the server itself gives, whatever the path: what came was no request that it could hand on."""
_NO_STATUS: Final = {404: "not_found", 405: "method_not_allowed"}
_ID: Final = {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"}
_TEXT: Final = {"type": ["string", "null"]}
_ANY: Final = {"description": "Read where it has the usual type; another one is noted and refuses nothing"}
_OPTIONAL: Final = dict.fromkeys(
    (
        "gateway_request_id", "payload", "error", "payload_error", "progress", "message", "result", "comment", "user_id",
        "avatar_id", "training_type",
    ),
    _ANY,
)  # fmt: skip
_OBJECT: Final = {"type": "object"}

blueprint = Blueprint("openapi", __name__)


@blueprint.get(PATH)
def show_openapi() -> Response:
    """Serve the document."""
    return jsonify(_Served.document)


class _Served:
    document: dict[str, Any] = {}  # noqa: RUF012  (set once, by init)


def prepare(settings: Settings) -> Blueprint:
    """Build the document for this configuration; returns the blueprint that serves it."""
    _Served.document = document(settings.version, settings.body_limit_bytes)
    return blueprint


def document(version: str, body_limit_bytes: int) -> dict[str, Any]:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Receiver of fal.ai webhooks",
            "version": version,
            "summary": "Takes deliveries, and answers 200 when they are durable.",
            "description": (
                f"A body has at most {body_limit_bytes} bytes, is sent as it was signed (no Content-Encoding), with "
                "Content-Length or in chunks. Every error has one shape, and its `error` is one of the reasons that "
                "stand beside its status. 503 comes with Retry-After: the delivery is not proven to "
                "be stored, and sending it again is always safe."
            ),
        },
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {"schemas": _schemas(), "securitySchemes": _security_schemes(), "headers": _headers()},
    }


def _paths() -> dict[str, Any]:
    own: dict[str, Any] = {"security": [{"falSignature": []}, {"secret": []}]}
    return {
        "/api/v1/avatar/status_update": {"post": own | {
            "operationId": "takeDelivery",
            "summary": "Take a delivery of fal.ai, or a manual call",
            "description": "A signed body that cannot be read is kept aside and answered 200: nobody could send it better.",
            "parameters": [_TRAINING_TYPE],
            "requestBody": _body("Delivery"),
            "responses": {"200": _answer("It is durable", "Received"), **_errors(but={"unknown_source"})},
        }},
        "/api/v1/avatar/test_webhook": {"post": own | {
            "operationId": "testDelivery",
            "summary": "Check a delivery as status_update does, and say how it was understood. Nothing is stored",
            "requestBody": _body("Delivery"),
            "responses": {"200": _answer("It would be taken", "Understood"), **_errors(but={"unknown_source"})},
        }},
        "/api/v1/sources/{source}": {"post": {
            "operationId": "takeDeliveryOfSource",
            "summary": "Take a delivery of a named sender: fal, manual, or one of WEBHOOK_SOURCES",
            "security": [{"standardWebhooks": []}, {"falSignature": []}, {"secret": []}],
            "parameters": [
                {"name": "source", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}},
                _TRAINING_TYPE,
            ],
            "description": "What its body is like depends on the sender's shape; described is that of fal and of manual.",
            "requestBody": _body("Delivery"),
            "responses": {"200": _answer("It is durable", "Received"), **_errors()},
        }},
        "/": _page("index", "What answers here", "Index"),
        "/health": _page("health", "Whether deliveries can be accepted here", "Health", unhealthy="Health"),
        "/api/v1/webhook/status": _page("status", "The inbox; for the local network only", "Status", unhealthy="Error"),
        "/metrics": {"get": {
            "operationId": "metrics", "summary": "Metrics for Prometheus; for the local network only",
            "security": [],
            "responses": {"200": {"description": "The text format", "headers": _CORRELATION, "content": {
                "text/plain": {"schema": {"type": "string"}}}}, **_transport_errors()},
        }},
        PATH: _page("openapi", "This document", None),
    }  # fmt: skip


_CORRELATION: Final = {"X-Request-Id": {"$ref": "#/components/headers/RequestId"}}
_TRAINING_TYPE: Final = {
    "name": "training_type", "in": "query", "required": False,
    "description": "portrait or style, in any case; anything else says nothing. The body's own word goes first",
    "schema": {"type": "string"},
}  # fmt: skip


def _body(schema: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": _ref(schema)}}}


def _page(name: str, summary: str, schema: str | None, unhealthy: str | None = None) -> dict[str, Any]:
    responses = {"200": _answer("As it is now", schema), **_transport_errors()}
    if unhealthy == "Error":
        responses |= _errors(only={503, 500})
    elif unhealthy is not None:
        responses["503"] = _answer("Deliveries cannot be accepted here now", unhealthy)
    return {"get": {"operationId": name, "summary": summary, "security": [], "responses": responses}}


def _answer(description: str, schema: str | None) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(schema) if schema else _OBJECT}}
    return {"description": description, "headers": _CORRELATION, "content": content}


def _transport_errors() -> dict[str, Any]:
    return _errors(only_reasons=TRANSPORT | {"too_large"})


def _errors(
    *,
    only: Iterable[int] | None = None,
    but: Iterable[str] = (),
    only_reasons: Iterable[str] | None = None,
) -> dict[str, Any]:
    """The answers of :data:`HTTP_STATUS` by their status."""
    reasons: dict[int, list[str]] = {}
    for reason, status in HTTP_STATUS.items():
        wanted = (only is None or status in set(only)) and reason not in set(but)
        if wanted and (only_reasons is None or reason in set(only_reasons)):
            reasons.setdefault(status, []).append(reason)
    for status, reason in _NO_STATUS.items():
        if status in reasons:
            reasons[status].append(reason)
    return {str(status): _error(status, names) for status, names in sorted(reasons.items())}


def _error(status: int, reasons: list[str]) -> dict[str, Any]:
    headers = dict(_CORRELATION)
    if status == 503:
        headers["Retry-After"] = {"$ref": "#/components/headers/RetryAfter"}
    schema = {"allOf": [_ref("Error"), {"properties": {"error": {"enum": sorted(reasons)}}}]}
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(sorted(reasons))}",
        "headers": headers,
        "content": {"application/json": {"schema": schema}},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | optional}


def _schemas() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "Error": _object({"error": {"type": "string", "pattern": "^[a-z0-9_]+$"}, "message": text, "request_id": text}),
        "Delivery": {
            "description": "What fal sends (status OK or ERROR), or what the bot and older senders do.",
            "anyOf": [_ref("NamedByRequestId"), _ref("NamedByFinetuneId")],
        },
        "NamedByRequestId": _object({"request_id": _ID, "status": _status()}, finetune_id=_ANY, **_OPTIONAL),
        "NamedByFinetuneId": _object(
            {"finetune_id": _ID, "status": _status()}, request_id={"enum": [None, ""]}, **_OPTIONAL
        ),
        "Received": _object({
            "status": {"const": "received"}, "request_id": text, "message": {"enum": sorted(OUTCOME_MESSAGES.values())},
            "delivery_id": {"type": ["integer", "null"], "description": "null while it stands in the spool"},
            "duplicate": {"type": "boolean"},
        }),
        "Understood": _object({
            "status": {"const": "ok"}, "request_id": text, "message": text,
            "understood": _object({
                "source": text, "aside": _TEXT, "status": {"enum": list(STATUSES)}, "shape": text,
                "final": {"type": "boolean"}, "training_type": _TEXT, "error": _TEXT,
                "anomalies": {"type": "array", "items": text},
            }),
        }),
        "Index": _object({"service": text, "version": text, "instance": text, "endpoints": _OBJECT}),
        "Health": _object({
            "status": {"enum": ["healthy", "degraded", "unhealthy"]}, "version": text, "release": text, "instance": text,
            "checks": {"type": "object", "additionalProperties": _object({"ok": {"type": "boolean"}})},
            "time": {"type": "string", "format": "date-time"},
        }),
        "Status": _object({
            "service": text, "version": text, "release": text, "instance": text, "environment": text,
            "health": {"enum": ["healthy", "degraded", "unhealthy"]}, "body_limit_bytes": {"type": "integer"},
            "uptime_seconds": {"type": "number"}, "inbox": _OBJECT,
        }),
    }  # fmt: skip


def _status() -> dict[str, str]:
    """Every word for a status, in any case."""
    words = ("".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in word) for word in STATUS_WORDS)
    return {"type": "string", "pattern": f"^({'|'.join(words)})$", "description": ", ".join(STATUS_WORDS)}


def _security_schemes() -> dict[str, Any]:
    def key(name: str, description: str) -> dict[str, str]:
        return {"type": "apiKey", "in": "header", "name": name, "description": description}

    return {
        "falSignature": key(
            FAL_HEADERS[3],
            "Ed25519 (128 hexadecimal digits) by a key of fal's JWKS over four lines: "
            f"{', '.join(FAL_HEADERS[:3])} (these headers come too) and the SHA-256 of the raw body in hexadecimal.",
        ),
        "secret": key(SECRET_HEADER, "The shared secret of manual calls."),
        "standardWebhooks": key(
            STANDARD_HEADERS[2], f"Standard Webhooks, with {STANDARD_HEADERS[0]} and {STANDARD_HEADERS[1]}."
        ),
    }


def _headers() -> dict[str, Any]:
    return {
        "RequestId": {
            "description": "Id of the HTTP request in every log; the edge's own when it sent one",
            "schema": {"type": "string", "pattern": "^[0-9A-Za-z._-]{1,64}$"},
        },
        "RetryAfter": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}},
    }
