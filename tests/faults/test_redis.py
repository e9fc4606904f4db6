"""Redis loses what it held, dies, or is away: deliveries are taken as ever, and each has its one stream entry."""

from __future__ import annotations

import time
from collections.abc import Callable

import redis

from tests.faults.conftest import size
from tests.support.stackproc import Stack


def count() -> int:
    return size("EVENTS", 120, 1500)


def test_redis_flushed_under_load(stack: Stack, report: Callable[..., None]) -> None:
    with stack.load("redis-flushed", count()) as (ledger, _):
        stack.wait(lambda: stack.redis_client.exists(stack.stream), "the stream has entries")
        lost = stack.destroy_stream(everything=True)
    stack.verify()
    ledger.undisturbed()
    report(ledger, entries_destroyed=lost)


def test_redis_killed_under_load(stack: Stack, report: Callable[..., None]) -> None:
    """What it has answered is on its disk, and what it has not answered is tried again without a second entry."""
    with stack.load("redis-killed", count()) as (ledger, _):
        for _ in range(size("RESTARTS", 2, 10)):
            stack.site.redis.kill()
            time.sleep(0.5)
            stack.site.redis.start()
            time.sleep(0.5)
    stack.verify()
    ledger.undisturbed()
    report(ledger)


def test_redis_answers_lost(stack: Stack, report: Callable[..., None]) -> None:
    """The entry is added, and the worker never hears of it: it asks again, and there is still one entry."""
    with stack.load("redis-cut", count()) as (ledger, sender):
        before = stack.redis.cuts
        stack.redis.faults.lose_answer = 0.4
        stack.wait(
            lambda: not sender.open and stack.redis.cuts - before > 3, "all are accepted, answers lost"
        )
        cuts = stack.redis.cuts - before
        stack.redis.calm()
    stack.verify()
    ledger.undisturbed()
    report(ledger, cuts=cuts)


def test_stream_and_group_deleted_under_load(stack: Stack, report: Callable[..., None]) -> None:
    stack.redis_client.xgroup_create(stack.stream, "bot", id="0", mkstream=True)
    with stack.load("stream-deleted", count()) as (ledger, _):
        stack.wait(lambda: stack.redis_client.xlen(stack.stream), "the stream has entries")
        lost = stack.destroy_stream(everything=False)
    stack.verify()
    ledger.undisturbed()
    assert stack.redis_client.type(stack.stream) == "stream"
    # The group went with the stream; a consumer makes it again and reads from the start.
    stack.redis_client.xgroup_create(stack.stream, "bot", id="0")
    read = stack.redis_client.xreadgroup("bot", "one", {stack.stream: ">"}, count=100_000)
    assert len(read[0][1]) == stack.redis_client.xlen(stack.stream)  # type: ignore[index, arg-type]
    assert isinstance(stack.redis_client, redis.Redis)
    report(ledger, entries_destroyed=lost)
