#!/usr/bin/env python3
"""How a bot reads the webhook's stream: a consumer group, so that nothing is lost when a consumer dies.

Copy it and put your own `tell` in. What makes it safe:

- An entry is acknowledged after the transaction that handled it, never before. A consumer that dies leaves its entries
  pending; another one takes them over (XAUTOCLAIM) once they have been idle for `idle_seconds`.
- So an entry can come twice. `bot_deliveries` remembers which were handled, in the same transaction as the rest.
- The entry only says that something happened. What is told to a user is read from the `avatars` row, and only when it
  differs from what was told before (`bot_told`). So neither order nor repetition nor a lost stream can make it wrong.
- The group, or the whole stream, can be missing (a new Redis, a Redis that was lost): the group is made again, and
  `catch_up` tells what happened meanwhile, from the rows.
- An entry that nobody can handle is set aside after `max_tries` in `<stream>:failed:<group>`, with an error in the log.

    REDIS_URL=redis://… DATABASE_URL=postgresql://… python3 bot_consumer.py
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
import redis

log = logging.getLogger("bot")

# Two consumers that begin at once would otherwise collide, "if not exists" or not.
TABLES = """
select pg_advisory_xact_lock(hashtext('bot_consumer'));
create table if not exists bot_deliveries (
    delivery_id bigint, request_id text, replay integer not null default 0,
    handled_at timestamptz not null default now(), primary key (delivery_id, request_id, replay));
create table if not exists bot_told (
    avatar_id text primary key, status text not null, told_at timestamptz not null default now());
"""
# delivery_id alone would do as long as the webhook's database is never made anew and no operator asks for an entry again.
FIRST_TIME = """
insert into bot_deliveries (delivery_id, request_id, replay) values (%s, %s, %s) on conflict do nothing returning 1
"""
AVATAR = """
select id::text, lower(status::text), name, training_error from avatars where id::text = %s for update
"""
NEWS = """
insert into bot_told (avatar_id, status) values (%s, %s)
on conflict (avatar_id) do update set status = excluded.status, told_at = now()
where bot_told.status <> excluded.status
returning 1
"""
MISSED = """
select a.id::text from avatars a
where lower(a.status::text) in ('completed', 'error', 'cancelled') and a.updated_at > now() - %s * interval '1 second'
  and not exists (select from bot_told t where t.avatar_id = a.id::text and t.status = lower(a.status::text))
