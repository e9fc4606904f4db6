"""The console as JSON, for programs with a token: the same lists and actions, below /api/v1/console/."""

from __future__ import annotations

from typing import Any, Final

from flask import Blueprint, Response, abort, g, jsonify, request

from webhook_api.console import Filter
from webhook_api.web import deeds, download, gate, lists, openapi, overview
from webhook_api.web.files import Stored, stored
from webhook_api.web.words import Words

PREFIX: Final = openapi.PREFIX

blueprint = Blueprint("api", __name__, url_prefix=PREFIX)


@blueprint.before_request
def _who() -> None:
    if request.endpoint != "api.document":
        g.who = gate.bearer()
        # Programs read English, and times in UTC.
        g.words = Words("en", "UTC")


@blueprint.get("/openapi.json")
def document() -> Response:
    """What this API is."""
    return jsonify(openapi.document(gate.services().settings.version))


@blueprint.get("/overview")
def show_overview() -> Response:
    """Whether it is well, and the numbers."""
    services = gate.services()
    with services.read() as connection:
        found = overview.gather(services, connection)
    return jsonify(
        level=found["level"],
        findings=[
            {"level": item.level, "what": item.key.partition(".")[2], **item.values}
            for item in found["findings"]
        ],
        inbox=found["inbox"].count,
        oldest_seconds=found["inbox"].oldest,
        last_delivery_at=_plain(found["last"]),
        last_24_hours=found["recent"],
        hours=[_plain(hour) for hour in found["hours"]],
        instances=[
            {"name": item.name, "status": item.status, "troubles": item.troubles}
            for item in found["instances"]
        ],
        keys_age_seconds=found["keys_age"],
        spool_rows=found["spool"],
        certificate_ends_at=_plain(found["certificate"]),
        running=_plain(found["running"]),
    )


@blueprint.get("/deliveries")
def show_deliveries() -> Response:
    """Deliveries by filter."""
    return _page("true")


@blueprint.get("/dead-letters")
def show_dead_letters() -> Response:
    """What was given up or kept aside."""
    return _page(lists.QUEUES["dead-letters"])


@blueprint.get("/parked")
def show_parked() -> Response:
    """What waits for the bot's row."""
    return _page(lists.QUEUES["parked"])


def _page(extra: str) -> Response:
    wanted = _filter(request.args.to_dict())
    try:
        where = {name: lists.key_of(request.args.get(name)) for name in ("after", "before")}
        limit = lists.key_of(request.args.get("limit")) or lists.PAGE
    except lists.FilterInvalid:
        abort(400, "filter")
    with gate.services().read() as connection:
        page = lists.page(connection, wanted, extra=extra, limit=min(limit, lists.MOST), **where)
    return jsonify(
        deliveries=[_plain(row) for row in page.rows], after=page.older, before=page.newer, looked_to=_plain(page.reached)
    )  # fmt: skip


@blueprint.get("/deliveries/<int:identifier>")
def show_delivery(identifier: int) -> Response:
    """One delivery; headers and body for operators."""
    with gate.services().read() as connection:
        row = lists.delivery(connection, identifier, bodies=g.who.operator) if identifier < 2**63 else None
    if row is None:
        abort(404)
    if g.who.operator and row.get("headers") is not None:
        row["headers"] = lists.kept_headers(row)
    answer = {**row, "avatar_id": lists.avatar_id(row), "objects": [item.key for item in stored(row)]}
    if g.who.operator:
        answer["files"] = [_file(identifier, item) for item in stored(row)]
    return jsonify(_plain(answer))


def _file(identifier: int, item: Stored) -> dict[str, Any]:
    path = f"{PREFIX}/deliveries/{identifier}/files/{item.mark}"
    return {"name": item.name, "key": item.key, "bytes": item.size, "sha256": item.sha256, "path": path}


@blueprint.get("/deliveries/<int:identifier>/files/<mark>")
def show_file(identifier: int, mark: str) -> Response:
    """A file of a delivery, for operators."""
    if not g.who.operator:
        abort(403, "operators")
    return download.send(identifier, mark)


@blueprint.get("/avatars")
def show_avatars() -> Response:
    """Avatars in training."""
    with gate.services().read() as connection:
        found = lists.avatars(connection)
    return jsonify(avatars=None if found is None else [_plain(row) for row in found])


@blueprint.get("/deployments")
def show_deployments() -> Response:
    """Deployment records."""
    try:
        with gate.services().read() as connection:
            page = lists.runs(connection, request.args.get("after"), request.args.get("host"))
    except lists.FilterInvalid:
        abort(400, "filter")
    return jsonify(deployments=[_plain(row) for row in page.rows], after=page.after, host=page.host)


@blueprint.post("/actions/<name>")
def act(name: str) -> Response:
    """Do something to what a filter matches. Nothing happens with ``dry_run``, which is true unless it is said otherwise."""
    if not g.who.operator:
        abort(403, "operators")
    if name not in deeds.NAMES:
        abort(404)
    given = request.get_json(silent=True)
    if not isinstance(given, dict) or not set(given) <= {"filter", "ids", "all", "limit", "dry_run", "why"}:
        abort(400, "bad_request")
    wanted, limit = _aimed(given), given.get("limit", deeds.MOST)
    if type(limit) is not int or not 1 <= limit <= deeds.MOST:
        abort(400, "bad_request")
    dry_run, everything = given.get("dry_run", True), given.get("all", False)
    if type(dry_run) is not bool or type(everything) is not bool:
        abort(400, "bad_request")
    if wanted.empty and not (dry_run or everything):
        abort(400, "empty_filter")
    why = given.get("why")
    if why is not None and not (
        isinstance(why, str) and 0 < len(why) <= deeds.WHY_MOST and why.isprintable()
    ):
        abort(400, "bad_request")
    services, deed = gate.services(), deeds.action(name, wanted, why)
    with services.read() as connection:
        found = deeds.preview(connection, deed, wanted)
    answer = {key: found[key] for key in ("action", "matched", "states", "left_out", "partial")} | {
        "changed": 0
    }
    if not dry_run:
        with services.write() as connection:
            done = deeds.do(connection, deed, wanted, limit, g.who, services.settings.instance_id)
        answer |= {"changed": done.changed, "outcomes": done.outcomes, "delivery_ids": done.ids,
                   "operation": done.operation if done.changed else None}  # fmt: skip
    return jsonify(answer)


def _aimed(given: dict[str, Any]) -> Filter:
    ids, fields = given.get("ids"), given.get("filter")
    if (ids is None) == (fields is None):
        abort(400, "bad_request")
    if ids is not None:
        good = isinstance(ids, list) and 0 < len(ids) <= deeds.MOST
        if not good or not all(type(number) is int and 0 < number < 2**63 for number in ids):
            abort(400, "bad_request")
        return Filter(ids=tuple(ids))
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        abort(400, "bad_request")
    return _filter(fields)


def _filter(fields: dict[str, str]) -> Filter:
    unknown = set(fields) - {*lists.FIELDS, "after", "before", "limit"}
    try:
        if unknown:
            raise lists.FilterInvalid(sorted(unknown)[0])
        return lists.read_filter(lists.values_of(fields), g.words.zone, bodies=g.who.operator)
    except lists.FilterInvalid:
        abort(400, "filter")


def _plain(value: Any) -> Any:
    """Times as RFC 3339, whatever they stand in."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value) if type(value).__name__ == "UUID" else value
