"""What is finished leaves the database by its age, in small batches that stop nobody.

A delivery is cleared in steps: its body and headers (the archive in the object store has them), the record of its
effects (all but where it is archived), and at last the row with the key by which a duplicate is known. Only what is done
and archived goes; dead letters and what is kept aside stay unless the settings give them an age. Decision 0450.

One run at a time, by an advisory lock. Each batch is one short transaction over rows that nobody holds, found by an
index; after each comes a pause of twice its time.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import psycopg
from psycopg import errors

from webhook_api.config import Settings
from webhook_api.config_upkeep import RetentionSettings
from webhook_api.db import Connection, connect, sole
from webhook_api.effects import raw_archive
from webhook_api.metrics_upkeep import (
    PRUNE_BATCH,
    PRUNE_ERRORS,
    PRUNE_ROWS,
    PRUNE_RUNS,
    TABLE_BYTES,
    TABLE_ROWS,
)
from webhook_api.outlets import ObjectStore, minio_client
from webhook_api.states import EffectError

LOG: Final = logging.getLogger(__name__)
LOCK_KEY: Final = 0x41495348_50525531
"""The advisory lock of all runs (an arbitrary, fixed number)."""
STATEMENT_SECONDS: Final = 6.0
"""Longest statement. A lock is waited for a third of this (db.connect) at most; a batch waits for none."""
PAUSE_FACTOR: Final = 2.0
PAUSE_MIN: Final = 0.02
PAUSE_MAX: Final = 5.0
SMALLEST_BATCH: Final = 10
FAILURES: Final = 5
"""Batches of a step that may fail in a row."""
COUNTED_MAX: Final = 100_000
"""A dry run counts no further."""
GAUGES_SECONDS: Final = 60.0
FIRST_RUN_SECONDS: Final = 60.0
_START: Final = ("-infinity", 0)

_ARCHIVED: Final = """exists (select from webhook.effects e
    where e.delivery_id = d.id and e.name = 'raw_archive' and e.state = 'done')"""
_MATCHING: Final = "webhook.{table} d where {where} and d.{moment} < now() - make_interval(days => %(days)s)"
_AFTER: Final = " and (d.{moment}, d.id) > (%(at)s::timestamptz, %(id)s)"
# Rows that somebody holds (a duplicate that arrives, an operator's replay) are left for the next run.
_DUE: Final = """
with due as (
    select d.ctid as place, {key} as id, d.{moment} as moment from {matching}{after}
    order by d.{moment}{then} limit %(limit)s for update of d skip locked
)"""
_ACTIONS: Final = {
    "clear": """, changed as (
    update webhook.deliveries d set body = '', headers = '{{}}', pruned = 1 from due where due.id = d.id
    returning due.moment, due.id
) select moment, id from changed order by 1, 2""",
    # Where the delivery is archived stays known for as long as the delivery itself.
    "forget": """, gone as (
    delete from webhook.effects e using due where e.delivery_id = due.id and e.name <> 'raw_archive'
), changed as (
    update webhook.deliveries d set pruned = 2 from due where due.id = d.id returning due.moment, due.id
) select moment, id from changed order by 1, 2""",
    "delete": """, changed as (
    delete from webhook.{table} d using due where d.ctid = due.place returning due.moment, due.id
) select moment, id from changed order by 1, 2""",
}
_PLACE: Final = """
select e.detail from webhook.effects e join (
    select d.id from {matching}{after} order by d.{moment}, d.id limit 1) first on first.id = e.delivery_id
where e.name = 'raw_archive' and e.state = 'done'
"""
_SIZES: Final = """
select c.relname, pg_total_relation_size(c.oid), pg_relation_size(c.oid), pg_indexes_size(c.oid),
    greatest(c.reltuples, 0)::bigint, coalesce(s.n_dead_tup, 0), s.last_autovacuum
