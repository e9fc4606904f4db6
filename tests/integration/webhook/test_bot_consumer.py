"""The example of a bot's consumer, against real Redis and PostgreSQL, with entries of the real worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import redis

from tests.support.workerlab import REPO, Lab, wait_for

sys.path.insert(0, str(REPO / "examples"))
from bot_consumer import Avatar, Consumer

pytestmark = pytest.mark.backends

_CHILD = """
import sys, time, psycopg, redis
from bot_consumer import Consumer
redis_url, database_url, stream, where = sys.argv[1:]
def tell(connection, avatar):
    connection.execute("insert into told (avatar_id, status) values (%s, %s)", (avatar.id, avatar.status))
    if where == "before the commit":
        print("here", flush=True)
        time.sleep(600)
class Child(Consumer):
    def handle(self, fields):
        super().handle(fields)
        if where == "before the acknowledgement":
            print("here", flush=True)
            time.sleep(600)
Child(redis.Redis.from_url(redis_url, decode_responses=True, socket_timeout=30),
      lambda: psycopg.connect(database_url, autocommit=True), tell, stream=stream, idle_seconds=60).run()
"""


@pytest.fixture
def bench(bench: Lab) -> Lab:
    bench.connection.execute("create table told (avatar_id text, status text)")
    return bench


def told(bench: Lab) -> list[tuple[str, str]]:
    return list(bench.connection.execute("select avatar_id, status from told order by 1, 2").fetchall())


def tell(connection: psycopg.Connection[Any], avatar: Avatar) -> None:
    connection.execute("insert into told (avatar_id, status) values (%s, %s)", (avatar.id, avatar.status))


@contextmanager
def consumer(bench: Lab, how: Any = tell, **more: Any) -> Iterator[Consumer]:
    client = redis.Redis.from_url(bench.redis_url, decode_responses=True, socket_timeout=30)
    options = {"idle_seconds": 0.5, "block_seconds": 0.2, **more}
    made = Consumer(
        client,
        lambda: psycopg.connect(bench.database_url, autocommit=True),
        how,
        stream=bench.stream,
        **options,
    )
    thread = threading.Thread(target=made.run, name="bot")
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join(30)
        client.close()
        assert not thread.is_alive()


def train(bench: Lab, *requests: str) -> list[tuple[str, str]]:
    """Avatars whose trainings end, with entries of the real worker; returns what has to be told."""
    expected = []
    with bench.worker():
        for request in requests:
            expected.append((bench.avatar(request, kind="style"), "completed"))
            body = {"request_id": request, "status": "OK", "payload": {"finetune_id": "ft"}}
            bench.wait_state(bench.deliver(body, "completed"), "done")
    return sorted(expected)


def pending(bench: Lab) -> int:
    """Entries that were read and not acknowledged; -1 while there is no group."""
    try:
        return int(bench.redis.xpending(bench.stream, "bot")["pending"])  # type: ignore[index]
    except redis.ResponseError:
        return -1


def test_every_entry_is_told_once_by_any_number_of_consumers(bench: Lab) -> None:
    expected = train(bench, *(f"r-{number}" for number in range(10)))
    with consumer(bench, name="one"), consumer(bench, name="two"):
        wait_for(lambda: len(told(bench)) == 10, "all told")
        expected += train(bench, *(f"s-{number}" for number in range(10)))
        wait_for(lambda: len(told(bench)) == 20 and pending(bench) == 0, "all told and acknowledged")
    assert told(bench) == sorted(expected)


@pytest.mark.parametrize("where", ["before the commit", "before the acknowledgement"])
def test_a_consumer_that_is_killed_leaves_its_entry_to_another(bench: Lab, where: str) -> None:
    # The child may catch up from the rows first: an avatar that is still in training is told by its entry alone.
    avatar = bench.avatar("r-1", kind="style")
    with bench.worker():
        progress = {"request_id": "r-1", "status": "IN_PROGRESS"}
        bench.wait_state(bench.deliver(progress, "in_progress"), "done")
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, bench.redis_url, bench.database_url, bench.stream, where],
        env={**os.environ, "PYTHONPATH": str(REPO / "examples")},
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()
    assert pending(bench) == 1
    assert len(told(bench)) == (where == "before the acknowledgement")
    with consumer(bench):
        wait_for(lambda: pending(bench) == 0, "taken over")
    assert told(bench) == [(avatar, "training")]
    assert bench.connection.execute("select count(*) from bot_deliveries").fetchone() == (1,)


def test_an_entry_that_comes_again_changes_nothing(bench: Lab) -> None:
    expected = train(bench, "r-1")
    (fields,) = bench.entries()
    for _ in range(5):
        bench.redis.xadd(bench.stream, fields)  # type: ignore[arg-type]
    bench.redis.xadd(bench.stream, {**fields, "delivery_id": "999999"})
    with consumer(bench):
        wait_for(lambda: bench.redis.exists(bench.stream) and _read(bench) == 7, "all read")
        wait_for(lambda: pending(bench) == 0, "all acknowledged")
    assert told(bench) == expected


def _read(bench: Lab) -> int:
    groups: Any = bench.redis.xinfo_groups(bench.stream)
    return int(groups[0]["entries-read"] or 0) if groups else 0


def test_a_lost_stream_is_made_up_for_from_the_rows(bench: Lab) -> None:
    expected = train(bench, "r-1")
    with consumer(bench):
        wait_for(lambda: told(bench) == expected, "the first is told")
    # Redis is lost with an entry that nobody has read.
    expected = sorted(expected + train(bench, "r-2"))
    bench.redis.delete(bench.stream)
    with consumer(bench):
        wait_for(lambda: told(bench) == expected, "the second is told without its entry")
        # And once more while the consumer is waiting for entries.
        bench.redis.delete(bench.stream)
        expected = sorted(expected + train(bench, "r-3"))
        wait_for(lambda: told(bench) == expected, "the third is told")
        wait_for(lambda: bench.redis.exists(bench.stream) and pending(bench) == 0, "nothing is left")
    (group,) = bench.redis.xinfo_groups(bench.stream)  # type: ignore[union-attr]
    assert group["name"] == "bot"


def test_a_group_that_is_gone_is_made_again(bench: Lab) -> None:
    expected = train(bench, "r-1")
    with consumer(bench):
        wait_for(lambda: told(bench) == expected, "the first is told")
        bench.redis.xgroup_destroy(bench.stream, "bot")
        expected = sorted(expected + train(bench, "r-2"))
        wait_for(lambda: told(bench) == expected and pending(bench) == 0, "the second is told")


def test_an_entry_that_nobody_can_handle_stops_nobody(bench: Lab) -> None:
    bench.redis.xadd(bench.stream, {"delivery_id": "not a number", "request_id": "r-0"})
    expected = train(bench, "r-1")
    with consumer(bench, idle_seconds=0.05, max_tries=3):
        wait_for(lambda: told(bench) == expected, "the good one is told")
        wait_for(lambda: bench.redis.xlen(f"{bench.stream}:failed:bot") == 1, "the bad one is set aside")
        wait_for(lambda: pending(bench) == 0, "nothing is left")
    ((_, aside),) = bench.redis.xrange(f"{bench.stream}:failed:bot")  # type: ignore[union-attr]
    assert aside["delivery_id"] == "not a number"
    assert aside["entry"]


def test_the_program_runs_and_stops_in_good_order(bench: Lab) -> None:
    train(bench, "r-1")
    child = subprocess.Popen(
        [sys.executable, str(REPO / "examples" / "bot_consumer.py")],
        env={
            **os.environ,
            "REDIS_URL": bench.redis_url,
            "DATABASE_URL": bench.database_url,
            "REDIS_STREAM": bench.stream,
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        assert "is completed" in child.stderr.readline()
        child.terminate()
        assert child.wait(30) == 0
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()
