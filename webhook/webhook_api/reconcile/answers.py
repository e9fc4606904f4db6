"""What fal's queue answers, and the delivery that it becomes. Pure.

The queue knows IN_QUEUE, IN_PROGRESS and COMPLETED, and no FAILED: a failed job polls as COMPLETED, and its result is
what the model answered, with the model's HTTP status. So only both answers together say how a job ended.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final

from webhook_api.bodies import BodyError, dedup_key, identity, parse, training_type
from webhook_api.inbox import Delivery

SOURCE: Final = "reconcile"
MAX_DETAIL: Final = 500
"""Characters of an explanation that are kept."""
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~-]{1,255}")
"""What can stand in an address of the queue. fal's ids are UUIDs."""
RUNNING: Final = frozenset({"IN_QUEUE", "IN_PROGRESS"})
ENDED: Final = frozenset({"COMPLETED", "FAILED", "CANCELED", "CANCELLED"})
"""Only the first is documented. The others are taken as the same: the result says what came of it."""


class Kind(enum.StrEnum):
    """What an answer says."""

    RESULT = "result"
    """The job succeeded; the answer holds the delivery's body."""
    FAILED = "failed"
    """The job failed; the answer holds the delivery's body."""
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    NOT_FOUND = "not_found"
    """fal does not know the request: it has expired, or the model is not the one it was submitted to."""
    UNUSABLE = "unusable"
    """An answer that no delivery can be made of."""
    FORBIDDEN = "forbidden"
    KEY_REFUSED = "key_refused"
    THROTTLED = "throttled"
    UNAVAILABLE = "unavailable"
    """fal, or the way to it, is in trouble: it says nothing about the request."""


NOTHING_LEARNED: Final = frozenset({Kind.FORBIDDEN, Kind.KEY_REFUSED, Kind.THROTTLED, Kind.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP answer. Header names in lower case."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was learned of one request."""

    kind: Kind
    detail: str = ""
    url: str = ""
    http_status: int | None = None
    body: bytes | None = field(default=None, repr=False)
    """The delivery's, in fal's form."""
    retry_after: float | None = None
    """Seconds that fal asks us to wait."""


def of_status(response: Response) -> Answer | Mapping[str, Any]:
    """What the answer to "how is it?" says. The document when the job has ended, and its result is to be fetched."""
    fault = _fault(response)
    if fault is not None:
        return fault
    if response.status >= 400:
        return _answer(Kind.UNUSABLE, response, _explanation(response))
    document = _document(response.body)
    status = document.get("status") if isinstance(document, Mapping) else None
    if status == "IN_QUEUE":
        return _answer(Kind.QUEUED, response, f"position {document.get('queue_position')}")
    if status == "IN_PROGRESS":
        return _answer(Kind.IN_PROGRESS, response, "")
    if status in ENDED:
        return dict(document)
    return _answer(Kind.UNAVAILABLE, response, f"a status that is not known: {json.dumps(status)[:60]}")


def of_result(request_id: str, ended: Mapping[str, Any], response: Response) -> Answer:
    """What the result of a job says that has ended; ``ended`` is the document of its status."""
    if 200 <= response.status < 300:
        return _succeeded(request_id, response)
    # A model may answer 404 or 503 itself. fal says so in the status, or names the kind of its own failures.
    failed = bool(ended.get("error") or ended.get("error_type") or response.headers.get("x-fal-error-type"))
    if not failed:
        fault = _fault(response)
        if fault is not None:
            return fault
    return _failed(request_id, ended, response)


def delivery(request_id: str, answer: Answer, asked_at: str, kind: str | None) -> Delivery:
    """The delivery that an answer becomes. Asking again gives the same identity, so it is stored once."""
    assert answer.body is not None  # noqa: S101  (results and failures have one)
    event = parse(answer.body)
    return Delivery(
        source=SOURCE,
        request_id=request_id,
        dedup_key=dedup_key(event.status, identity(answer.body)),
        status=event.status,
        body=answer.body,
        body_sha256=hashlib.sha256(answer.body).hexdigest(),
        gateway_request_id=event.gateway_request_id,
        training_type_hint=training_type(kind),
        headers={
            "x-reconcile-url": answer.url,
            "x-reconcile-asked-at": asked_at,
            "x-reconcile-http-status": str(answer.http_status),
        },
    )


def _succeeded(request_id: str, response: Response) -> Answer:
    raw = response.body.strip()
    if not _is_json(raw):
        return _answer(Kind.UNUSABLE, response, "the result is no JSON")
    if raw == b"null":
        return _answer(Kind.UNUSABLE, response, "the result is null")
    # The result's own bytes: a number that was read and written again may be another one.
    return _readable(Kind.RESULT, response, _body(request_id, "OK", b'"payload":' + raw))


def _failed(request_id: str, ended: Mapping[str, Any], response: Response) -> Answer:
    raw = response.body.strip()
    if not raw.startswith(b"{") or not _is_json(raw):
        said = str(ended.get("error") or _explanation(response))
        raw = json.dumps({"detail": said[:MAX_DETAIL]}).encode()
    error = json.dumps(f"Invalid status code: {response.status}").encode()
    return _readable(
        Kind.FAILED, response, _body(request_id, "ERROR", b'"error":' + error + b',"payload":' + raw)
    )


def _readable(kind: Kind, response: Response, body: bytes) -> Answer:
    """The answer, unless the worker could not read its body (too deep, too many items)."""
    try:
        parse(body)
    except BodyError as error:
        return _answer(Kind.UNUSABLE, response, f"the result cannot be read ({error.reason})")
    return Answer(kind, "", response.url, response.status, body)


def _body(request_id: str, status: str, rest: bytes) -> bytes:
    name = json.dumps(request_id).encode()
    return (
        b'{"request_id":'
        + name
        + b',"gateway_request_id":'
        + name
        + b',"status":"%b",%b}'
        % (
            status.encode(),
            rest,
        )
    )


def _fault(response: Response) -> Answer | None:
    """An answer that says nothing of the job."""
    if response.status == 401:
        return _answer(Kind.KEY_REFUSED, response, _explanation(response))
    if response.status == 403:
        return _answer(Kind.FORBIDDEN, response, _explanation(response))
    if response.status in (404, 410):
        return _answer(Kind.NOT_FOUND, response, _explanation(response))
    if response.status in (408, 425, 429):
        return _answer(Kind.THROTTLED, response, _explanation(response), _retry_after(response))
    if response.status >= 500 or 300 <= response.status < 400 or response.status < 200:
        return _answer(Kind.UNAVAILABLE, response, _explanation(response), _retry_after(response))
    return None


def _answer(kind: Kind, response: Response, detail: str, retry_after: float | None = None) -> Answer:
    return Answer(kind, detail, response.url, response.status, None, retry_after)


def _explanation(response: Response) -> str:
    document = _document(response.body)
    said = document.get("detail") if isinstance(document, Mapping) else None
    text = said if isinstance(said, str) else json.dumps(said) if said is not None else ""
    printable = "".join(each if each.isprintable() else " " for each in text)
    return f"{response.status} {printable}".strip()[:MAX_DETAIL]


def _retry_after(response: Response) -> float | None:
    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,6}", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        sent = parsedate_to_datetime(response.headers.get("date", ""))
        return max(0.0, (until - sent).total_seconds())
    except (TypeError, ValueError):
        return None


def _document(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _is_json(raw: bytes) -> bool:
    """Whether the bytes are one JSON value; numbers of any length are (no int() of them)."""
    try:
        json.loads(raw.decode("utf-8"), parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return False
    return True
