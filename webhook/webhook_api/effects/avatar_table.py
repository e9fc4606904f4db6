"""The bot's table `avatars`, which this service reads and writes but does not own.

Which types its columns have (varchar or a native enum) and how it spells its values (lower or upper case) is read from
the catalog and the row each time, and written back the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg import sql

from webhook_api.bodies import clean_text
from webhook_api.db import Connection
from webhook_api.states import EffectError, Failure

TABLE: Final = "public.avatars"
MAX_ERROR: Final = 2000
"""Characters of `training_error`, where the column doesn't hold fewer."""
_NEEDED: Final = ("id", "status", "fal_request_id")

_COLUMNS: Final = """
select a.attname, format_type(coalesce(nullif(t.typbasetype, 0), t.oid), coalesce(nullif(t.typtypmod, -1), a.atttypmod)),
       format_type(a.atttypid, a.atttypmod),
       (select array_agg(e.enumlabel order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid),
       a.attnotnull
from pg_attribute a join pg_type t on t.oid = a.atttypid
where a.attrelid = to_regclass(%s) and a.attnum > 0 and not a.attisdropped
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the bot's table. `type` is as SQL spells it; `labels` are an enum's values."""

    type: str
    labels: tuple[str, ...] = ()
    cast: str = ""

    @property
    def limit(self) -> int | None:
        """Characters that it holds; None without a limit."""
        name, _, rest = self.type.partition("(")
        if name not in ("character varying", "character"):
            return None
        digits = rest.rstrip(")")
        return int(digits) if digits.isdigit() else None


def spell(value: str, column: Column, example: str | None) -> str:
    """`value` as the column spells it: an enum's own label, or the case of `example`.

    Raises `EffectError` (theirs) when the enum has no such label.
    """
    if column.labels:
        for label in column.labels:
            if label.lower() == value:
                return label
        raise EffectError(
            Failure.THEIRS,
            "avatar_status_unknown",
            f"the type {column.type} has no value {value!r} in any case, only {', '.join(column.labels)}",
        )
    return value.upper() if example and example.isupper() else value


def not_found(request_id: str) -> EffectError:
    """Nobody has made a row for this request (yet)."""
    return EffectError(
        Failure.PARKED, "avatar_not_found", f"no avatar has fal_request_id {request_id!r} (yet)"
    )


def read_columns(connection: Connection) -> dict[str, Column]:
    """The table's columns as they are now. Raises `EffectError` (parked) when there is no such table."""
    rows = connection.execute(_COLUMNS, (TABLE,)).fetchall()
    if not rows:
        raise EffectError(
            Failure.PARKED, "avatar_table_missing", f"{TABLE} does not exist (yet), or not for this role"
        )
    columns = {
        str(name): Column(str(base), tuple(labels or ()), str(own)) for name, base, own, labels, _ in rows
    }
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise EffectError(
            Failure.THEIRS, "avatar_columns_missing", f"{TABLE} has no column {', '.join(missing)}"
        )
    return columns


def in_training(status: Column) -> sql.Composable:
    """Whether a row is in training, as the table's index (docs/console.md) says it: an enum by label, text in any case."""
    if status.labels:
        label = next((label for label in status.labels if label.lower() == "training"), None)
        return sql.SQL("status = {}").format(sql.Literal(label)) if label else sql.SQL("false")
    return sql.SQL("lower(status::text) = 'training'")


def _fields(columns: Mapping[str, Column]) -> sql.Composed:
    """What of the row decides, as a list of expressions."""
    wanted = [name for name in ("status", "training_type") if name in columns]
    fields: list[sql.Composable] = [
        sql.SQL("id::text as id"),
        *(sql.SQL("{0}::text as {0}").format(sql.Identifier(name)) for name in wanted),
    ]
    if "training_progress" in columns:
        fields.append(sql.SQL("training_progress::int as training_progress"))
    return sql.SQL(", ").join(fields)


def lock_row(connection: Connection, columns: Mapping[str, Column], request_id: str) -> dict[str, Any]:
    """The one row of a request, locked, waiting for whoever holds it. Raises `EffectError` unless there is just one."""
    query = sql.SQL("select {} from public.avatars where fal_request_id = %s limit 2 for update").format(
        _fields(columns)
    )
    cursor = connection.execute(query, (request_id,))
    names = [entry.name for entry in cursor.description or ()]
    rows = cursor.fetchall()
    if not rows:
        raise not_found(request_id)
    if len(rows) > 1:
        raise EffectError(
            Failure.THEIRS, "avatar_ambiguous", f"more than one avatar has fal_request_id {request_id!r}"
        )
    return dict(zip(names, rows[0], strict=True))


def _ids(columns: Mapping[str, Column]) -> sql.Composable:
    """A parameter with many request ids, in a type that the column's index answers for."""
    column = columns["fal_request_id"]
    # An array of varchar(n) would cut what is longer, and find the row of another request.
    kind = sql.SQL("text") if column.type.startswith("character") else _type(column)
    return sql.SQL("%s::{}[]").format(kind)