"""


@dataclass(frozen=True)
class Avatar:
    """What a user is told about."""

    id: str
    status: str
    name: str | None
    error: str | None


#: Tells the user. Called inside the transaction: what it writes through the connection is written exactly once. A
#: message to the outside goes at least once: it is sent again when the process dies before the transaction's end.
Tell = Callable[[psycopg.Connection[Any], Avatar], None]


class Consumer:
    """One consumer of a group. Several may run, in as many processes; each entry is handled by one of them."""

    def __init__(
        self,
        client: redis.Redis,
        connect: Callable[[], psycopg.Connection[Any]],
        tell: Tell,
        *,
        stream: str = "aisha:webhook:events",
        group: str = "bot",
        name: str | None = None,
        idle_seconds: float = 60.0,
        block_seconds: float = 5.0,
        max_tries: int = 10,
        catch_up_seconds: float = 7 * 86_400.0,
    ) -> None:
        """`client` decodes its answers and has a `socket_timeout` above `block_seconds`.

        `idle_seconds` has to be longer than handling one entry ever takes: a shorter one makes two do the same work.
        """
        self._redis = client
        self._connect = connect
        self._tell = tell
        self._stream, self._group = stream, group
        self._name = name or f"{socket.gethostname()}:{os.getpid()}"
        self._idle_ms = int(idle_seconds * 1000)
        self._block_ms = max(1, int(block_seconds * 1000))
        self._max_tries = max_tries
        self._catch_up_seconds = catch_up_seconds
        self._connection: psycopg.Connection[Any] | None = None
        self._stopping = False
        self._claimed_at = 0.0
        self._cursor = "0-0"

    def stop(self) -> None:
        """Ask for an end after the entry that is being handled."""
        self._stopping = True

    def run(self) -> None:
        """Handle entries until `stop`. Outages of Redis and PostgreSQL are waited for."""
        wait = 0.5
        begun = False
        try:
            while not self._stopping:
                try:
                    if not begun:
                        self._begin()
                        begun = True
                    self._turn()
                    wait = 0.5
                except (redis.RedisError, psycopg.OperationalError, psycopg.InterfaceError) as error:
                    # Whatever was lost: look for the group, and for what happened meanwhile.
                    begun = False
                    if "NOGROUP" not in str(error):
                        log.warning("waiting for Redis or PostgreSQL: %s", error)
                        self._rest(wait)
                        wait = min(30.0, wait * 2)
        finally:
            self._close()

    def _rest(self, seconds: float) -> None:
        self._close()
        ends = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < ends:
            time.sleep(0.1)

    def _begin(self) -> None:
        """Tables, group, and what happened while nobody listened."""
        with self._database().transaction():
            self._database().execute(TABLES)
        try:
            # From 0, not from $: what stands in the stream before the group was made is handled as well.
            self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._cursor = "0-0"
        self._claimed_at = 0.0
        self._forget_consumers()
        self.catch_up()

    def _forget_consumers(self) -> None:
        """Remove the names of consumers that left nothing and were not heard of for a day."""
        known: Any = self._redis.xinfo_consumers(self._stream, self._group)
        for consumer in known:
            if consumer["pending"] == 0 and consumer["idle"] > 86_400_000:
                self._redis.xgroup_delconsumer(self._stream, self._group, consumer["name"])

    def catch_up(self) -> None:
        """Tell what the rows say and nobody was told: for example after Redis had lost the stream."""
        for (avatar_id,) in self._database().execute(MISSED, (self._catch_up_seconds,)).fetchall():
            with self._database().transaction():
                self._tell_news(str(avatar_id))

    def _turn(self) -> None:
        if time.monotonic() - self._claimed_at > self._idle_ms / 2000:
            self._take_over()
        answer: Any = self._redis.xreadgroup(
            self._group, self._name, {self._stream: ">"}, count=16, block=self._block_ms
        )
        for _, entries in answer or ():
            self._handle_all(entries)

    def _take_over(self) -> None:
        """Handle what consumers that died (or this one, in a former life) have left."""
        while not self._stopping:
            answer: Any = self._redis.xautoclaim(
                self._stream, self._group, self._name, self._idle_ms, self._cursor, count=16
            )
            self._cursor, entries = answer[0], answer[1]
            # An entry that MAXLEN has removed comes without fields: its rows are told by `catch_up`.
            self._handle_all([entry for entry in entries if entry[1]])
            if self._cursor == "0-0":
                break
        self._claimed_at = time.monotonic()

    def _handle_all(self, entries: list[tuple[str, dict[str, str]]]) -> None:
        for entry_id, fields in entries:
            if self._stopping:
                return  # it stays pending, and is taken over
            try:
                self.handle(fields)
            except (redis.RedisError, psycopg.OperationalError, psycopg.InterfaceError):
                raise
            except Exception:
                log.exception("entry %s could not be handled", entry_id)
                if not self._given_up(entry_id, fields):
                    continue
            self._redis.xack(self._stream, self._group, entry_id)

    def _given_up(self, entry_id: str, fields: dict[str, str]) -> bool:
        """Set an entry aside that was tried often enough; otherwise it stays pending and comes again."""
        pending: Any = self._redis.xpending_range(self._stream, self._group, entry_id, entry_id, 1)
        if not pending or pending[0]["times_delivered"] < self._max_tries:
            return False
        self._redis.xadd(f"{self._stream}:failed:{self._group}", {**fields, "entry": entry_id}, maxlen=10_000)
        log.error("entry %s was set aside after %d tries", entry_id, self._max_tries)
        return True

    def handle(self, fields: dict[str, str]) -> None:
        """Handle one entry, in one transaction."""
        connection = self._database()
        with connection.transaction():
            first = connection.execute(
                FIRST_TIME,
                (int(fields["delivery_id"]), fields["request_id"], int(fields.get("replay", "0"))),
            ).fetchone()
            if first is not None and fields.get("avatar_id"):
                self._tell_news(fields["avatar_id"])

    def _tell_news(self, avatar_id: str) -> None:
        connection = self._database()
        row = connection.execute(AVATAR, (avatar_id,)).fetchone()
        if row is not None and connection.execute(NEWS, (row[0], row[1])).fetchone() is not None:
            self._tell(connection, Avatar(*row))

    def _database(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def tell(_connection: psycopg.Connection[Any], avatar: Avatar) -> None:
    """Put your bot's message here."""
    log.info("avatar %s (%s) is %s %s", avatar.id, avatar.name, avatar.status, avatar.error or "")


def main() -> None:
    """Run until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    client = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True, socket_timeout=30)
    database_url = os.environ["DATABASE_URL"]
    consumer = Consumer(
        client,
        lambda: psycopg.connect(database_url, autocommit=True, connect_timeout=5),
        tell,
        stream=os.environ.get("REDIS_STREAM", "aisha:webhook:events"),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: consumer.stop())
    consumer.run()
    sys.exit(0)


if __name__ == "__main__":
    main()
