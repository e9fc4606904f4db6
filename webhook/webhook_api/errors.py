"""Errors as the outside sees them: one JSON shape, and one table from reasons to HTTP statuses.

``{"error": reason, "message": text, "request_id": id of the HTTP request}``
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from flask import Flask, Response, g, json
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from webhook_api.auth.errors import AuthError
from webhook_api.bodies import BodyError
from webhook_api.db import DatabaseUnavailable
from webhook_api.metrics import REJECTED

LOG: Final = logging.getLogger(__name__)

HTTP_STATUS: Final[Mapping[str, int]] = {
    # authentication
    "missing_credentials": 401,
    "missing_header": 401,
    "malformed_header": 401,
    "bad_signature": 401,
    "bad_secret": 401,
    "secret_not_configured": 401,
    "account_not_allowed": 403,
    "unknown_source": 404,
    "keys_unknown": 503,
    # bodies
    "empty": 400,
    "not_utf8": 400,
    "not_json": 400,
    "too_deep": 400,
    "too_complex": 400,
    "not_an_object": 400,
    "missing_id": 400,
    "invalid_id": 400,
    "invalid_status": 400,
    # transport
    "incomplete_body": 400,
    "bad_content_length": 400,
    "bad_request": 400,
    "read_timeout": 408,
    "length_required": 411,
    "too_large": 413,
    "uri_too_long": 414,
    "content_encoding": 415,
    "expectation": 417,
    "headers_too_large": 431,
    "transfer_coding": 501,
    # storage
    "no_connection": 503,
    "connection_lost": 503,
    "timeout": 503,
    "locked": 503,
    "busy": 503,
    "read_only": 503,
    "not_migrated": 503,
    "resources": 503,
    "spool_full": 503,
    "spool_failed": 503,
    # defects
    "internal": 500,
}
"""Every reason that this service gives by itself. Reasons of 404 and 405 are in :func:`init_app`."""

RETRY_AFTER: Final = 5
"""Seconds that a 503 asks the sender to wait."""


DEFECT: Final = "an unexpected fault; the log names it under this request_id"


class Refusal(Exception):
    """A request is refused for the way it was sent. ``reason`` stands in :data:`HTTP_STATUS`."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


def init_app(app: Flask) -> None:
    """Answer every error of the application in the one shape."""
    app.register_error_handler(HTTPException, _http_error)
    for kind in (AuthError, BodyError, DatabaseUnavailable, Refusal):
        app.register_error_handler(kind, _refused)
    app.register_error_handler(Exception, _defect)


def answer(status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Build the one JSON shape."""
    text = json.dumps({"error": reason, "message": message, "request_id": g.get("request_id")})
    response = Response(text + "\n", status=status, mimetype="application/json", headers=dict(headers or {}))
    if status == 503:
        response.headers.setdefault("Retry-After", str(RETRY_AFTER))
    return response


def _refused(error: AuthError | BodyError | DatabaseUnavailable | Refusal) -> Response:
    g.outcome = error.reason
    return answer(account(error.reason, str(error)), error.reason, str(error))


def account(reason: str, detail: str) -> int:
    """Count and log a refusal; returns its HTTP status."""
    status = HTTP_STATUS[reason]
    REJECTED.labels(reason=reason).inc()
    level = logging.ERROR if status >= 500 else logging.WARNING
    LOG.log(level, "delivery_refused", extra={"reason": reason, "status": status, "detail": detail})
    return status


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    reason = {404: "not_found", 405: "method_not_allowed", 500: "internal"}.get(status, f"http_{status}")
    headers = {}
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return answer(status, reason, error.description or error.name, headers)


def account_defect(error: BaseException | None) -> int:
    """Count and log what should not have happened; returns its HTTP status."""
    LOG.error("defect", exc_info=error)
    REJECTED.labels(reason="internal").inc()
    return HTTP_STATUS["internal"]


def _defect(error: Exception) -> Response:
    return answer(account_defect(error), "internal", DEFECT)
