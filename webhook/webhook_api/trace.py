"""Follows a delivery to everything that it left: row, effects, stream entry, objects. And removes a probe again.

Each backend is asked on its own: one that is away is reported under `error`, and the others still answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg

from webhook_api.config import Settings
from webhook_api.db import Connection, connect
from webhook_api.outlets import ObjectStore, RedisOutlet, minio_client, redis_client
from webhook_api.states import EffectError

PROBE_PREFIX: Final = "probe-"
POLL_SECONDS: Final = 0.1
"""Pause between two looks while waiting."""
_SECONDS: Final = 5.0

_COLUMNS: Final = (
    "id", "source", "request_id", "dedup_key", "status", "gateway_request_id", "training_type_hint", "account_id",
    "body_sha256", "edge_request_id", "probe", "attempts", "first_seen_at", "last_seen_at", "state", "tries", "crashes",
    "next_attempt_at", "lease_owner", "lease_until", "last_error", "done_at",
)  # fmt: skip
_DELIVERIES: Final = """
select id, source, request_id, dedup_key, status, gateway_request_id, training_type_hint, account_id,
    body_sha256, edge_request_id, probe, attempts, first_seen_at, last_seen_at, state, tries, crashes,
    next_attempt_at, lease_owner, lease_until, last_error, done_at,
    octet_length(body), (select count(*) from webhook.delivery_variants v where v.delivery_id = d.id)
from webhook.deliveries d where request_id = %s order by id
"""
_EFFECTS: Final = """
select name, state, tries, detail, last_error, updated_at from webhook.effects where delivery_id = %s order by updated_at
"""


class TraceError(Exception):
    """Tracing or removing is not possible. `reason`: database_unavailable, not_a_probe, busy, backend_unavailable.

    `found` is what had been found when only the removal after it failed, else None.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.found: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Backends:
    """What is asked: connections that the caller opened."""

    connection: Connection
    redis: RedisOutlet
    store: ObjectStore


def trace(settings: Settings, request_id: str, wait: float = 0.0) -> dict[str, Any]:
    """All that is known of a request, ready for JSON; with `wait` (seconds) as soon as it is `settled`, or time is up.

    `{"request_id", "found", "deliveries": [{…row…, "effects": [...], "stream_entry": {...} or None,
    "objects": [{"key", "exists", "size", "sha256", …}]}]}`. `part` says where in a segment of many the delivery itself
    stands. Raises `TraceError` when PostgreSQL cannot be asked.
    """
    with _Opened(settings) as opened:
        return wait_settled(lambda: lookup(opened.backends(), request_id), wait)


def trace_and_remove(settings: Settings, request_id: str, wait: float = 0.0) -> dict[str, Any]:
    """What `trace` finds, then `remove` over the same connections: what was found before, plus "removed".

    A probe is removed also when time was up before it was settled. Refuses at once what is no probe's id. When the
    removal fails, the `TraceError` carries what was found.
    """
    _require_probe(request_id)
    with _Opened(settings) as opened:
        found = wait_settled(lambda: lookup(opened.backends(), request_id), wait)
        try:
            found["removed"] = remove_probe(opened.backends(), request_id)["removed"]
        except TraceError as error:
            error.found = found
            raise
        return found


