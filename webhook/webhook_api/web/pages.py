"""The pages that show: Overview, Deliveries, Delivery, Dead letters, Parked, Avatars, Deployments, and the charts."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from flask import Blueprint, Response, abort, g, render_template, request, url_for
from psycopg import errors

from webhook_api.auth import AuthError
from webhook_api.cli import filters
from webhook_api.console import Filter
from webhook_api.reverify import Report, ReverifyError, Verifiers, check
from webhook_api.web import charts, gate, lists, overview
from webhook_api.web.files import stored
from webhook_api.web.words import lines

CHART_SECONDS: Final = 30
ASIDES: Final = ("any", "stale", "future", "account", "malformed")
"""Why a delivery is kept aside, as the filter offers it."""

blueprint = Blueprint("pages", __name__)


def asked(given: Any = None) -> tuple[Filter, dict[str, str], str]:
    """The filter of this request, its fields, and the field that cannot be used (the filter takes nothing then)."""
    try:
        values = lists.values_of(request.values if given is None else given)
    except lists.FilterInvalid as error:
        return lists.only(0), {}, error.field
    if values.get("text") and not {"since", "request_id"} & set(values):
        # Said in the form as well: who finds nothing must see where it was looked for.
        values["since"] = f"{lists.TEXT_WITHIN.seconds // 3600}h"
    try:
        return lists.read_filter(values, g.words.zone, bodies=g.who.operator), values, ""
    except lists.FilterInvalid as error:
        return lists.only(0), values, error.field


def where() -> dict[str, Any]:
    """Where the page begins."""
    try:
        return {name: lists.key_of(request.args.get(name)) for name in ("after", "before")}
    except lists.FilterInvalid:
        abort(400, "filter")


def links(endpoint: str, values: dict[str, Any], page: lists.Page) -> dict[str, Any]:
    """Addresses of the pages beside this one; they stay what they are when deliveries arrive.

    ``reached``: how far it was looked, where the page is not full because of that.
    """

    def to(**key: Any) -> str:
        return url_for(endpoint, **values, **key)

    return {
        "older": to(after=page.older) if page.older is not None else None,
        "newer": to(before=page.newer) if page.newer is not None else None,
        "first": to() if request.args.get("after") or request.args.get("before") else None,
        "reached": page.reached,
        "looked": page.looked,
    }


@blueprint.get("/")
@gate.page
def index() -> str:
    """Overview."""
    services = gate.services()
    with services.read() as connection:
        found = overview.gather(services, connection)
    return render_template("overview.html", at="overview", **found)


@blueprint.get("/deliveries")
@gate.page
def deliveries() -> tuple[str, int]:
    """Deliveries by filter, the newest first."""
    wanted, values, fault = asked()
    with gate.services().read() as connection:
        page = lists.page(connection, wanted, **where()) if not fault else lists.Page([], None, None)
    shown = {
        "rows": page.rows,
        "links": links("pages.deliveries", values, page),
        "values": values,
        "fault": fault,
    }
    return render_template(
        "deliveries.html", at="deliveries", states=filters.STATES, statuses=filters.STATUSES, **shown
    ), 400 if fault else 200


@blueprint.get("/dead-letters")
@gate.page
def dead_letters() -> tuple[str, int]:
    """What was given up or kept aside."""
    return _queue("dead-letters", "pages.dead_letters")


@blueprint.get("/parked")
@gate.page
def parked() -> tuple[str, int]:
    """What waits for the bot's row."""
    return _queue("parked", "pages.parked")


def _queue(name: str, endpoint: str) -> tuple[str, int]:
    wanted, values, fault = asked()
    nothing = lists.Page([], None, None)
    with gate.services().read() as connection:
        page = nothing if fault else lists.queue(connection, name, wanted, **where())
    return render_template(
        "queue.html", at=name, queue=name, rows=page.rows, links=links(endpoint, values, page), values=values, fault=fault,
        statuses=filters.STATUSES, asides=ASIDES,
    ), 400 if fault else 200  # fmt: skip


