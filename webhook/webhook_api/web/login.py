"""Login, logout, and how the pages look."""

from __future__ import annotations

import logging
from typing import Final

from flask import Blueprint, Response, g, make_response, redirect, render_template, request
from werkzeug.wrappers import Response as Answer

from webhook_api import audit
from webhook_api.config_console import LANGUAGES
from webhook_api.web import accounts, deeds, gate, sessions
from webhook_api.web.accounts import Who
from webhook_api.web.words import zones

LOG: Final = logging.getLogger(__name__)
YEAR: Final = 365 * 86_400
STRANGER: Final = "-"
"""Who failed to log in under a name that no account has: the name itself may be a password."""

blueprint = Blueprint("login", __name__)


@blueprint.get("/login")
def show() -> Answer:
    """The login page."""
    gate.recognise()
    if g.who is not None:
        return redirect(gate.safe_path(request.args.get("next")))
    return _form(200, "")


def _form(status: int, fault: str, seconds: float = 0.0) -> Response:
    g.stranger = request.cookies.get(gate.cookie("form"), "") or sessions.fresh()
    text = render_template(
        "login.html", fault=fault, seconds=seconds, next=gate.safe_path(request.values.get("next")),
    )  # fmt: skip
    response = make_response(text, status)
    gate.give(response, "form", g.stranger, seconds=None)
    if status == 429:
        response.headers["Retry-After"] = str(int(seconds) + 1)
    return response


@blueprint.post("/login")
def login() -> Answer:
    """Log in: a session of its own for each login."""
    gate.require_form()
    name, password = request.form.get("name", "").strip().lower()[:200], request.form.get("password", "")
    address, services = gate.address(), gate.services()
    wait = services.attempts.wait(name, address)
    if wait > 0:
        LOG.warning("login_limited", extra={"remote": address})
        return _form(429, "login.limited", wait)
    with services.read() as connection:
        kept = accounts.stored(connection, name) if accounts.NAME.fullmatch(name) else None
    if not accounts.proves(kept[1] if kept else None, password) or kept is None:
        return _failed(name if kept else STRANGER, address)
    services.attempts.forget(name, address)
    return _begin(Who(name, kept[0]), address)


def _failed(name: str, address: str) -> Response:
    services = gate.services()
    LOG.warning("login_failed", extra={"account": name, "remote": address})
    with services.write() as connection:
        deeds.note(connection, "console.login_failed", name, services.settings.instance_id, address=address)
    return _form(403, "login.wrong")


def _begin(who: Who, address: str) -> Answer:
    services = gate.services()
    operation = audit.Operation(who.name, services.settings.instance_id, "console.login")
    with services.write() as connection:
        old = request.cookies.get(gate.cookie("session"))
        if old:
            sessions.end(connection, old)
        token = sessions.begin(connection, who, services.settings.console, address, operation)
    LOG.info("login", extra={"account": who.name, "remote": address})
    response = redirect(gate.safe_path(request.form.get("next")), 303)
    gate.give(response, "session", token, seconds=None)
    response.delete_cookie(
        gate.cookie("form"), secure=services.settings.console.secure_cookies, samesite="Strict"
    )
    return response


@blueprint.post("/logout")
@gate.page
def logout() -> Answer:
    """End the session, here and in the database."""
    with gate.services().write() as connection:
        sessions.end(connection, g.token)
        deeds.note(connection, "console.logout", g.who.name, gate.services().settings.instance_id)
    response = redirect("/login", 303)
    secure = gate.services().settings.console.secure_cookies
    response.delete_cookie(gate.cookie("session"), secure=secure, httponly=True, samesite="Strict")
    return response


@blueprint.post("/look")
def look() -> Answer:
    """Keep language, theme and zone in cookies, and go back. No zone: the site's."""
    gate.recognise()
    gate.require_form()
    response = redirect(gate.safe_path(request.form.get("next")), 303)
    for name, known in (
        ("language", LANGUAGES),
        ("theme", ("auto", "light", "dark")),
        ("zone", zones() | {""}),
    ):
        if request.form.get(name) in known:
            gate.give(response, name, request.form[name], seconds=YEAR)
    return response