from pg_class c join pg_namespace n on n.oid = c.relnamespace left join pg_stat_all_tables s on s.relid = c.oid
where n.nspname = 'webhook' and c.relkind = 'r'
order by 2 desc
"""
_RESTORE: Final = """
update webhook.deliveries
set body = %(body)s, headers = %(headers)s::jsonb, pruned = case when pruned = 1 then 0 else pruned end
where id = %(id)s and pruned > 0 and body_sha256 = %(sha256)s
returning id
"""


class RetentionError(Exception):
    """A step cannot go on. ``reason``: archive_missing, archive_unavailable, not_archived, not_found."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class Store(Protocol):
    """What of the object store is needed: whether an object is there, and its bytes."""

    def stat(self, key: str) -> Any:
        """What stands under a key; None when nothing does."""
        ...

    def read(self, key: str, offset: int = 0, length: int | None = None) -> bytes | None:
        """Bytes of an object."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """Something that goes by its age."""

    name: str
    """Of the metric, of the report, and of the attribute of the settings that holds its age in days."""
    table: str
    where: str
    """Condition on ``d``."""
    moment: str
    """Column that tells its age."""
    action: str = "delete"
    archived: bool = False
    """Whether the object store is asked before each batch."""

    @property
    def keyed(self) -> bool:
        """Whether a batch begins where the last one ended. Elsewhere, what was found is gone."""
        return self.table == "deliveries"

    @property
    def statement(self) -> str:
        """One batch: finds, changes, and returns what it changed."""
        due = _DUE.format(
            key="d.id" if self.keyed else "0",
            moment=self.moment,
            matching=self._matching,
            after=self._after,
            then=", d.id" if self.keyed else "",
        )
        return due + _ACTIONS[self.action].format(table=self.table)

    @property
    def place(self) -> str:
        """Where the next one is archived."""
        return _PLACE.format(matching=self._matching, after=self._after, moment=self.moment)

    @property
    def count(self) -> str:
        """How many match, up to a bound."""
        return f"select count(*) from (select from {self._matching} limit {COUNTED_MAX + 1}) counted"  # noqa: S608

    @property
    def _matching(self) -> str:
        return _MATCHING.format(table=self.table, where=self.where, moment=self.moment)

    @property
    def _after(self) -> str:
        return _AFTER.format(moment=self.moment) if self.keyed else ""


def _done(pruned: int) -> str:
    archived = f" and {_ARCHIVED}" if pruned == 0 else ""
    return f"d.state = 'done' and d.pruned = {pruned}{archived}"


_SETTLED: Final = f"""exists (
    select from webhook.deliveries p where p.id = d.delivery_id and p.state = 'done'
      and (p.pruned > 0 or {_ARCHIVED.replace("d.id", "p.id")}))"""
STEPS: Final = (
    Step("bodies", "deliveries", _done(0), "done_at", "clear", archived=True),
    Step("variants", "delivery_variants", _SETTLED, "seen_at"),
    Step("effects", "deliveries", _done(1), "done_at", "forget"),
    Step("deliveries", "deliveries", _done(2), "done_at"),
    Step("deliveries", "deliveries", _done(1), "done_at"),
    Step("deliveries", "deliveries", _done(0), "done_at", archived=True),
    Step(
        "dead_letters",
        "deliveries",
        "d.state = 'dead' and d.aside is null and d.discarded_at is null",
        "last_seen_at",
    ),
    Step(
        "discarded",
        "deliveries",
        "d.state = 'dead' and d.aside is null and d.discarded_at is not null",
        "last_seen_at",
    ),
    Step("aside", "deliveries", "d.state = 'dead' and d.aside is not null", "last_seen_at"),
    Step("samples", "samples", "true", "seen_at"),
    Step("audit", "audit", "true", "at"),
    Step("reconciliations", "reconciliations", "d.state <> 'waiting'", "closed_at"),
)
NAMES: Final = tuple(dict.fromkeys(step.name for step in STEPS))


@dataclass(slots=True)
class Result:
    """What a step did. In a dry run: how many match."""

    days: int
    rows: int = 0
    batches: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What a run did."""

    outcome: str
    """done, busy (another one runs), stopped, limited (--limit was reached), or failed (a step could not go on)."""
    steps: dict[str, Result] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(result.rows for result in self.steps.values())

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "outcome": self.outcome,
            "rows": self.rows,
            "steps": {
                name: {"days": each.days, "rows": each.rows, "batches": each.batches,
                       "seconds": round(each.seconds, 3), "errors": each.errors}
                for name, each in self.steps.items()
            },
        }  # fmt: skip