def lock_rows(
    connection: Connection, columns: Mapping[str, Column], request_ids: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each request that nobody else holds, locked."""
    query = sql.SQL(
        "select fal_request_id::text as request_id, {} from public.avatars where fal_request_id = any({}) "
        "for update skip locked"
    ).format(_fields(columns), _ids(columns))
    cursor = connection.execute(query, (list(request_ids),))
    names = [entry.name for entry in cursor.description or ()]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in cursor.fetchall():
        found[str(row[0])].append(dict(zip(names, row, strict=True)))
    return found


def count_rows(
    connection: Connection, columns: Mapping[str, Column], request_ids: Sequence[str]
) -> dict[str, int]:
    """How many rows each request has, also such as somebody holds. One without a row is not in the answer."""
    query = sql.SQL(
        "select fal_request_id::text, count(*) from public.avatars where fal_request_id = any({}) group by 1"
    )
    rows = connection.execute(query.format(_ids(columns)), (list(request_ids),)).fetchall()
    return {str(request_id): int(number) for request_id, number in rows}


def example_status(connection: Connection) -> str | None:
    """A status as the table spells it."""
    row = connection.execute(
        "select status::text from public.avatars where status is not null limit 1"
    ).fetchone()
    return str(row[0]) if row else None


def update(
    connection: Connection, columns: Mapping[str, Column], avatar_id: str, values: Mapping[str, Any]
) -> None:
    """Set columns of one row, and the times of the change."""
    settable = _settable(columns, values)
    assignments = [_assignment(name, columns[name], sql.Placeholder(name)) for name in settable]
    query = sql.SQL("update public.avatars set {} where id = {}::{}").format(
        sql.SQL(", ").join(assignments + _touched(columns)), sql.Placeholder("id"), _type(columns["id"])
    )
    connection.execute(query, {"id": avatar_id, **settable})


def update_many(
    connection: Connection, columns: Mapping[str, Column], changes: Sequence[tuple[str, Mapping[str, Any]]]
) -> None:
    """One statement for all rows in which the same columns change."""
    groups: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for avatar_id, values in changes:
        settable = _settable(columns, values)
        groups[tuple(settable)].append((avatar_id, settable))
    for names, rows in groups.items():
        marks = [sql.Identifier("new", f"v{number}") for number in range(len(names))]
        assignments = [
            _assignment(name, columns[name], mark) for name, mark in zip(names, marks, strict=True)
        ]
        query = sql.SQL(
            "update public.avatars set {} from unnest({}) as new (id, {}) where avatars.id = new.id::{}"
        ).format(
            sql.SQL(", ").join(assignments + _touched(columns)),
            sql.SQL(", ").join([sql.SQL("%s::text[]")] * (len(names) + 1)),
            sql.SQL(", ").join(sql.Identifier(f"v{number}") for number in range(len(names))),
            _type(columns["id"]),
        )
        given: list[list[str | None]] = [[avatar_id for avatar_id, _ in rows]]
        given += [[_as_text(values[name]) for _, values in rows] for name in names]
        connection.execute(query, given)


def _as_text(value: Any) -> str | None:
    """A value as PostgreSQL reads it from text."""
    if value is None:
        return None
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _settable(columns: Mapping[str, Column], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for which the table has a column, each as it fits."""
    return {
        name: _fitting(name, value, columns[name])
        for name, value in values.items()
        if name in columns and not (value is None and name == "training_progress")
    }


def _touched(columns: Mapping[str, Column]) -> list[sql.Composable]:
    """Assignments to the columns that hold the time of the change."""
    return [
        sql.SQL("{} = {}").format(sql.Identifier(name), _now(columns[name]))
        for name in ("last_status_check", "updated_at")
        if name in columns
    ]


def _assignment(name: str, column: Column, value: sql.Composable) -> sql.Composable:
    if column.type == "timestamp without time zone":
        value = sql.SQL("({}::timestamptz at time zone 'utc')").format(value)
    elif column.type.startswith("character"):
        # An explicit cast to varchar(n) would cut in silence; an assignment refuses what is too long.
        value = sql.SQL("{}::text").format(value)
    else:
        value = sql.SQL("{}::{}").format(value, _type(column))
    if name == "training_started_at":
        value = sql.SQL("coalesce(avatars.training_started_at, {})").format(value)
    return sql.SQL("{} = {}").format(sql.Identifier(name), value)


def _fitting(name: str, value: Any, column: Column) -> Any:
    """Only an error's text is ever shortened, and visibly."""
    if name != "training_error" or value is None:
        return value
    limit = min(MAX_ERROR, column.limit or MAX_ERROR)
    text = clean_text(str(value))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _now(column: Column) -> sql.SQL:
    naive = column.type == "timestamp without time zone"
    return sql.SQL("now() at time zone 'utc'") if naive else sql.SQL("now()")


def _type(column: Column) -> sql.SQL:
    # From format_type(), which quotes; never from a delivery.
    return sql.SQL(column.cast or column.type)
