"""The delivery, handed on to a server of one's own choice with our signature (Standard Webhooks).

Every delivery that was processed is one POST of a JSON document; its id is the same however often it is tried, so the
receiver can tell a repetition. It goes after the avatar, the files and the stream, and nothing waits for it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Any, Final

from webhook_api.auth.standard import message as signed_message
from webhook_api.effects import avatar
from webhook_api.effects.base import Delivery, Job, Outcome, Result, Tools
from webhook_api.outbound import Answer, Outbound
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "forward"
FORMAT: Final = 1
_UNLIKE_THE_BYTES: Final = frozenset(
    {"not_a_number", "huge_number", "control_text", "duplicate_key", "invalid_field"}
)
"""Oddities of a body that a parsed copy of it would hide: the bytes are handed on instead."""
_OURS_AND_TIME: Final = frozenset({408, 425, 429})


def message_id(delivery: Delivery, replay: int = 0) -> str:
    """The same for every attempt. Not the row's id: a database that was made anew gives old ids again.

    `replay`: how often an operator has asked for it again; each time it is another message, or it would be ignored.
    """
    identity: tuple[object, ...] = (
        delivery.source, delivery.request_id, delivery.dedup_key, delivery.first_seen_at.timestamp()
    )  # fmt: skip
    identity += (replay,) if replay else ()
    return f"msg_{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}"


def document(job: Job) -> dict[str, Any]:
    """What is sent. `type` and `timestamp` as Standard Webhooks recommends; times are RFC 3339 in UTC."""
    delivery, event = job.delivery, job.event
    row = job.detail(avatar.NAME)
    data: dict[str, Any] = {
        "format": FORMAT,
        "delivery_id": delivery.id,
        "source": delivery.source,
        "request_id": delivery.request_id,
        "gateway_request_id": delivery.gateway_request_id,
        "status": delivery.status,
        "avatar_id": row.get("avatar_id"),
        "avatar_status": row.get("after"),
        "training_type": row.get("training_type") or (event.hints.training_type if event else None),
        "error": event.error if event else job.unreadable,
        "files": [
            {name: entry[name] for name in ("place", "key", "state", "size", "sha256") if name in entry}
            for entry in job.detail("archive").get("artifacts", ())
        ],
        "body_sha256": delivery.body_sha256,
    }
    original = _original(job)
    if original is None:
        data["original_base64"] = base64.b64encode(delivery.body).decode("ascii")
    else:
        data["original"] = original
    return {
        "type": f"delivery.{delivery.status}",
        "timestamp": delivery.first_seen_at.astimezone(UTC).isoformat(timespec="milliseconds"),
        "data": data,
    }


def _original(job: Job) -> Any | None:
    """The body as a document; None when it is not strict JSON, or a copy would say something else than the bytes."""
    if job.event is None or job.event.anomalies & _UNLIKE_THE_BYTES:
        return None
    try:
        return json.loads(job.delivery.body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> None:
    raise ValueError(name)


def many(jobs: Sequence[Job]) -> dict[int, Result]:
    """What needs no call, or gets none now. The others are to be run alone."""
    found = {job.delivery.id: _at_once(job) for job in jobs}
    return {identifier: result for identifier, result in found.items() if result is not None}


def _at_once(job: Job) -> Result | None:
    outlet = job.tools.forward
    try:
        known = quick(job)
        if known is not None or outlet is None:
            return known
        _after_the_avatar(job)
        outlet.admit(job)
    except EffectError as error:
        return error
    return None


def run(job: Job) -> Outcome:
    """POST the document, and be content with any 2xx."""
    known = quick(job)
    if known is not None:
        return known
    outlet = job.tools.forward
    assert outlet is not None  # noqa: S101  (for the type checker; see `wanted`)
    _after_the_avatar(job)
    body = json.dumps(document(job), separators=(",", ":"), allow_nan=False).encode()
    identifier = message_id(job.delivery, int(job.detail(NAME).get("replay") or 0))
    answer = outlet.send(identifier, body, job)
    if not answer.good:
        raise refusal(answer, outlet.place)
    return Outcome(EffectState.DONE, {"message_id": identifier, "status": answer.status, "size": len(body)})


def _after_the_avatar(job: Job) -> None:
    record = job.records.get(avatar.NAME)
    if record is not None and not record.final:
        raise EffectError(Failure.WAITING, "avatar_pending", "the avatar comes first")


def refusal(answer: Answer, place: str) -> EffectError:
    """What an answer other than 2xx means: theirs for good, or a moment of weakness."""
    status = answer.status
    if status >= 500 or status in _OURS_AND_TIME:
        return EffectError(
            Failure.UNREACHABLE,
            f"forward_http_{status}",
            f"{place} answered {status}",
            wait=answer.retry_after or 0.0,
        )
    said = {
        410: ", which means that it wants no more: take FORWARD_URL away or give the new one",
        401: ": it does not accept the signature; do both sides hold the same FORWARD_SECRET?",
    }.get(status, " (redirects are not followed)" if 300 <= status < 400 else "")
    return EffectError(Failure.THEIRS, f"forward_http_{status}", f"{place} answered {status}{said}")


def quick(job: Job) -> Outcome | None:
    """What needs no request."""
    if job.delivery.probe:
        return Outcome.skipped("a probe")
    return None


def wanted(tools: Tools) -> bool:
    """Whether the settings ask for it."""
    return tools.forward is not None


def signature(key: bytes, identifier: str, timestamp: int, body: bytes) -> str:
    """One `v1` signature of Standard Webhooks: HMAC-SHA256 over id, time and body, in base64."""
    digest = hmac.digest(key, signed_message(identifier, timestamp, body), "sha256")
    return f"v1,{base64.b64encode(digest).decode('ascii')}"


class ForwardOutlet:
    """Where deliveries are handed on to, and the keys that they are signed with."""

    def __init__(self, outbound: Outbound, keys: Sequence[bytes]) -> None:
        self._outbound = outbound
        self._keys = tuple(keys)

    @property
    def place(self) -> str:
        """Scheme, host and port: what may be shown."""
        return str(self._outbound.place)

    def admit(self, job: Job) -> None:
        """Raise `EffectError` when no call would be made for it now."""
        self._outbound.admit(job.delivery.id)

    def send(self, identifier: str, body: bytes, job: Job) -> Answer:
        """POST `body`, signed now. Raises `EffectError`."""
        return self.post(identifier, body, job.stop, job.delivery.id)

    def post(
        self, identifier: str, body: bytes, stop: Callable[[], bool], delivery_id: int | None = None
    ) -> Answer:
        """The same for what is no delivery's own."""
        timestamp = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "aisha-webhook-forward/1",
            "webhook-id": identifier,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": " ".join(signature(key, identifier, timestamp, body) for key in self._keys),
        }
        return self._outbound.post(self._outbound.place.path, body, headers, stop, delivery_id)
