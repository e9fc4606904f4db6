"""Accounts of people and tokens of programs: who they are, what they may do, and what proves it.

Passwords are argon2id hashes; tokens are random, and only their digest is kept. A digest without salt will do for what
nobody can guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from argon2.profiles import RFC_9106_LOW_MEMORY
from psycopg import errors

from webhook_api import audit
from webhook_api.console import rows
from webhook_api.db import Connection

ROLES: Final = ("viewer", "operator")
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
PASSWORD_MIN: Final = 12
PASSWORD_MAX: Final = 1024
TOKEN_PREFIX: Final = "wct_"  # noqa: S105  (what every token begins with, so that scanners know a leaked one)

HASHER: Final = PasswordHasher(time_cost=RFC_9106_LOW_MEMORY.time_cost, memory_cost=32 * 1024, parallelism=1)
"""32 MiB and one thread: a login must fit into the console's container beside the pages."""
_ONE_AT_A_TIME: Final = threading.Lock()
_NOBODY: Final = HASHER.hash(secrets.token_hex(16))
"""Verified in the place of an account that is not there, so that the time says nothing."""


class AccountError(Exception):
    """It cannot be done. ``reason``: bad_name, bad_role, weak_password, exists, missing."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Who:
    """Who asks: an account with its session, or a token."""

    name: str
    """As the audit records it."""
    role: str

    @property
    def operator(self) -> bool:
        """Whether bodies and actions are theirs."""
        return self.role == "operator"


def digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def check_name(name: str) -> None:
    """Raise AccountError for a name that could be mistaken for another."""
    if not NAME.fullmatch(name):
        raise AccountError(
            "bad_name", "a name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and begins with a letter or digit"
        )


def check_password(name: str, password: str) -> None:
    """Raise AccountError for a password that is guessed too easily."""
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise AccountError("weak_password", f"a password has {PASSWORD_MIN} to {PASSWORD_MAX} characters")
    if name in password.lower() and len(password) < len(name) + PASSWORD_MIN:
        raise AccountError("weak_password", "the password holds the account's name: choose another")
    if len(set(password)) < 5:
        raise AccountError("weak_password", "the password repeats too few characters: choose another")


def _role(role: str) -> None:
    if role not in ROLES:
        raise AccountError("bad_role", f"the roles are {', '.join(ROLES)}")


def add(
    connection: psycopg.Connection[Any], name: str, role: str, password: str, operation: audit.Operation
) -> None:
    """Make an account. Raises AccountError."""
    check_name(name)
    _role(role)
    check_password(name, password)
    try:
        with connection.transaction():
            connection.execute(
                "insert into webhook.accounts (name, role, password) values (%s, %s, %s)",
                (name, role, HASHER.hash(password)),
            )
            audit.record(connection, operation, 1, (), {"account": name, "role": role})
    except errors.UniqueViolation:
        raise AccountError("exists", f"there is an account {name} already") from None


def set_password(
    connection: psycopg.Connection[Any], name: str, password: str, operation: audit.Operation
) -> int:
    """Give an account another password, which enables it and ends its sessions; returns how many. Raises AccountError."""
    check_password(name, password)
    with connection.transaction():
        changed = connection.execute(
            "update webhook.accounts set password = %s, password_at = now(), disabled_at = null where name = %s",
            (HASHER.hash(password), name),
        ).rowcount
        return _ended(connection, name, changed, operation)


def disable(connection: psycopg.Connection[Any], name: str, operation: audit.Operation) -> int:
    """Close an account and end its sessions; returns how many there were. Raises AccountError."""
    with connection.transaction():
        changed = connection.execute(
            "update webhook.accounts set disabled_at = coalesce(disabled_at, now()) where name = %s", (name,)
        ).rowcount
        return _ended(connection, name, changed, operation)


def _ended(connection: psycopg.Connection[Any], name: str, changed: int, operation: audit.Operation) -> int:
    if not changed:
        raise AccountError("missing", f"there is no account {name}")
    ended = connection.execute("delete from webhook.sessions where account = %s", (name,)).rowcount
    audit.record(connection, operation, 1, (), {"account": name, "sessions_ended": ended})
    return ended


def listed(connection: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    """All accounts, without their passwords."""
    return rows(
        connection.execute(
            "select name, role, created_at, password_at, disabled_at, (select max(seen_at) from webhook.sessions s "
            "where s.account = a.name) as seen_at from webhook.accounts a order by name"
        )
    )


def stored(connection: Connection, name: str) -> tuple[str, str] | None:
    """Role and hash of an account that may log in; None when there is none."""
    row = connection.execute(
        "select role, password from webhook.accounts where name = %s and disabled_at is null", (name,)
    ).fetchone()
    return (str(row[0]), str(row[1])) if row else None


def proves(kept: str | None, password: str) -> bool:
    """Whether the password is the account's. Takes as long where there is no account; one at a time, for its memory."""
    with _ONE_AT_A_TIME:
        try:
            return HASHER.verify(kept or _NOBODY, password[: PASSWORD_MAX + 1]) and kept is not None
        except (VerificationError, InvalidHashError):
            return False


def add_token(connection: psycopg.Connection[Any], name: str, role: str, operation: audit.Operation) -> str:
    """Make a token and return it: it is never shown again. Raises AccountError."""
    check_name(name)
    _role(role)
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    try:
        with connection.transaction():
            connection.execute(
                "insert into webhook.api_tokens (name, role, token_sha256, created_by) values (%s, %s, %s, %s)",
                (name, role, digest(token), operation.who),
            )
            audit.record(connection, operation, 1, (), {"token": name, "role": role})
    except errors.UniqueViolation:
        raise AccountError("exists", f"there is a token {name} already: revoke it first") from None
    return token


def revoke_token(connection: psycopg.Connection[Any], name: str, operation: audit.Operation) -> None:
    """End a token. Raises AccountError."""
    with connection.transaction():
        changed = connection.execute(
            "update webhook.api_tokens set revoked_at = now() where name = %s and revoked_at is null", (name,)
        ).rowcount
        if not changed:
            raise AccountError("missing", f"there is no token {name} in use")
        audit.record(connection, operation, 1, (), {"token": name})


def tokens(connection: psycopg.Connection[Any]) -> list[dict[str, Any]]:
    """All tokens, without what proves them."""
    return rows(
        connection.execute(
            "select name, role, created_at, created_by, revoked_at from webhook.api_tokens order by id"
        )
    )


def by_token(connection: Connection, token: str) -> Who | None:
    """Who holds a token; None when it is not in use."""
    row = connection.execute(
        "select name, role from webhook.api_tokens where token_sha256 = %s and revoked_at is null",
        (digest(token),),
    ).fetchone()
    return Who(f"token:{row[0]}", str(row[1])) if row else None
