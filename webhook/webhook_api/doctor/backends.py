"""Redis, the object store, fal's keys, and the clocks of all of them against ours."""

from __future__ import annotations

import contextlib
import email.utils
import io
import time
import uuid
from collections.abc import Iterator
from typing import Any, Final

import psycopg
import redis
import urllib3
from minio.error import MinioException

from webhook_api.config import Settings
from webhook_api.db import connect
from webhook_api.doctor import Finding, fail, ok, skip, warn

CLOCK_WARN: Final = 5.0
CLOCK_FAIL: Final = 60.0
"""Seconds; signatures are refused from 300 s on."""
HTTP_RESOLUTION: Final = 1.0
"""Seconds: the Date header counts whole ones."""
PENDING_WARN: Final = 1000
"""Entries that were read by a consumer of the stream and never acknowledged."""
PROBE_KEY: Final = "doctor/"
_SECONDS: Final = 4.0


def clocks(settings: Settings) -> Iterator[Finding]:
    """Our clock against PostgreSQL's and that of the host which serves fal's keys."""
    seen = []
    with contextlib.suppress(psycopg.Error):
        seen.append(_database_clock(settings))
    if settings.fal_jwks_url:
        with contextlib.suppress(urllib3.exceptions.HTTPError, TypeError, ValueError):
            seen.append(_http_clock(settings.fal_jwks_url))
    if not seen:
        yield skip("clock", "nobody could be asked for the time")
    for name, ahead, resolution in seen:
        distance = max(0.0, abs(ahead) - resolution)
        said = f"{name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine"
        advice = "let NTP set the clock (timedatectl); deliveries count as stale or future from 300 s on"
        if distance > CLOCK_FAIL:
            yield fail("clock", said, advice, seconds=round(ahead, 1))
        elif distance > CLOCK_WARN:
            yield warn("clock", said, advice, seconds=round(ahead, 1))
        else:
            yield ok("clock", f"agrees with {name} ({ahead:+.1f} s)", seconds=round(ahead, 1))


def _database_clock(settings: Settings) -> tuple[str, float, float]:
    with connect(settings.database_url, "webhook-doctor", statement_timeout=_SECONDS) as connection:
        before = time.time()
        row = connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
        return "PostgreSQL", float(row[0]) - (before + time.time()) / 2 if row else 0.0, 0.0


def _http_clock(url: str) -> tuple[str, float, float]:
    pool = urllib3.PoolManager(timeout=_SECONDS, retries=False)
    before = time.time()
    response = pool.request("GET", url, preload_content=False, redirect=False)
    try:
        there = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
    finally:
        response.close()
    return urllib3.util.parse_url(url).host or url, there + 0.5 - (before + time.time()) / 2, HTTP_RESOLUTION


def _client(settings: Settings) -> redis.Redis:
    from webhook_api.outlets import redis_client

    return redis_client(settings)


def redis_server(settings: Settings) -> Iterator[Finding]:
    """It answers, keeps what it is given, and throws nothing away when it is full."""
    client = _client(settings)
    try:
        info: Any = client.info()
    except redis.RedisError as error:
        yield fail("redis", f"cannot be used: {type(error).__name__}: {_line(error)}",
                   "deliveries wait until it is back: start it; compare REDIS_URL and its password file")  # fmt: skip
        return
    finally:
        client.close()
    yield ok("redis", f"Redis {info.get('redis_version')}, {info.get('used_memory_human')} in use")
    if info.get("role") == "slave":
        yield fail("redis", "is a replica: it takes no writes", "point REDIS_URL at the master")
    if not info.get("aof_enabled"):
        yield warn("redis", "has no append-only file: a restart forgets entries that the bot has not read",
                   "set appendonly yes")  # fmt: skip
    if info.get("aof_last_write_status") == "err" or info.get("rdb_last_bgsave_status") == "err":
        yield fail("redis", "cannot write to its disk", "make room on its volume; see its log")
    policy = info.get("maxmemory_policy")
    if info.get("maxmemory") and policy != "noeviction":
        yield warn("redis", f"throws keys away when it is full ({policy})", "set maxmemory-policy noeviction")


