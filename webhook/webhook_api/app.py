"""The Flask application."""

from __future__ import annotations

import logging
import time
from typing import Final

from flask import Flask, Response, g, request

from webhook_api import errors, intake, openapi, quick, status, tracing
from webhook_api.config import Settings, load_settings
from webhook_api.jsonlog import REQUEST_ID, request_id_of
from webhook_api.metrics import REQUESTS
from webhook_api.services import Services

LOG: Final = logging.getLogger("webhook_api.access")
_QUIET: Final = frozenset({"/health", "/metrics"})


def create_app(settings: Settings | None = None, services: Services | None = None) -> Flask:
    """Build the application. The services are started by whoever runs it (gunicorn: after the fork)."""
    settings = settings or load_settings()
    services = services or Services(settings)
    app = Flask("webhook_api", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    errors.init_app(app)
    taking = intake.Intake(services.authenticator, services.inbox, settings.body_limit_bytes)
    intake.init_app(app, taking)
    app.extensions["quick"] = quick.Quick(taking)
    status.init_app(app, services)
    app.register_blueprint(openapi.prepare(settings))
    app.before_request(_begin)
    app.after_request(_end)
    return app


def _begin() -> None:
    """Take the edge's request id, so that one id names the request in every log."""
    g.request_id = request_id_of(request.headers.get("X-Request-Id"))
    g.started = time.perf_counter()
    REQUEST_ID.set(g.request_id)


def _end(response: Response) -> Response:
    seconds = time.perf_counter() - g.started
    response.headers["X-Request-Id"] = g.request_id
    REQUESTS.labels(endpoint=request.endpoint or "none", code=response.status_code).observe(seconds)
    if (request.endpoint or "").startswith("intake."):
        tracing.received(
            g.request_id, str(request.endpoint), response.status_code, g.started,
            g.get("verified"), g.get("delivery"), g.get("stored"),
        )  # fmt: skip
    if g.get("logged"):
        return response
    LOG.log(
        logging.DEBUG if request.path in _QUIET else logging.INFO,
        "request",
        extra={
            "method": request.method, "path": request.path[:200], "status": response.status_code,
            "duration_ms": round(seconds * 1000, 1), "outcome": g.get("outcome"), "remote": request.remote_addr,
        },
    )  # fmt: skip
    return response
