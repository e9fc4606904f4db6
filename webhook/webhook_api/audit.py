"""The audit table: who changed what from the command line, written in the transaction of the change."""

from __future__ import annotations

import getpass
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg.types.json import Jsonb

MAX_WHO: Final = 200
"""Characters of a name."""

_RECORD: Final = """
insert into webhook.audit (operation, who, instance, action, filter, affected, delivery_ids, detail)
values (%s, %s, %s, %s, %s, %s, %s, %s) returning id
"""


@dataclass(frozen=True, slots=True)
class Operation:
    """One command of one operator. A big one takes several transactions, each with a row of its own."""

    who: str
    instance: str
    action: str
    """``group.verb``, such as ``dead-letters.replay``."""
    filter: Mapping[str, Any] = field(default_factory=dict)
    """What it was aimed at, as the operator said it."""
    id: uuid.UUID = field(default_factory=uuid.uuid4)


def whoami(given: str | None) -> str:
    """Name of the operator: what ``--as`` says, else the user of this process.

    In a container that is the service's user, so the runbooks say ``--as``.
    """
    for name in (given, os.environ.get("WEBHOOK_OPERATOR"), os.environ.get("SUDO_USER")):
        if name and name.strip():
            return name.strip()[:MAX_WHO]
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def record(
    connection: psycopg.Connection[Any],
    operation: Operation,
    affected: int,
    delivery_ids: Sequence[int] = (),
    detail: Mapping[str, Any] | None = None,
) -> int:
    """Write a row inside the caller's transaction and return its id. Without that transaction it proves nothing."""
    row = connection.execute(
        _RECORD,
        (
            operation.id,
            operation.who,
            operation.instance,
            operation.action,
            Jsonb(dict(operation.filter)),
            affected,
            list(delivery_ids),
            Jsonb(dict(detail or {})),
        ),
    ).fetchone()
    assert row is not None  # noqa: S101  (an insert with returning gives a row)
    return int(row[0])