@blueprint.get("/deliveries/<int:identifier>")
@gate.page
def delivery(identifier: int) -> str:
    """One delivery with all that is known of it."""
    operator = g.who.operator
    with gate.services().read() as connection:
        row = lists.delivery(connection, identifier, bodies=operator) if identifier < 2**63 else None
    if row is None:
        abort(404)
    body = lists.body_of(row) if operator else None
    services = gate.services()
    return render_template(
        "delivery.html", at="deliveries", row=row, steps=lists.timeline(row), avatar=lists.avatar_id(row),
        files=stored(row), bucket=services.settings.minio_bucket, gives=operator and services.files is not None,
        verdict=_verdict(row) if operator else None, **_content(row, body),
    )  # fmt: skip


def _content(row: dict[str, Any], body: bytes | None) -> dict[str, Any]:
    if body is None:
        return {"headers": None, "raw": None, "pretty": None, "curl": None, "cut": False}
    text = lists.pretty(body)
    return {
        "headers": lists.kept_headers(row),
        "raw": lines(body[: lists.BODY_MOST].decode("utf-8", "backslashreplace")),
        "pretty": lines(text) if text is not None else None,
        "curl": lists.curl(row, body) if len(body) <= lists.BODY_MOST else None,
        "cut": len(body) > lists.BODY_MOST,
    }


def _verdict(row: dict[str, Any]) -> dict[str, Any]:
    """What the signature is worth: ``{"key", "report"}``. Proven with the keys that the instances have left here."""
    if row.get("body_base64") is None:
        return {"key": "verdict.pruned", "report": None}
    document = {**row, "delivery_id": row["id"], "received_at": row["first_seen_at"].isoformat()}
    try:
        report = check(document, Verifiers(gate.services().keys()), "database")
    except ReverifyError:
        return {"key": "verdict.other", "report": None}
    except AuthError:
        return {"key": "verdict.no_keys", "report": None}
    return {"key": _verdict_key(report), "report": report}


def _verdict_key(report: Report) -> str:
    if report.signature is None:
        return "verdict.unsigned" if report.valid else "verdict.bytes"
    if report.valid:
        return "verdict.valid"
    return "verdict.bytes" if not report.sha256 else "verdict.invalid"


@blueprint.get("/avatars")
@gate.page
def avatars() -> str:
    """What trains, how long, and what it waits for."""
    with gate.services().read() as connection:
        try:
            found, fault = lists.avatars(connection), "avatars.unreadable"
        except errors.QueryCanceled:
            # The table is the bot's: its indexes are not ours to make.
            found, fault = None, "avatars.slow"
    return render_template("avatars.html", at="avatars", rows=found, fault=fault)


@blueprint.get("/deployments")
@gate.page
def deployments() -> str:
    """Deployment records."""
    after, host = request.args.get("after"), request.args.get("host")
    try:
        with gate.services().read() as connection:
            page = lists.runs(connection, after, host)
    except lists.FilterInvalid:
        abort(400, "filter")
    older = url_for("pages.deployments", after=page.after, host=page.host) if page.after else None
    shown = {"older": older, "newer": None, "first": url_for("pages.deployments") if after else None}
    return render_template("deployments.html", at="deployments", rows=page.rows, links=shown)


@blueprint.get("/charts/<name>-<theme>.svg")
@gate.page
def chart(name: str, theme: str) -> Response:
    """A chart of the last 24 hours."""
    if name not in charts.NAMES or theme not in charts.THEMES:
        abort(404)
    with gate.services().read() as connection:
        hours = lists.by_hour(lists.rollups(connection), datetime.now(UTC))
    small = request.args.get("small") == "1"
    response = Response(charts.draw(name, theme, hours, g.words, small=small), mimetype="image/svg+xml")
    response.headers["Content-Security-Policy"] = gate.CHART_CSP
    response.headers["Cache-Control"] = f"private, max-age={CHART_SECONDS}"
    return response
