"""Sessions: a random token in a cookie, its digest in the database, and what is derived from it against forged forms."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from webhook_api import audit
from webhook_api.config_console import ConsoleSettings
from webhook_api.db import Connection
from webhook_api.web.accounts import Who, digest

TOUCH: Final = 60
"""Seconds between two notes that a session is in use."""

_FIND: Final = """
select s.account, a.role, s.created_at, s.seen_at < now() - make_interval(secs => %(touch)s)
from webhook.sessions s join webhook.accounts a on a.name = s.account
where s.token_sha256 = %(token)s and a.disabled_at is null
  and s.seen_at > now() - make_interval(secs => %(idle)s)
  and s.created_at > now() - make_interval(secs => %(longest)s)
"""
_CLEAR: Final = """
delete from webhook.sessions where token_sha256 in (
    select token_sha256 from webhook.sessions
    where seen_at < now() - make_interval(secs => %(idle)s)
       or created_at < now() - make_interval(secs => %(longest)s) limit 500)
"""


@dataclass(frozen=True, slots=True)
class Session:
    """A login that is open."""

    who: Who
    since: datetime
    due: bool
    """Whether it is time to note that it is in use."""


def fresh() -> str:
    """A token that nobody can guess."""
    return secrets.token_urlsafe(32)


def form_token(token: str) -> str:
    """What a form of this session carries: derived, so that it needs no place, and says nothing about the token."""
    return hmac.new(token.encode("utf-8", "surrogatepass"), b"form", hashlib.sha256).hexdigest()


def form_fits(token: str, given: str) -> bool:
    """Whether a form was made for this session."""
    return hmac.compare_digest(form_token(token).encode(), given.encode("utf-8", "surrogatepass"))


def begin(
    connection: Connection, who: Who, settings: ConsoleSettings, address: str, operation: audit.Operation
) -> str:
    """Open a session and return its token; those that have ended are cleared away."""
    token = fresh()
    with connection.transaction():
        connection.execute(_CLEAR, {"idle": settings.idle, "longest": settings.longest})
        connection.execute(
            "insert into webhook.sessions (token_sha256, account, address) values (%s, %s, %s)",
            (digest(token), who.name, address),
        )
        audit.record(connection, operation, 0, (), {"address": address})
    return token


def find(connection: Connection, token: str, settings: ConsoleSettings) -> Session | None:
    """The session of a token, unless it has ended."""
    values = {"token": digest(token), "idle": settings.idle, "longest": settings.longest, "touch": TOUCH}
    row = connection.execute(_FIND, values).fetchone()
    return Session(Who(str(row[0]), str(row[1])), row[2], bool(row[3])) if row else None


def touch(connection: Connection, token: str) -> None:
    """Note that a session is in use."""
    connection.execute(
        "update webhook.sessions set seen_at = now() where token_sha256 = %s", (digest(token),)
    )


def end(connection: Connection, token: str) -> None:
    """Close a session."""
    connection.execute("delete from webhook.sessions where token_sha256 = %s", (digest(token),))