class Pruner:
    """Runs the steps over one connection (:func:`session`)."""

    def __init__(
        self,
        ages: RetentionSettings,
        store: Store,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ages = ages
        self._store = store
        self._stop = stop or threading.Event()
        self._clock = clock

    def run(self, connection: Connection, *, limit: int | None = None, only: Sequence[str] = ()) -> Report:
        """One run: every step (or ``only`` those) until nothing is old enough, or ``limit`` rows are done.

        Raises psycopg.Error when the database goes away. A batch is done or not, nothing is half done.
        """
        with sole(connection, LOCK_KEY) as held:
            if not held:
                return Report("busy")
            report = Report("done")
            for step in STEPS:
                days = getattr(self._ages, step.name)
                if not days or (only and step.name not in only):
                    continue
                result = report.steps.setdefault(step.name, Result(days))
                left = None if limit is None else limit - report.rows
                self._step(connection, step, result, left)
                if self._stop.is_set():
                    report.outcome = "stopped"
                    break
                if limit is not None and report.rows >= limit:
                    report.outcome = "limited"
                    break
            if any(result.errors for result in report.steps.values()):
                report.outcome = "failed"
            return report

    def matching(self, connection: Connection, only: Sequence[str] = ()) -> Report:
        """How many rows each step would take by now; counts no further than COUNTED_MAX."""
        report = Report("done")
        for step in STEPS:
            days = getattr(self._ages, step.name)
            if days and (not only or step.name in only):
                row = connection.execute(step.count.encode(), {"days": days}).fetchone()
                result = report.steps.setdefault(step.name, Result(days))
                result.rows = min(COUNTED_MAX + 1, result.rows + (int(row[0]) if row else 0))
        return report

    def _step(self, connection: Connection, step: Step, result: Result, left: int | None) -> None:
        """Batch after batch, each followed by a pause, until one finds nothing."""
        size, failures = self._ages.batch_rows, 0
        cursor: tuple[Any, int] = _START
        while not self._stop.is_set() and (left is None or left > 0):
            wanted = size if left is None else min(size, left)
            started = self._clock()
            try:
                changed = self._batch(connection, step, result.days, wanted, cursor)
            except RetentionError as error:
                return self._give_up(step, result, error.reason, str(error))
            except (errors.LockNotAvailable, errors.QueryCanceled, errors.DeadlockDetected) as error:
                failures += 1
                PRUNE_ERRORS.labels(reason="timeout").inc()
                if failures >= FAILURES:
                    return self._give_up(step, result, "timeout", type(error).__name__)
                size = max(SMALLEST_BATCH, size // 2)
                changed = None
            seconds = self._clock() - started
            PRUNE_BATCH.observe(seconds)
            result.seconds += seconds
            if changed is not None:
                if not changed:
                    return None
                failures, cursor = 0, changed[-1]
                result.rows += len(changed)
                result.batches += 1
                left = None if left is None else left - len(changed)
                PRUNE_ROWS.labels(what=step.name).inc(len(changed))
            self._stop.wait(min(PAUSE_MAX, max(PAUSE_MIN, PAUSE_FACTOR * seconds)))
        return None

    def _batch(
        self, connection: Connection, step: Step, days: int, limit: int, cursor: tuple[Any, int]
    ) -> list[tuple[Any, int]]:
        """One batch; returns what it changed, in order."""
        values = {"days": days, "limit": limit, "at": cursor[0], "id": cursor[1]}
        if step.archived:
            self._prove_archive(connection, step, values)
        with connection.transaction():
            rows = connection.execute(step.statement.encode(), values).fetchall()
        return [(moment, int(identifier)) for moment, identifier in rows]

    def _prove_archive(self, connection: Connection, step: Step, values: dict[str, Any]) -> None:
        """Look whether the first of a batch stands in the object store: nothing goes when that was emptied or is away."""
        row = connection.execute(step.place.encode(), values).fetchone()
        if row is None:
            return
        key = str(row[0].get("key"))
        try:
            found = self._store.stat(key)
        except EffectError as error:
            raise RetentionError(
                "archive_unavailable", f"the object store cannot be asked: {error}"
            ) from error
        if found is None:
            raise RetentionError(
                "archive_missing", f"{key} is recorded as archived and is not there: nothing is cleared away"
            )

    def _give_up(self, step: Step, result: Result, reason: str, message: str) -> None:
        result.errors.append(f"{reason}: {message}")
        PRUNE_ERRORS.labels(reason=reason).inc()
        LOG.error("prune_step_failed", extra={"step": step.name, "reason": reason, "error": message[:300]})


def session(settings: Settings, name: str = "webhook-prune") -> Connection:
    """A connection to prune over: short statements, and commits that no disk has to be waited for.

    A batch that a crash takes back is found again, so its commit need not compete with those of deliveries.
    """
    connection = connect(
        settings.database_url, f"{name} {settings.instance_id}", statement_timeout=STATEMENT_SECONDS
    )
    connection.execute("set synchronous_commit = off")
    # Lets the audit's trigger know who deletes (migration 0008).
    connection.execute("set webhook.retention = 'on'")
    return connection


def restore(connection: Connection, store: Store, identifier: int) -> str | None:
    """Put body and headers of a cleared delivery back, as archived; returns the key, None when nothing was cleared.

    Raises RetentionError, EffectError.

    It can be replayed then, unless the record of its effects is gone too: nobody knows what a replay would do twice.
    """
    row = connection.execute(
        "select d.pruned, e.detail from webhook.deliveries d left join webhook.effects e on e.delivery_id = d.id "
        "and e.name = 'raw_archive' and e.state = 'done' where d.id = %s",
        (identifier,),
    ).fetchone()
    if row is None:
        raise RetentionError("not_found", f"there is no delivery {identifier}")
    if row[0] == 0:
        return None
    if row[1] is None:
        raise RetentionError("not_archived", f"delivery {identifier} is not archived")
    archived = raw_archive.fetch(store, row[1])  # type: ignore[arg-type]  # reads, nothing else
    values = {
        "id": identifier,
        "body": base64.b64decode(archived["body_base64"]),
        "headers": json.dumps(archived["headers"]),
        "sha256": archived["body_sha256"],
    }
    connection.execute(_RESTORE, values)
    return str(row[1]["key"])


def sizes(connection: Connection) -> list[dict[str, Any]]:
    """Every table with its bytes and estimated rows, the largest first. Reads no rows."""
    cursor = connection.execute(_SIZES)
    names = ("table", "bytes", "table_bytes", "index_bytes", "rows_estimated", "dead_rows", "last_autovacuum")
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def object_store(settings: Settings) -> ObjectStore:
    """The archive."""
    return ObjectStore(minio_client(settings), settings.minio_bucket)


def job(settings: Settings, stop: threading.Event) -> None:
    """Show sizes every minute and prune when it is time, until ``stop`` is set. For a thread of the worker."""
    every = float(settings.retention.every)
    next_run = time.monotonic() + min(every, FIRST_RUN_SECONDS) * random.uniform(0.5, 1.0)  # noqa: S311
    while not stop.is_set():
        _show(settings)
        if time.monotonic() >= next_run:
            PRUNE_RUNS.labels(outcome=_attempt(settings, stop)).inc()
            next_run = time.monotonic() + every
        stop.wait(min(GAUGES_SECONDS, max(0.1, next_run - time.monotonic())))


def _attempt(settings: Settings, stop: threading.Event) -> str:
    try:
        with session(settings) as connection:
            report = Pruner(settings.retention, object_store(settings), stop=stop).run(connection)
    except psycopg.Error as error:
        LOG.warning("prune_failed", extra={"error": str(error)[:300]})
        return "failed"
    except Exception:  # a defect must not end the worker's other work
        LOG.exception("prune_defect")
        return "failed"
    if report.rows or report.outcome == "failed":
        LOG.info("prune_ran", extra=report.document())
    return report.outcome


def _show(settings: Settings) -> None:
    with contextlib.suppress(psycopg.Error), session(settings, "webhook-sizes") as connection:
        for table in sizes(connection):
            TABLE_BYTES.labels(table=table["table"]).set(table["bytes"])
            TABLE_ROWS.labels(table=table["table"]).set(table["rows_estimated"])
