"""The Flask application of the console."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from flask import Flask, Response, g, json, render_template, request
from werkzeug.exceptions import HTTPException

from webhook_api.config import NEEDS_CONSOLE, Settings, load_settings
from webhook_api.db import DatabaseUnavailable
from webhook_api.errors import answer
from webhook_api.jsonlog import REQUEST_ID, request_id_of
from webhook_api.web import acts, api, download, gate, live, login, pages
from webhook_api.web.services import Services
from webhook_api.web.words import Words, harmless, preferred, zones

LOG: Final = logging.getLogger("webhook_api.access")
FORM_MOST: Final = 64 * 1024
STATIC_SECONDS: Final = 3600
THEMES: Final = ("auto", "light", "dark")


def create_app(settings: Settings | None = None, services: Services | None = None) -> Flask:
    """Build the application. The services are started by whoever runs it (gunicorn: after the fork)."""
    settings = settings or load_settings(needs=NEEDS_CONSOLE)
    app = Flask("webhook_api.web", static_url_path="/static")
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.config.update(
        MAX_CONTENT_LENGTH=FORM_MOST, MAX_FORM_MEMORY_SIZE=FORM_MOST, MAX_FORM_PARTS=100,
        SEND_FILE_MAX_AGE_DEFAULT=STATIC_SECONDS,
    )  # fmt: skip
    app.extensions["services"] = services or Services(settings)
    app.jinja_options = {
        **app.jinja_options,
        "finalize": harmless,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    app.before_request(_begin)
    app.after_request(_end)
    app.context_processor(_context)
    for error in (HTTPException, DatabaseUnavailable, Exception):
        app.register_error_handler(error, _fault)
    for module in (login, pages, acts, download, live, api):
        app.register_blueprint(module.blueprint)
    app.add_url_rule("/health", "health", _health)
    return app


def _begin() -> None:
    g.request_id = request_id_of(request.headers.get("X-Request-Id"))
    g.started = time.perf_counter()
    g.who, g.token = None, ""
    REQUEST_ID.set(g.request_id)
    g.words = _words()
    theme = request.cookies.get(gate.cookie("theme"), "auto")
    g.theme = theme if theme in THEMES else "auto"


def _words() -> Words:
    console = gate.services().settings.console
    chosen = request.cookies.get(gate.cookie("language"), "")
    language = chosen or preferred(request.headers.get("Accept-Language", ""), console.language)
    zone = request.cookies.get(gate.cookie("zone"), "")
    return Words(language, zone if zone in zones() else console.zone)


def _context() -> dict[str, Any]:
    words: Words = g.words
    settings = gate.services().settings
    return {
        "t": words.say, "named": words.named, "when": words.time, "span": words.span, "ago": words.since,
        "number": words.number, "words": words, "who": g.get("who"), "theme": g.theme, "csrf": gate.form_token,
        "version": settings.version, "release": settings.release, "here": request.full_path.rstrip("?"),
        "site_zone": settings.console.zone,
    }  # fmt: skip


def _end(response: Response) -> Response:
    gate.protect(response)
    response.headers["X-Request-Id"] = g.request_id
    LOG.log(
        logging.DEBUG if request.path == "/health" else logging.INFO,
        "request",
        extra={
            "method": request.method, "path": request.path[:200], "status": response.status_code,
            "duration_ms": round((time.perf_counter() - g.started) * 1000, 1),
            "account": g.who.name if g.get("who") else None, "remote": gate.address(),
        },
    )  # fmt: skip
    return response


def _health() -> Response:
    """Whether this process does its work. A database that is away is no reason to replace it."""
    settings = gate.services().settings
    document = {
        "status": "healthy", "service": "webhook-console", "version": settings.version, "release": settings.release,
        "instance": settings.instance_id, "database": gate.services().database_there(),
    }  # fmt: skip
    return Response(json.dumps(document) + "\n", mimetype="application/json")


def _fault(error: Exception) -> Response:
    """Say what went wrong: as JSON below /api, as a page elsewhere. The reason is one word of ours."""
    status, reason, headers = _reason(error)
    message = g.words.say(_message(reason, status))
    if request.path.startswith("/api/"):
        return answer(status, reason, message, headers)
    try:
        text = render_template("error.html", status=status, message=message, reason=reason)
    except Exception:  # what fails here must not hide the fault itself
        LOG.exception("defect")
        return Response(f"{status} {reason}\n", status=status, mimetype="text/plain")
    return Response(text, status=status, headers=headers)


def _reason(error: Exception) -> tuple[int, str, dict[str, str]]:
    if isinstance(error, DatabaseUnavailable):
        LOG.warning("database_unavailable", extra={"reason": error.reason})
        return 503, error.reason, {"Retry-After": "5"}
    if isinstance(error, HTTPException):
        status = error.code or 500
        said = error.description or ""
        headers = (
            {"Allow": ", ".join(sorted(getattr(error, "valid_methods", None) or ()))} if status == 405 else {}
        )
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return status, said if said.isidentifier() else f"http_{status}", headers
    LOG.error("defect", exc_info=error)
    return 500, "internal", {}


_MESSAGES: Final = {
    "timeout": "error.timeout", "csrf": "error.csrf", "operators": "error.operators", "streams": "error.streams",
    "missing_token": "error.token", "bad_token": "error.token", "filter": "error.filter",
    "empty_filter": "error.empty_filter",
    "downloads": "error.downloads", "file_missing": "error.file_missing", "file_large": "error.file_large",
    "file_differs": "error.file_differs", "file_store": "error.file_store",
}  # fmt: skip


def _message(reason: str, status: int) -> str:
    general = {400: "error.bad", 403: "error.operators", 404: "error.missing", 405: "error.method", 413: "error.large",
               503: "error.database"}  # fmt: skip
    return _MESSAGES.get(reason) or general.get(status, "error.defect")
