"""The OpenAPI 3.1 document of the console's API, served beside it: the intake's own document says what the intake serves."""

from __future__ import annotations

from typing import Any, Final

from webhook_api.cli.filters import STATES, STATUSES

PREFIX: Final = "/api/v1/console"
ACTIONS: Final = (
    "dead-letters.replay",
    "dead-letters.discard",
    "parked.retry",
    "parked.discard",
    "events.replay",
)
_TEXT: Final = {"type": ["string", "null"]}
_TIME: Final = {"type": ["string", "null"], "format": "date-time"}
_OBJECT: Final = {"type": "object"}
_NUMBER: Final = {"type": ["integer", "null"]}


def document(version: str) -> dict[str, Any]:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Console of the receiver of fal.ai webhooks",
            "version": version,
            "summary": "Lists and actions for programs, by a token of `webhook-api tokens add`.",
            "description": "Viewers see no bodies, headers or files, cannot look for text, and change nothing. A list goes "
            "on while `after` is given, also after a page with few deliveries or none: each page looks through a bounded "
            "number of them, down to `looked_to`. `matched` ends at 10,000; `partial`: only the oldest were looked through.",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": {f"{PREFIX}{path}": operations for path, operations in _paths().items()},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths() -> dict[str, Any]:
    number = {
        "name": "identifier",
        "in": "path",
        "required": True,
        "schema": {"type": "integer", "minimum": 0},
    }
    mark = {"name": "mark", "in": "path", "required": True, "schema": {"type": "string"}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": list(ACTIONS)}}
    return {
        "/openapi.json": {"get": _get("consoleDocument", "This document", _OBJECT) | {"security": []}},
        "/overview": {"get": _get("overview", "Whether it is well, and the numbers", _ref("Overview"))},
        "/deliveries": {"get": _list("deliveries", "Deliveries by filter, the newest first")},
        "/deliveries/{identifier}": {"get": _get("delivery", "One delivery in full", _ref("Delivery"), [number], "404")},
        "/deliveries/{identifier}/files/{mark}": {"get": _file([number, mark])},
        "/dead-letters": {"get": _list("deadLetters", "What was given up or kept aside")},
        "/parked": {"get": _list("parked", "What waits for the bot's row")},
        "/avatars": {"get": _get("avatars", "Avatars in training, and what each waits for", _ref("Avatars"))},
        "/deployments": {"get": _get("deployments", "Deployment records, the newest first", _ref("Deployments"),
                                     [{"name": key, "in": "query", "required": False, "schema": {"type": "string"}}
                                      for key in ("after", "host")], "400")},
        "/actions/{name}": {"post": _get("act", "Replay, retry or discard what matches; a preview unless dry_run is false",
                                         _ref("Done"), [name], "400", "403", "404") | {
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref("Act")}}}}},
    }  # fmt: skip


def _get(
    name: str,
    summary: str,
    schema: dict[str, Any],
    parameters: list[dict[str, Any]] | None = None,
    *errors: str,
) -> dict[str, Any]:
    refused = {"application/json": {"schema": _ref("Error")}}
    answers = {"200": {"description": "As it is now", "content": {"application/json": {"schema": schema}}}}
    for status in ("401", "503", *errors):
        answers[status] = {"description": "Refused; `error` is one word", "content": refused}
    return {"operationId": name, "summary": summary, "parameters": parameters or [], "responses": answers}


def _file(parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, and no form of ours."""
    made = _get(
        "file",
        "A file of a delivery, for operators; recorded",
        _OBJECT,
        parameters,
        "403",
        "404",
        "413",
        "502",
    )
    content = {
        "application/octet-stream": {
            "schema": {"type": "string", "contentMediaType": "application/octet-stream"}
        }
    }
    made["responses"]["200"] = {
        "description": "The bytes that were stored; cut off when they differ",
        "content": content,
    }
    return made


def _list(name: str, summary: str) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "since": {"type": "string"}, "until": {"type": "string"}, "source": {"type": "string"},
        "status": {"enum": list(STATUSES)}, "state": {"enum": list(STATES)}, "request_id": {"type": "string"},
        "avatar_id": {"type": "string"}, "text": {"type": "string"}, "reason": {"type": "string"},
        "aside": {"type": "string"}, "after": {"type": "integer"}, "before": {"type": "integer"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 200},
    }  # fmt: skip
    given = [
        {"name": field, "in": "query", "required": False, "schema": schema}
        for field, schema in fields.items()
    ]
    return _get(name, summary, _ref("Page"), given, "400")


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | optional}


def _schemas() -> dict[str, Any]:
    text, counts = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "integer"}}
    row = {
        "id": {"type": "integer"}, "source": text, "request_id": text, "status": {"enum": list(STATUSES)},
        "state": {"enum": list(STATES)}, "first_seen_at": text, "last_seen_at": text, "attempts": {"type": "integer"},
        "tries": {"type": "integer"}, "last_error": _TEXT, "aside": _TEXT, "done_at": _TIME, "discarded_at": _TIME,
    }  # fmt: skip
    return {
        "Error": _object({"error": text, "message": text, "request_id": text}),
        "Row": _object(row),
        "Page": _object({"deliveries": {"type": "array", "items": _ref("Row")}, "after": _NUMBER, "before": _NUMBER},
                        looked_to=_TIME),
        "Delivery": _object(
            row | {"effects": {"type": "array", "items": _OBJECT}, "audit": {"type": "array", "items": _OBJECT},
                   "avatar_id": _TEXT, "objects": {"type": "array", "items": text}},
            headers={"type": ["object", "null"]}, body_base64=_TEXT, files={"type": "array", "items": _ref("File")},
        ),
        "File": _object({"name": text, "key": text, "bytes": _NUMBER, "sha256": _TEXT, "path": text}),
        "Overview": _object({"level": {"enum": ["ok", "warn", "bad"]}, "findings": {"type": "array", "items": _OBJECT},
                             "inbox": counts, "hours": {"type": "array", "items": _OBJECT}, "last_delivery_at": _TIME},
                            oldest_seconds={"type": "object", "additionalProperties": {"type": "number"}},
                            last_24_hours=_OBJECT, instances={"type": "array", "items": _OBJECT},
                            keys_age_seconds={"type": ["number", "null"]}, spool_rows={"type": ["number", "null"]},
                            certificate_ends_at=_TIME, running={"type": ["object", "null"]}),
        "Avatars": _object({"avatars": {"type": ["array", "null"], "items": _OBJECT}}),
        "Deployments": _object({"deployments": {"type": "array", "items": _OBJECT}, "after": _TEXT, "host": _TEXT}),
        "Act": _object({}, filter={"type": "object", "additionalProperties": text},
                       ids={"type": "array", "items": {"type": "integer"}}, dry_run={"type": "boolean", "default": True},
                       all={"type": "boolean", "default": False, "description": "Take everything when the filter is empty. "
                            "Without it an empty filter with `dry_run` false is refused (`empty_filter`)."},
                       limit={"type": "integer", "minimum": 1, "maximum": 1000}, why=text),
        "Done": _object({"action": text, "matched": {"type": "integer"}, "states": counts, "left_out": {"type": "integer"},
                         "changed": {"type": "integer"}}, partial={"type": "boolean"}, outcomes=counts, operation=_TEXT,
                        delivery_ids={"type": "array", "items": {"type": "integer"}}),
    }  # fmt: skip
