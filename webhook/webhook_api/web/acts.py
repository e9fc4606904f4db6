"""What operators do: first a preview with the count, then the deed. Each is a form of the session that showed it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from flask import Blueprint, abort, g, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as Answer

from webhook_api.console import Filter
from webhook_api.web import deeds, gate, lists
from webhook_api.web.pages import asked

BACK = {"dead-letters": "pages.dead_letters", "parked": "pages.parked", "events": "pages.deliveries"}

blueprint = Blueprint("acts", __name__)


def _wanted(given: Mapping[str, str]) -> tuple[Filter, dict[str, Any]]:
    """The filter of a form: one delivery by its number, or what the fields say."""
    try:
        identifier = lists.key_of(given.get("id"))
    except lists.FilterInvalid:
        abort(400, "filter")
    if identifier is not None:
        return lists.only(identifier), {"id": str(identifier)}
    wanted, values, fault = asked(given)
    if fault:
        abort(400, "filter")
    return wanted, lists.fixed(wanted, values)


@blueprint.post("/actions/<name>/preview")
@gate.page
@gate.operators
def preview(name: str) -> str:
    """How many it would be, and the first of them."""
    if name not in deeds.NAMES:
        abort(404)
    wanted, values = _wanted(request.form)
    with gate.services().read() as connection:
        found = deeds.preview(connection, deeds.action(name, wanted), wanted)
    return render_template(
        "preview.html", at=name.partition(".")[0], name=name, values=values, said=_said(wanted, values), found=found,
        limit=min(found["matched"], deeds.MOST), back=_back(name, values),
    )  # fmt: skip


@blueprint.post("/actions/<name>")
@gate.page
@gate.operators
def act(name: str) -> Answer:
    """Do it to no more than the preview has counted, the oldest first. The answer leads to a page that does nothing."""
    if name not in deeds.NAMES:
        abort(404)
    wanted, values = _wanted(request.form)
    try:
        limit = lists.key_of(request.form.get("limit")) or 0
    except lists.FilterInvalid:
        abort(400, "filter")
    why = request.form.get("why", "").replace("\x00", "").strip()[: deeds.WHY_MOST] or None
    services = gate.services()
    with services.write() as connection:
        deed = deeds.action(name, wanted, why)
        done = deeds.do(connection, deed, wanted, limit, g.who, services.settings.instance_id)
    if not done.records:
        return redirect(url_for("acts.nothing_done", name=name, **values), 303)
    first, last = done.records[0], done.records[-1]
    return redirect(url_for("acts.result", name=name, first=first, last=last, **values), 303)


@blueprint.get("/done/<name>/<int:first>/<int:last>")
@gate.page
@gate.operators
def result(name: str, first: int, last: int) -> str:
    """What was done, as the audit has it."""
    if name not in deeds.NAMES:
        abort(404)
    with gate.services().read() as connection:
        done = deeds.recorded(connection, name, first, last)
    if done is None:
        abort(404)
    return _result(name, done)


@blueprint.get("/done/<name>")
@gate.page
@gate.operators
def nothing_done(name: str) -> str:
    """That nothing was changed: the audit has no row of it."""
    if name not in deeds.NAMES:
        abort(404)
    return _result(name, None)


def _result(name: str, done: dict[str, Any] | None) -> str:
    """The page of a result. The query is the filter, for the way back."""
    _, values = _wanted(request.args)
    return render_template(
        "done.html", at=name.partition(".")[0], name=name, done=done, back=_back(name, values)
    )


def _said(wanted: Filter, values: Mapping[str, str]) -> list[tuple[str, Any]]:
    """The filter as its form says it: names, words, and times in the reader's zone."""
    times = {"since": wanted.since, "until": wanted.until}
    return [
        (g.words.say(f"filter.{name}"), _shown(name, value, times.get(name)))
        for name, value in values.items()
    ]


def _shown(name: str, value: str, time: datetime | None) -> Any:
    if time is not None:
        return g.words.time(time)
    return g.words.named(name, value) if name in ("status", "state", "aside") else value


def _back(name: str, values: dict[str, Any]) -> str:
    if "id" in values:
        return url_for("pages.delivery", identifier=int(values["id"]))
    return url_for(BACK[name.partition(".")[0]], **values)


@blueprint.get("/actions/<name>/preview")
@blueprint.get("/actions/<name>")
@gate.page
def nothing(name: str) -> Answer:
    """A page that was loaded again after the login: nothing is done by looking."""
    return redirect(url_for(BACK.get(name.partition(".")[0], "pages.index")))
