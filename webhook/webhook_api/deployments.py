"""Deployment records in the database: read from the hosts' JSON lines, listed and shown.

The hosts' files come first: they hold what happened while the database was away. Importing a record twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

KINDS: Final = ("deploy", "rollback", "restore")
RESULTS: Final = ("done", "unchanged", "failed", "rolled_back", "interrupted")
LONGEST_LINE: Final = 1_000_000
"""Characters of one record; what is longer is none."""
BATCH: Final = 500
"""Records of one statement."""

_INSERT: Final = """
insert into webhook.deployments (id, host, kind, started_at, ended_at, who, from_release, to_release, result, record)
values (%(id)s, %(host)s, %(kind)s, %(started)s, %(ended)s, %(who)s, %(from)s, %(to)s, %(result)s, %(record)s)
on conflict (id, host) do nothing
"""
_LIST: Final = """
select id, host, kind, started_at, ended_at, who, from_release, to_release, result, record
from webhook.deployments d
where (%(host)s::text is null or host = %(host)s)
  and (%(kind)s::text is null or kind = %(kind)s)
  and (%(result)s::text is null or result = %(result)s)
  and (%(since)s::timestamptz is null or started_at >= %(since)s)
  and (%(id)s::text is null or id = %(id)s)
  and (%(beyond)s::text is null or exists (
      select from webhook.deployments b where b.id = %(beyond)s and b.host = %(beyond_host)s
        and ((d.started_at, d.id) < (b.started_at, b.id)
             or ((d.started_at, d.id) = (b.started_at, b.id) and d.host > b.host))))
order by started_at desc, id desc, host
limit %(limit)s
"""


class RecordInvalid(ValueError):
    """A line is no deployment record; the text says why."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import came to."""

    new: int
    known: int
    invalid: tuple[str, ...]
    """One text for each line that is no record."""


def parse(line: str) -> dict[str, Any]:
    """The row of one line. Raises RecordInvalid."""
    if len(line) > LONGEST_LINE:
        raise RecordInvalid(f"longer than {LONGEST_LINE} characters")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise RecordInvalid("no JSON") from None
    if not isinstance(record, dict):
        raise RecordInvalid("no JSON object")
    if "\\u0000" in line:
        raise RecordInvalid("holds U+0000")
    row = {
        name: _text(record, name, needed=name in ("id", "host"))
        for name in ("id", "host", "who", "from", "to")
    }
    row["who"] = row["who"] or ""
    for name, known in (("kind", KINDS), ("result", RESULTS)):
        if record.get(name) not in known:
            raise RecordInvalid(f"{name} is none of {', '.join(known)}")
        row[name] = record[name]
    started, ended = _moment(record, "started"), _moment(record, "ended")
    if started is None:
        raise RecordInvalid("started is missing")
    if ended is not None and ended < started:
        ended = started  # the host's clock was set back meanwhile
    return {**row, "started": started, "ended": ended, "record": Jsonb(record)}


def _text(record: dict[str, Any], name: str, *, needed: bool) -> str | None:
    value = record.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or (needed and not value) or len(value) > 500:
        raise RecordInvalid(f"{name} is no text of 1 to 500 characters")
    return value


def _moment(record: dict[str, Any], name: str) -> datetime | None:
    value = record.get(name)
    if value is None:
        return None
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        moment = None
    if moment is None or moment.tzinfo is None:
        raise RecordInvalid(f"{name} is no time with its zone")
    return moment


def bring_in(connection: psycopg.Connection[Any], lines: Iterable[str]) -> Imported:
    """Import records, all of them in one transaction; lines that are none are left out and named."""
    new = known = 0
    invalid: list[str] = []
    with connection.transaction(), connection.cursor() as cursor:
        for rows in _batches(lines, invalid):
            cursor.executemany(_INSERT, rows)
            new += cursor.rowcount
            known += len(rows) - cursor.rowcount
    return Imported(new, known, tuple(invalid))


def _batches(lines: Iterable[str], invalid: list[str]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line))
        except RecordInvalid as error:
            invalid.append(f"line {number}: {error}")
        if len(rows) == BATCH:
            yield rows
            rows = []
    if rows:
        yield rows


def listed(
    connection: psycopg.Connection[Any],
    *,
    host: str | None = None,
    kind: str | None = None,
    result: str | None = None,
    since: datetime | None = None,
    identifier: str | None = None,
    limit: int = 50,
    beyond: tuple[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs that match, the newest first, one row a host. ``beyond``: run and host of the record at which a page ended."""
    wanted = {"host": host, "kind": kind, "result": result, "since": since, "id": identifier, "limit": limit,
              "beyond": beyond and beyond[0], "beyond_host": beyond and beyond[1]}  # fmt: skip
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_LIST, wanted).fetchall()
