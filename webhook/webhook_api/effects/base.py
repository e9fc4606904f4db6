"""What every effect is given, and what it gives back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from webhook_api.bodies import Event, clean_text
from webhook_api.db import Connection
from webhook_api.media import MediaClient
from webhook_api.outlets import ObjectStore, RedisOutlet
from webhook_api.states import EffectError, EffectState, Failure

if TYPE_CHECKING:
    from webhook_api.effects.forward import ForwardOutlet
    from webhook_api.effects.telegram import TelegramOutlet

#: Lends a connection, in autocommit, for a few short statements.
Borrow = Callable[[], AbstractContextManager[Connection]]

# What is done stays done: a commit of which nobody heard must not be taken back by the failure that it looked like.
_RECORD: Final = """
insert into webhook.effects (delivery_id, name, state, tries, detail, last_error)
values (%(delivery_id)s, %(name)s, %(state)s, %(tries)s, %(detail)s::jsonb, %(last_error)s)
on conflict (delivery_id, name) do update
set state = excluded.state, tries = webhook.effects.tries + excluded.tries, detail = excluded.detail,
    last_error = excluded.last_error, updated_at = now()
where webhook.effects.state = 'failed'
returning tries
"""
_FENCE: Final = """
select 1 from webhook.deliveries where id = %s and state = 'leased' and lease_owner = %s for update
"""
# Who is locked by someone else (a duplicate that arrives just now) is left out rather than waited for: whoever holds
# many rows and waits for the lock of one more can be part of a deadlock.
_FENCE_MANY: Final = """
select d.id
from unnest(%(ids)s::bigint[], %(owners)s::text[]) as given (id, owner)
join webhook.deliveries d on d.id = given.id and d.state = 'leased' and d.lease_owner = given.owner
for update of d skip locked
"""
_PAUSES: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.0)
_RECORD_MANY: Final = """
insert into webhook.effects (delivery_id, name, state, tries, detail, last_error)
select new.id, new.name, new.state, new.tries, new.detail::jsonb, new.last_error
from unnest(%(effect_ids)s::bigint[], %(names)s::text[], %(effect_states)s::text[], %(effect_tries)s::int[],
            %(details)s::text[], %(effect_errors)s::text[])
    as new (id, name, state, tries, detail, last_error)
on conflict (delivery_id, name) do update
set state = excluded.state, tries = webhook.effects.tries + excluded.tries, detail = excluded.detail,
    last_error = excluded.last_error, updated_at = now()
where webhook.effects.state = 'failed'
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A leased row of `webhook.deliveries`."""

    id: int
    source: str
    request_id: str
    dedup_key: str
    status: str
    gateway_request_id: str | None
    training_type_hint: str | None
    account_id: str | None
    body: bytes = field(repr=False)
    body_sha256: str
    headers: dict[str, Any] = field(repr=False)
    edge_request_id: str | None
    probe: bool
    first_seen_at: datetime
    tries: int
    """Attempts, this one included."""
    age: float
    """Seconds since it was first seen."""
    lease_owner: str


@dataclass(frozen=True, slots=True)
class Record:
    """A row of `webhook.effects`."""

    state: str
    tries: int
    detail: dict[str, Any]
    last_error: str | None = None

    @property
    def final(self) -> bool:
        """Whether it is not tried again: done, skipped or given up."""
        return self.state != EffectState.FAILED or bool(self.detail.get("final"))

    @property
    def settled(self) -> bool:
        """Whether it was done, or there was nothing to do."""
        return self.state != EffectState.FAILED

    @property
    def not_before(self) -> float:
        """Unix time before which a failed one must not be run again; 0 when nobody asked for a pause."""
        return float(self.detail.get("not_before") or 0.0)

    def lasting(self, now: float) -> float:
        """Seconds for which it has been failing in the way in which it failed last."""
        return max(0.0, now - float(self.detail.get("since") or now))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an effect ended. `recorded`: it wrote its own record, in the transaction of its change."""

    state: EffectState
    detail: dict[str, Any]
    recorded: bool = False

    @classmethod
    def skipped(cls, why: str) -> Outcome:
        """Nothing to do, and why."""
        return cls(EffectState.SKIPPED, {"why": why})