def wait_settled(
    look: Callable[[], dict[str, Any]],
    wait: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Look until what is found is `settled`, for up to `wait` seconds; at least once. Returns the last look."""
    deadline = clock() + wait
    found = look()
    while not settled(found) and clock() + POLL_SECONDS <= deadline:
        sleep(POLL_SECONDS)
        found = look()
    return found


def settled(found: dict[str, Any]) -> bool:
    """Whether waiting is over: every delivery is dead, or done with all that its effects recorded in its place."""
    return bool(found["deliveries"]) and all(
        delivery["state"] == "dead" or (delivery["state"] == "done" and _in_place(delivery))
        for delivery in found["deliveries"]
    )


def _in_place(delivery: dict[str, Any]) -> bool:
    entry = delivery["stream_entry"]
    recorded = any(
        effect["name"] == "stream" and "entry" in (effect["detail"] or {}) for effect in delivery["effects"]
    )
    present = entry is not None and "error" not in entry
    return (present or not recorded) and all(item["exists"] for item in delivery["objects"])


def remove(settings: Settings, request_id: str) -> dict[str, Any]:
    """Remove all that a probe left, and say what: `{"request_id", "removed": {"deliveries", "entries", "objects"}}`.

    Refuses what isn't a probe, and what a worker holds just now. The rows go last, so that an interrupted removal
    can be repeated. Removing what is not there removes nothing, and is no error.
    """
    with _Opened(settings) as opened:
        return remove_probe(opened.backends(), request_id)


class _Opened:
    """Connections for one call."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        settings = self._settings
        try:
            self._connection = connect(settings.database_url, "webhook-trace", statement_timeout=_SECONDS)
        except psycopg.Error as error:
            raise TraceError("database_unavailable", f"PostgreSQL cannot be asked: {error}") from error
        self._redis = redis_client(settings)
        self._store = minio_client(settings)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._redis.close()

    def backends(self) -> Backends:
        """The same connections behind new breakers: every look asks, and names the cause of what fails now."""
        store = ObjectStore(self._store, self._settings.minio_bucket)
        return Backends(self._connection, RedisOutlet(self._redis), store)


def lookup(backends: Backends, request_id: str) -> dict[str, Any]:
    """`trace` over connections that are open."""
    try:
        deliveries = list(_deliveries(backends.connection, request_id))
    except psycopg.Error as error:
        message = error.diag.message_primary or str(error)
        raise TraceError("database_unavailable", f"PostgreSQL cannot be asked: {message}") from error
    for delivery in deliveries:
        effects = {effect["name"]: effect for effect in delivery["effects"]}
        delivery["stream_entry"] = _entry(backends.redis, effects.get("stream", {}))
        delivery["objects"] = [
            _object(backends.store, key) | _part(effects.get("raw_archive", {}), key)
            for key in object_keys(delivery["effects"])
        ]
    return {"request_id": request_id, "found": bool(deliveries), "deliveries": deliveries}


def object_keys(effects: list[dict[str, Any]]) -> list[str]:
    """Keys of the objects that the effects have recorded as stored."""
    keys: list[str] = []
    for effect in effects:
        detail = effect["detail"]
        if effect["name"] == "raw_archive" and "key" in detail:
            keys.append(detail["key"])
        keys += [entry["key"] for entry in detail.get("artifacts", ()) if entry.get("state") == "stored"]
    return keys


def remove_probe(backends: Backends, request_id: str) -> dict[str, Any]:
    """`remove` over connections that are open."""
    _require_probe(request_id)
    found = lookup(backends, request_id)
    for delivery in found["deliveries"]:
        if not delivery["probe"]:
            raise TraceError("not_a_probe", f"delivery {delivery['id']} is real, whatever its id says")
    try:
        identifiers = _take(backends.connection, request_id)
        # Looked up again: a worker may have done something between the first look and the taking.
        entries, objects = _remove_outside(backends, lookup(backends, request_id)["deliveries"])
        removed = backends.connection.execute(
            "delete from webhook.deliveries where id = any(%s) and probe and request_id = %s",
            (identifiers, request_id),
        ).rowcount
    except psycopg.Error as error:
        message = error.diag.message_primary or str(error)
        raise TraceError("database_unavailable", f"PostgreSQL: {message}") from error
    except EffectError as error:
        raise TraceError("backend_unavailable", str(error)) from error
    return {
        "request_id": request_id,
        "removed": {"deliveries": removed, "entries": entries, "objects": objects},
    }


def _require_probe(request_id: str) -> None:
    if not request_id.startswith(PROBE_PREFIX):
        raise TraceError(
            "not_a_probe", f"{request_id} is no probe's id ({PROBE_PREFIX}…): only probes are removed"
        )


def _take(connection: Connection, request_id: str) -> list[int]:
    """Keep workers away from the probe: mark it dead unless one holds it. Returns the rows' ids."""
    rows = connection.execute(
        """
        update webhook.deliveries set state = 'dead', last_error = 'probe: being removed'
        where request_id = %s and probe and state <> 'leased' returning id
        """,
        (request_id,),
    ).fetchall()
    held = connection.execute(
        "select id from webhook.deliveries where request_id = %s and state = 'leased'", (request_id,)
    ).fetchone()
    if held is not None:
        raise TraceError("busy", f"a worker holds delivery {held[0]}: try again when its attempt has ended")
    return [int(row[0]) for row in rows]


def _remove_outside(backends: Backends, deliveries: list[dict[str, Any]]) -> tuple[int, int]:
    entries = objects = 0
    for delivery in deliveries:
        for effect in delivery["effects"]:
            detail = effect["detail"]
            if effect["name"] == "stream" and "entry" in detail:
                with backends.redis.use() as client:
                    entries += int(str(client.xdel(detail["stream"], detail["entry"])))
                    client.delete(detail["marker"])
        for key in object_keys(delivery["effects"]):
            objects += backends.store.stat(key) is not None
            backends.store.remove(key)
    return entries, objects


def _deliveries(connection: Connection, request_id: str) -> Iterator[dict[str, Any]]:
    for row in connection.execute(_DELIVERIES, (request_id,)).fetchall():
        delivery = {name: _plain(value) for name, value in zip(_COLUMNS, row, strict=False)}
        delivery["body_bytes"], delivery["variants"] = row[-2:]
        names = ("name", "state", "tries", "detail", "last_error", "updated_at")
        effects = connection.execute(_EFFECTS, (delivery["id"],)).fetchall()
        delivery["effects"] = [
            {name: _plain(value) for name, value in zip(names, effect, strict=True)} for effect in effects
        ]
        yield delivery


def _entry(redis: RedisOutlet, effect: dict[str, Any]) -> dict[str, Any] | None:
    """The stream entry as it stands in Redis now; None when none was added, or it is gone."""
    detail = effect.get("detail", {})
    if "entry" not in detail:
        return None
    try:
        with redis.use() as client:
            found: Any = client.xrange(detail["stream"], detail["entry"], detail["entry"])
    except EffectError as error:
        return {"stream": detail["stream"], "id": detail["entry"], "error": str(error)}
    return {"stream": detail["stream"], "id": found[0][0], "fields": dict(found[0][1])} if found else None


def _part(effect: dict[str, Any], key: str) -> dict[str, Any]:
    """Where in a segment the delivery stands, which it shares with others; nothing of an object of its own."""
    detail = effect.get("detail", {})
    if detail.get("key") != key or "offset" not in detail:
        return {}
    return {"part": {name: detail[name] for name in ("offset", "length", "sha256")}}


def _object(store: ObjectStore, key: str) -> dict[str, Any]:
    try:
        found = store.stat(key)
    except EffectError as error:
        return {"key": key, "exists": None, "error": str(error)}
    if found is None:
        return {"key": key, "exists": False}
    return {
        "key": key,
        "exists": True,
        "size": found.size,
        "sha256": found.sha256,
        "etag": found.etag,
        "content_type": found.content_type,
        "bucket": store.bucket,
    }


def _plain(value: Any) -> Any:
    """Times as RFC 3339 text, the rest as it is."""
    return value.isoformat() if hasattr(value, "isoformat") else value
