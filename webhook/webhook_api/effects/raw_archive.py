"""The delivery as it arrived, kept in the object store: enough to verify it again and to process it again.

A segment is an object of one or many deliveries, each one line of JSON (NDJSON). The effect's record names the segment
and where in it the delivery stands: `{"key", "offset", "length", "sha256"}`, bytes and digest of its own line, so that
a ranged read fetches it alone and proves it whole. A delivery that was archived alone is a segment of one under a key
that names it; a probe always is, so that its removal takes nothing else away. Decision 0430.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import UTC
from typing import Any, Final

from webhook_api.effects.archive import safe_segment
from webhook_api.effects.base import Delivery, Job, Outcome, Result
from webhook_api.outlets import ObjectStore
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "raw_archive"
FORMAT: Final = 1
_ONE: Final = "application/json"
_MANY: Final = "application/x-ndjson"

log = logging.getLogger(__name__)


def key(delivery: Delivery) -> str:
    """Where a delivery stands in the bucket when its segment holds nothing else."""
    return f"deliveries/{delivery.source}/{safe_segment(delivery.request_id)}/{delivery.id}.json"


def segment_key(deliveries: Sequence[Delivery], digest: str) -> str:
    """Where a segment of many stands. The same deliveries always give the same key."""
    first, last = deliveries[0], deliveries[-1]
    day = first.first_seen_at.astimezone(UTC).date().isoformat()
    return f"deliveries/segments/{day}/{first.id}-{last.id}-{digest[:16]}.ndjson"


def document(delivery: Delivery) -> dict[str, Any]:
    """What is kept. The same for every attempt: writing it again changes nothing.

    The signed message can be rebuilt from `headers` and the body's bytes (fal.ai's contract); `headers` holds no
    secret, because intake never stores one.
    """
    return {
        "format": FORMAT,
        "delivery_id": delivery.id,
        "source": delivery.source,
        "request_id": delivery.request_id,
        "gateway_request_id": delivery.gateway_request_id,
        "status": delivery.status,
        "dedup_key": delivery.dedup_key,
        "training_type_hint": delivery.training_type_hint,
        "account_id": delivery.account_id,
        "edge_request_id": delivery.edge_request_id,
        "probe": delivery.probe,
        "received_at": delivery.first_seen_at.isoformat(),
        "headers": delivery.headers,
        "body_sha256": delivery.body_sha256,
        "body_base64": base64.b64encode(delivery.body).decode("ascii"),
    }


def line(delivery: Delivery) -> bytes:
    """The delivery's line of a segment, with its newline."""
    return json.dumps(document(delivery), sort_keys=True).encode() + b"\n"


def run(job: Job) -> Outcome:
    """Store the delivery as a segment of one."""
    return _store_one(job.delivery, job.tools.store)


def run_many(jobs: Sequence[Job]) -> dict[int, Result]:
    """Store many deliveries as one segment. An outage of the store is raised as `EffectError`."""
    results: dict[int, Result] = {}
    together = [job.delivery for job in jobs if not job.delivery.probe]
    alone = [job.delivery for job in jobs if job.delivery.probe]
    if len(together) == 1:
        together, alone = [], alone + together
    store = jobs[0].tools.store
    try:
        for delivery in alone:
            results[delivery.id] = _store_one(delivery, store)
        if together:
            results |= _store_many(together, store)
    except EffectError as error:
        # An object that is refused for itself is tried again as objects of one: only the bad one is left then.
        if error.kind is Failure.OUTAGE:
            raise
        log.warning("segment_refused", extra={"deliveries": len(jobs), "error": str(error)[:300]})
    return results


def _store_one(delivery: Delivery, store: ObjectStore) -> Outcome:
    data = line(delivery)
    digest = hashlib.sha256(data).hexdigest()
    where = key(delivery)
    store.put(where, data, _ONE, {"sha256": digest})
    return Outcome(EffectState.DONE, _place(where, 0, data))


def _store_many(deliveries: Sequence[Delivery], store: ObjectStore) -> dict[int, Result]:
    ordered = sorted(deliveries, key=lambda delivery: delivery.id)
    lines = [line(delivery) for delivery in ordered]
    data = b"".join(lines)
    digest = hashlib.sha256(data).hexdigest()
    where = segment_key(ordered, digest)
    store.put(where, data, _MANY, {"sha256": digest})
    results: dict[int, Result] = {}
    offset = 0
    for delivery, piece in zip(ordered, lines, strict=True):
        results[delivery.id] = Outcome(EffectState.DONE, _place(where, offset, piece))
        offset += len(piece)
    return results


def _place(where: str, offset: int, data: bytes) -> dict[str, Any]:
    return {"key": where, "offset": offset, "length": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def fetch(store: ObjectStore, detail: dict[str, Any]) -> dict[str, Any]:
    """Read an archived delivery back, by what its effect has recorded.

    Raises `EffectError`: of the store as it is, or `raw_archive_missing`, `raw_archive_damaged` (permanent) when the
    bytes are not there or are not those that were written. Records of older releases name no place: the object is
    the delivery.
    """
    data = store.read(detail["key"], int(detail.get("offset", 0)), detail.get("length"))
    if data is None:
        raise EffectError(Failure.PERMANENT, "raw_archive_missing", f"there is no object {detail['key']}")
    if hashlib.sha256(data).hexdigest() != detail["sha256"]:
        message = f"{detail['key']} does not hold the bytes that were written there"
        raise EffectError(Failure.PERMANENT, "raw_archive_damaged", message)
    found: dict[str, Any] = json.loads(data)
    return found