@dataclass(frozen=True, slots=True)
class Tools:
    """What effects work with, shared by all threads of a worker."""

    borrow: Borrow
    redis: RedisOutlet
    store: ObjectStore
    media: MediaClient
    stream: str
    stream_maxlen: int
    forward: ForwardOutlet | None = None
    """None: the settings name no server to hand deliveries on to."""
    telegram: TelegramOutlet | None = None
    """None: the settings name no chat."""
    shapes: Mapping[str, str] = field(default_factory=dict)
    """Sources whose bodies have another shape than fal's, and that shape."""


@dataclass(slots=True)
class Job:
    """One attempt at one delivery."""

    delivery: Delivery
    event: Event | None
    """None: the body cannot be read; `unreadable` says why."""
    unreadable: str | None
    records: dict[str, Record]
    """Effects by name, as recorded before and during this attempt."""
    tools: Tools
    stop: Callable[[], bool] = lambda: False
    """True when the worker stops or has lost the lease: give up what takes long."""

    def detail(self, name: str) -> dict[str, Any]:
        """What effect `name` has recorded; empty when it never ran."""
        record = self.records.get(name)
        return record.detail if record else {}


#: How an effect went for one delivery of a batch.
Result = Outcome | EffectError


@dataclass(frozen=True, slots=True)
class Effect:
    """A named effect. `run` returns an `Outcome` or raises `EffectError`.

    `wanted`: whether the settings ask for it; one that is not wanted is not run and leaves no record.
    `many`: the same for many deliveries at once, no two of one request, by delivery id. Who is missing in the answer is
    tried with `run`; what it raises (`EffectError`) concerns all.
    `quick`: for effects without `many`, what can be said without any I/O; None sends the delivery to `run`.
    """

    name: str
    run: Callable[[Job], Outcome]
    wanted: Callable[[Tools], bool] = lambda _tools: True
    many: Callable[[Sequence[Job]], Mapping[int, Result]] | None = None
    quick: Callable[[Job], Outcome | None] = lambda _job: None


def record(
    connection: Connection,
    delivery: Delivery,
    name: str,
    state: EffectState,
    detail: str,
    last_error: str | None = None,
    *,
    tries: int = 1,
) -> int:
    """Write an effect's row inside the caller's transaction, and return its counted tries.

    `detail` is JSON text. Raises `EffectError` (interrupted) when the lease is no longer ours: whoever holds it now
    decides. The delivery is locked last, so that its row is never held while another lock is waited for.
    """
    if connection.execute(_FENCE, (delivery.id, delivery.lease_owner)).fetchone() is None:
        raise EffectError(Failure.INTERRUPTED, "lease_lost", "another worker has taken this delivery over")
    row = connection.execute(
        _RECORD,
        {
            "delivery_id": delivery.id,
            "name": name,
            "state": str(state),
            "tries": tries,
            "detail": detail,
            "last_error": last_error,
        },
    ).fetchone()
    return int(row[0]) if row else tries


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be recorded of one effect. `detail` is JSON text; `tries` are added to those before."""

    delivery_id: int
    name: str
    state: EffectState
    detail: str
    last_error: str | None = None
    tries: int = 1


def as_json(detail: Mapping[str, Any]) -> str:
    """JSON that a jsonb column takes: without NUL and without half of a surrogate pair."""
    return clean_text(json.dumps(detail, ensure_ascii=False).replace("\\u0000", "\\ufffd"))


def fence(connection: Connection, deliveries: Sequence[Delivery]) -> frozenset[int]:
    """Lock those of the deliveries whose lease is ours, and return their ids.

    What somebody else holds is looked at again a few times, for `_PAUSES` in all: whoever counts a duplicate is done
    within milliseconds. What is held still is left out.
    """
    held: set[int] = set()
    for pause in _PAUSES:
        missing = [each for each in deliveries if each.id not in held]
        given = {"ids": [each.id for each in missing], "owners": [each.lease_owner for each in missing]}
        held.update(int(row[0]) for row in connection.execute(_FENCE_MANY, given).fetchall())
        if len(held) == len(deliveries):
            break
        time.sleep(pause)
    return frozenset(held)


def record_many(connection: Connection, entries: Iterable[Entry]) -> None:
    """Write effects' rows inside the caller's transaction, which has locked the deliveries with `fence`."""
    listed = list(entries)
    connection.execute(
        _RECORD_MANY,
        {
            "effect_ids": [entry.delivery_id for entry in listed],
            "names": [entry.name for entry in listed],
            "effect_states": [str(entry.state) for entry in listed],
            "effect_tries": [entry.tries for entry in listed],
            "details": [entry.detail for entry in listed],
            "effect_errors": [entry.last_error for entry in listed],
        },
    )
