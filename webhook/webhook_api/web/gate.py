"""Who asks, and whether they may: sessions of pages, tokens of programs, forms that are ours, and safe headers."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeVar

from flask import Response, abort, current_app, g, redirect, request, url_for
from werkzeug.wrappers import Response as Answer

from webhook_api.db import DatabaseUnavailable
from webhook_api.web import sessions
from webhook_api.web.accounts import Who, by_token
from webhook_api.web.services import Services

LOG: Final = logging.getLogger(__name__)
View = TypeVar("View", bound=Callable[..., Any])

CSP: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
CHART_CSP: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; sandbox"
)
"""pygal's own style stands in the picture. No text of others does."""
HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NEEDS_LOGIN: Final = "needs_login"


def services() -> Services:
    """The process's parts."""
    found = current_app.extensions["services"]
    assert isinstance(found, Services)  # noqa: S101  (for the type checker; create_app sets it)
    return found


def cookie(name: str) -> str:
    """A cookie's full name: bound to this very host where cookies are secure."""
    return f"__Host-console_{name}" if services().settings.console.secure_cookies else f"console_{name}"


def give(response: Answer, name: str, value: str, *, seconds: int | None, script: bool = False) -> None:
    """Set a cookie."""
    response.set_cookie(
        cookie(name), value, max_age=seconds, httponly=not script, path="/", samesite="Strict",
        secure=services().settings.console.secure_cookies,
    )  # fmt: skip


def address() -> str:
    """The client's address: nginx's word for it where nginx is in front."""
    if services().settings.console.behind_edge:
        return request.headers.get("X-Real-IP", "")[:45] or str(request.remote_addr)
    return str(request.remote_addr)


def recognise() -> None:
    """Find out who asks by the session's cookie; g.who is None for a stranger."""
    g.who, g.token = None, request.cookies.get(cookie("session"), "")
    if not g.token:
        return
    with services().read() as connection:
        session = sessions.find(connection, g.token, services().settings.console)
    if session is None:
        return
    g.who = session.who
    if session.due:
        try:
            with services().write() as connection:
                sessions.touch(connection, g.token)
        except DatabaseUnavailable as error:
            LOG.warning("session_not_touched", extra={"reason": error.reason})


def form_token() -> str:
    """What a form must bring back: of the session, or of the login page's own cookie."""
    return sessions.form_token(
        g.token if g.who else g.get("stranger") or request.cookies.get(cookie("form"), "")
    )


def require_form() -> None:
    """Refuse a form that no page of this session has shown."""
    kept = g.token if g.who else request.cookies.get(cookie("form"), "")
    if not kept or not sessions.form_fits(kept, request.form.get("csrf", "")):
        LOG.warning("form_refused", extra={"path": request.path[:200], "remote": address()})
        abort(403, "csrf")


def page(view: View) -> View:
    """A page for whoever is logged in; strangers are shown the login first."""

    @wraps(view)
    def call(*args: Any, **values: Any) -> Any:
        recognise()
        if g.who is None:
            asked = request.full_path.rstrip("?") if request.method == "GET" else "/"
            return redirect(url_for("login.show", next=asked))
        if request.method == "POST":
            require_form()
        return view(*args, **values)

    return call  # type: ignore[return-value]


def operators(view: View) -> View:
    """Below ``page``: for operators alone."""

    @wraps(view)
    def call(*args: Any, **values: Any) -> Any:
        if not g.who.operator:
            abort(403, "operators")
        return view(*args, **values)

    return call  # type: ignore[return-value]


def bearer() -> Who:
    """Whose token a program has sent. Refuses with 401. A session's cookie does not count: no form can do what API does."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if not hmac.compare_digest(kind.lower().encode("utf-8", "replace"), b"bearer") or not token.strip():
        abort(401, "missing_token")
    with services().read() as connection:
        who = by_token(connection, token.strip())
    if who is None:
        LOG.warning("token_refused", extra={"remote": address()})
        abort(401, "bad_token")
    return who


def safe_path(given: str | None) -> str:
    """Where to go after a form: a path of ours, never another host."""
    if (
        not given
        or not given.startswith("/")
        or given.startswith(("//", "/\\"))
        or not given.isprintable()
        or "\\" in given
    ):
        return "/"
    return given


def protect(response: Response) -> Response:
    """Give every answer the headers that keep a browser from doing what was not meant."""
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Content-Security-Policy", CSP)
    response.headers.setdefault("Cache-Control", "no-store")
    return response
