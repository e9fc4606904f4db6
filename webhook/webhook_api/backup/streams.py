"""Redis: the streams with their consumer groups, and the markers that keep an entry from being added twice.

Only our own keys: the same Redis may serve others. Read after the database was dumped, so that an entry whose effect
the dump does not know yet brings its marker along, and is not added a second time after a restore.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any, Final

import redis

from webhook_api.backup import BackupError, Member, Tally, Writer, members
from webhook_api.effects.stream import stream_name

PART: Final = "redis"
_BATCH: Final = 500


def client_of(url: str, password: str | None) -> redis.Redis:
    """A client for bytes as they are: a dumped key is no text."""
    options: dict[str, Any] = {"password": password} if password else {}
    return redis.Redis.from_url(url, socket_connect_timeout=5.0, socket_timeout=60.0, **options)


def _keys(client: redis.Redis, stream: str) -> Iterator[bytes]:
    """The markers first, the streams last: an entry never comes without its marker."""
    names = [stream_name(stream, probe) for probe in (False, True)]
    for name in names:
        escaped = "".join(f"\\{letter}" if letter in "*?[]^\\" else letter for letter in name)
        yield from client.scan_iter(match=f"{{{escaped}}}:sent:*", count=1000)
    for name in names:
        yield name.encode()


def measure(client: redis.Redis, stream: str) -> Tally:
    """Count our keys and about how much memory they take."""
    tally = Tally(PART)
    for name in (stream_name(stream, probe) for probe in (False, True)):
        used: Any = client.memory_usage(name, samples=100)
        if used:
            tally.add(int(used))
    markers = sum(1 for _ in _keys(client, stream)) - 2
    tally.count, tally.bytes = tally.count + markers, tally.bytes + markers * 1024
    return tally


def export(client: redis.Redis, stream: str, output: IO[bytes]) -> Tally:
    """Write our keys as Redis dumps them (DUMP), each with the time that it has left."""
    writer = Writer(output, PART)
    keys = _keys(client, stream)
    while batch := list(islice(keys, _BATCH)):
        pipeline = client.pipeline(transaction=False)
        for key in batch:
            pipeline.dump(key)
            pipeline.pttl(key)
        answers: list[Any] = pipeline.execute()
        for key, data, left in zip(batch, answers[::2], answers[1::2], strict=True):
            if data is not None:
                writer.add(key.decode(), len(data), io.BytesIO(data), {"pttl": str(max(0, int(left)))})
    return writer.end()


def restore(client: redis.Redis, source: IO[bytes]) -> Tally:
    """Write the keys back, in place of those of the same name. Raises BackupError when this Redis cannot read them."""
    tally = Tally(PART)
    incoming = members(source, PART)
    while batch := [(member, member.body.read()) for member in islice(incoming, _BATCH)]:
        _write(client, batch)
        for member, _ in batch:
            tally.add(member.size)
    return tally


def _write(client: redis.Redis, batch: list[tuple[Member, bytes]]) -> None:
    pipeline = client.pipeline(transaction=False)
    for member, data in batch:
        pipeline.restore(member.name, int(member.fields.get("pttl", "0")), data, replace=True)
    for answer in pipeline.execute(raise_on_error=False):
        if isinstance(answer, redis.ResponseError) and "DUMP payload" in str(answer):
            raise BackupError(
                "incompatible", "this Redis is older than the one of the backup: take the same version"
            )
        if isinstance(answer, Exception):
            raise answer