def stream(settings: Settings) -> Iterator[Finding]:
    """How long the stream is, and how far its readers are behind."""
    client, name = _client(settings), settings.redis_stream
    try:
        kind: Any = client.type(name)
        length: Any = client.xlen(name) if kind == "stream" else 0
        groups: Any = client.xinfo_groups(name) if kind == "stream" else []
    except redis.RedisError as error:
        yield skip("stream", f"not looked at: {type(error).__name__}")
        return
    finally:
        client.close()
    if kind not in ("stream", "none"):
        yield fail(
            "stream", f"the key {name} is a {kind}, not a stream", "rename that key, or set REDIS_STREAM"
        )
        return
    yield ok(
        "stream",
        f"{name} holds {length} of at most about {settings.redis_stream_maxlen} entries",
        length=length,
    )
    for group in groups:
        behind = group.get("lag")
        said = f"group {group['name']}: {group['pending']} not acknowledged, {'?' if behind is None else behind} not read"
        detail = {"group": group["name"], "pending": group["pending"], "lag": behind}
        if group["pending"] > PENDING_WARN or (behind or 0) > settings.redis_stream_maxlen // 2:
            yield warn(
                "stream",
                said,
                "is this consumer running? Beyond the limit the oldest entries are dropped",
                **detail,
            )
        else:
            yield ok("stream", said, **detail)
    if length and not groups:
        yield warn(
            "stream", "has entries and no consumer group", "the bot reads it by a group: docs/receiver/bot.md"
        )


def object_store(settings: Settings) -> Iterator[Finding]:
    """The bucket takes an object, gives it back, and lets it be removed."""
    from webhook_api.outlets import minio_client

    bucket, key, data = settings.minio_bucket, f"{PROBE_KEY}{uuid.uuid4().hex}", uuid.uuid4().bytes
    client = minio_client(settings)
    client._http = urllib3.PoolManager(timeout=urllib3.Timeout(connect=2.0, read=_SECONDS), retries=False)
    remedy = (
        "deliveries wait until it is back: compare MINIO_ENDPOINT, the keys' files and the bucket's rights"
    )
    try:
        if not client.bucket_exists(bucket):
            yield warn(
                "object store",
                f"the bucket {bucket} is not there",
                "the worker makes it when it first stores",
            )
            return
        client.put_object(bucket, key, io.BytesIO(data), len(data))
        answer = client.get_object(bucket, key)
        try:
            same = answer.read() == data
        finally:
            answer.close()
            answer.release_conn()
        client.remove_object(bucket, key)
    except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
        said = getattr(error, "code", None) or f"{type(error).__name__}: {_line(error)}"
        yield fail("object store", f"{settings.minio_endpoint}, bucket {bucket}: {said}", remedy)
        return
    if same:
        yield ok(
            "object store", f"{settings.minio_endpoint}: the bucket {bucket} can be written, read and cleared"
        )
    else:
        yield fail(
            "object store",
            "gives back other bytes than it was given",
            "do not trust this server with anything",
        )


def keys(settings: Settings) -> Iterator[Finding]:
    """fal's keys can be had, now or from the cache."""
    from webhook_api.auth import AuthError, KeyStore
    from webhook_api.auth.keys import KeySourceError, key_source, parse_jwks

    source = key_source(settings.fal_jwks_url, settings.fal_jwks_file)
    try:
        found = parse_jwks(source.fetch())
        yield ok("keys", f"{len(found)} of {source.name}", keys=len(found))
    except KeySourceError as error:
        advice = f"can this machine reach {source.name}? webhook-api keys show tells what is known"
        try:
            store = KeyStore(source, cache_file=settings.fal_jwks_cache_file, wait=0.0)
            cached = len(store.current())
        except AuthError:
            cached = 0
        make = warn if cached else fail
        yield make(
            "keys", f"cannot be fetched ({error.reason}: {error}); {cached} are cached", advice, cached=cached
        )
    if settings.learning_accounts:
        yield warn("keys", "no fal account is pinned: any customer of fal may deliver, or the first one that did",
                   "webhook-api keys show names the account that was learned: put it into FAL_ACCOUNT_IDS")  # fmt: skip


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
