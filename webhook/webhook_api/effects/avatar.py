"""The bot's `avatars` row, found by `fal_request_id`, brought to what the event says under a row lock.

The rules are in `avatar_rules`, the table in `avatar_table`. The row and the record of it are one transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import errors

from webhook_api.bodies import Event, training_type
from webhook_api.db import Connection, DatabaseUnavailable
from webhook_api.effects.avatar_rules import Avatar, Facts, facts, plan
from webhook_api.effects.avatar_table import (
    TABLE,
    Column,
    count_rows,
    example_status,
    lock_row,
    lock_rows,
    not_found,
    read_columns,
    spell,
    update,
    update_many,
)
from webhook_api.effects.base import (
    Delivery,
    Entry,
    Job,
    Outcome,
    Result,
    as_json,
    fence,
    record,
    record_many,
)
from webhook_api.media import MediaPolicy
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "avatar"
PERMISSION: Final = "avatar_permission"
REFUSED: Final = "avatar_refused"
"""Reason of a change that the bot's table does not take."""


def run(job: Job) -> Outcome:
    """Bring the row up to date and record it, in one transaction."""
    delivery, event = job.delivery, job.event
    if delivery.probe:
        return Outcome.skipped("a probe")
    if event is None:
        raise EffectError(Failure.PERMANENT, "body_unreadable", job.unreadable or "the body cannot be read")
    with _faults(), job.tools.borrow() as connection, connection.transaction():
        detail = apply(connection, delivery, event, job.tools.media.policy)
        record(connection, delivery, NAME, EffectState.DONE, as_json(detail))
    return Outcome(EffectState.DONE, detail, recorded=True)


@contextmanager
def _faults() -> Iterator[None]:
    """What faults of the database mean for this effect."""
    try:
        yield
    except (DatabaseUnavailable, psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise EffectError(Failure.OUTAGE, "database_unavailable", str(error)) from error
    except errors.InsufficientPrivilege as error:
        message = f"{error.diag.message_primary}; grant SELECT and UPDATE on {TABLE} to the service's role"
        raise EffectError(Failure.OUTAGE, PERMISSION, message) from error
    except psycopg.Error as error:
        message = error.diag.message_primary or str(error)
        raise EffectError(
            Failure.THEIRS, REFUSED, f"the bot's table refuses the change: {message}"
        ) from error


def apply(connection: Connection, delivery: Delivery, event: Event, media: MediaPolicy) -> dict[str, Any]:
    """Change the row inside the caller's transaction. Returns what to record; raises `EffectError`."""
    columns = read_columns(connection)
    row = lock_row(connection, columns, event.request_id)
    values, detail = _planned(connection, row, facts(event, delivery, media), columns)
    if values:
        update(connection, columns, row["id"], values)
    return detail


def _planned(
    connection: Connection, row: Mapping[str, Any], told: Facts, columns: Mapping[str, Column]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns to set, as the table spells them, and what to record."""
    avatar = Avatar(
        status=(row["status"] or "").lower(),
        training_type=training_type(row.get("training_type")),
        progress=row.get("training_progress"),
    )
    change = plan(avatar, told, columns)
    after, values = avatar.status, change.values
    if values:
        after = str(values["status"])
        example = row["status"] or example_status(connection)
        values = {**values, "status": spell(after, columns["status"], example)}
    return values, {
        "avatar_id": row["id"],
        "training_type": avatar.training_type,
        "before": avatar.status,
        "after": after,
        "outcome": change.outcome,
        "training_error": change.values.get("training_error"),
    }


def run_many(jobs: Sequence[Job]) -> dict[int, Result]:
    """Bring many rows up to date and record them, by a few statements in one transaction.

    No two jobs may be of one request. A fault of the whole (an outage) is raised as `EffectError`. When the bot's table
    refuses a change, the batch is halved until only what it refuses is left out. Left out are also a row that the bot
    holds, one that is not the only one of its request, and a delivery that failed here before for a reason other than
    waiting.
    """
    results: dict[int, Result] = {}
    told: list[Job] = []
    for job in jobs:
        if job.delivery.probe:
            results[job.delivery.id] = Outcome.skipped("a probe")
        elif job.event is None:
            message = job.unreadable or "the body cannot be read"
            results[job.delivery.id] = EffectError(Failure.PERMANENT, "body_unreadable", message)
        elif _harmless(job.detail(NAME)):
            told.append(job)
    return results | _halved(told)


def _harmless(before: Mapping[str, Any]) -> bool:
    """Whether a former failure, if any, had nothing to do with this delivery: it spoils no batch."""
    return before.get("kind") in (None, Failure.PARKED, Failure.WAITING) or before.get("reason") == PERMISSION


def _halved(jobs: Sequence[Job]) -> dict[int, Result]:
    if not jobs:
        return {}
    tools = jobs[0].tools
    try:
        with _faults(), tools.borrow() as connection, connection.transaction():
            return _apply_many(connection, jobs)
    except EffectError as error:
        if error.reason != REFUSED:
            raise
    if len(jobs) == 1:
        return {}
    middle = len(jobs) // 2
    return _halved(jobs[:middle]) | _halved(jobs[middle:])


def _apply_many(connection: Connection, jobs: Sequence[Job]) -> dict[int, Result]:
    """Nothing here waits for a lock: whatever somebody else holds is left to `run`."""
    held = fence(connection, [job.delivery for job in jobs])
    columns = read_columns(connection)
    wanted = {job.delivery.request_id: job for job in jobs if job.delivery.id in held}
    # One that has two rows must not pass for one with a single row because somebody holds the other.
    counts = count_rows(connection, columns, list(wanted))
    rows = lock_rows(connection, columns, [each for each in wanted if counts.get(each) == 1])
    results: dict[int, Result] = {
        job.delivery.id: not_found(request_id)
        for request_id, job in wanted.items()
        if request_id not in counts
    }
    changes: list[tuple[str, dict[str, Any]]] = []
    entries: list[Entry] = []
    for request_id, found in rows.items():
        job = wanted[request_id]
        if len(found) != 1 or job.event is None:
            continue
        told = facts(job.event, job.delivery, job.tools.media.policy)
        try:
            values, detail = _planned(connection, found[0], told, columns)
        except EffectError as error:
            results[job.delivery.id] = error
            continue
        if values:
            changes.append((found[0]["id"], values))
        entries.append(Entry(job.delivery.id, NAME, EffectState.DONE, as_json(detail)))
        results[job.delivery.id] = Outcome(EffectState.DONE, detail, recorded=True)
    update_many(connection, columns, changes)
    record_many(connection, entries)
    return results
