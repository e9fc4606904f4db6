"""Workers killed, cut off and raced in the middle of their batches: every effect of every delivery happens exactly once.

fal.md, the right answer to each fault: worker killed in the middle; Redis or object store down. And what implementers get
wrong, 8: nothing that was stored is ever left unprocessed because something was away when it should have been told.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.trouble import Faults, Trouble, trouble
from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends

SEED = 20_261_123
KILLS = 24


@pytest.fixture
def bench(bench: Lab) -> Lab:
    bench.count_changes()
    return bench


def names(count: int) -> list[str]:
    return [f"r-{number:04}" for number in range(count)]


def left(bench: Lab) -> int:
    row = bench.connection.execute("select count(*) from webhook.deliveries where state <> 'done'").fetchone()
    assert row is not None
    return int(row[0])


def drained(bench: Lab, seconds: float = 90.0) -> None:
    def empty() -> bool:
        bench.hurry()
        return left(bench) == 0

    wait_for(empty, "all deliveries done", seconds)


def through(url: str, proxy: Trouble) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{proxy.address}").geturl()


def target(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


def at_work(bench: Lab, name: str) -> bool:
    """Whether this worker is in the middle of something."""
    row = bench.connection.execute(
        "select 1 from webhook.deliveries where state = 'leased' and lease_owner like %s limit 1",
        (f"{name}:%",),
    ).fetchone()
    return row is not None


def work(environ: dict[str, str], heartbeat: str) -> None:
    """A worker's process."""
    from webhook_api.config import NEEDS_WORKER, load_settings
    from webhook_api.worker import run

    run(load_settings(environ, NEEDS_WORKER), Path(heartbeat))


class Workers:
    """Processes that are ready in a moment: what they import is there already."""

    def __init__(self, bench: Lab, **changes: str) -> None:
        self._bench = bench
        self._changes = changes
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["webhook_api.worker", "webhook_api.cli"])
        self._all: list[BaseProcess] = []

    def start(self) -> BaseProcess:
        environ = self._bench.environ(INSTANCE_ID=f"worker-{len(self._all)}", **self._changes)
        heartbeat = str(self._bench.tmp_path / f"heartbeat-{len(self._all)}")
        process = self._context.Process(target=work, args=(environ, heartbeat), daemon=True)
        process.start()
        self._all.append(process)
        return process

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            if process.is_alive():
                process.kill()
            process.join(10)
            process.close()


def test_workers_killed_at_random_points_of_their_batches(bench: Lab) -> None:
    """24 SIGKILLs with a fixed seed while two workers race over the same backlog."""
    random_ = random.Random(SEED)
    waiting = names(600 * (KILLS + 1))
    request_ids: list[str] = []
    identifiers: list[int] = []

    def refill() -> None:
        """However fast the workers are, the next kill finds them at work."""
        if left(bench) < 600:
            more = waiting[len(request_ids) : len(request_ids) + 600]
            identifiers.extend(bench.deliver_styles(more))
            request_ids.extend(more)

    refill()
    changes = {"WORKER_BATCH_SIZE": "24", "EVENT_MAX_ATTEMPTS": "1000"}
    killed_at_work = 0
    with Workers(bench, **changes) as workers:
        # One more than two, so that two are at work while the third begins.
        running = [workers.start() for _ in range(3)]
        for number in range(KILLS):
            refill()
            # At a random moment of a batch: it has leases, and some of it has happened or not.
            wait_for(lambda name=f"worker-{number}": at_work(bench, name) or left(bench) == 0, "its leases")
            time.sleep(random_.uniform(0, 0.15))
            killed_at_work += left(bench) > 0
            running.pop(0).kill()
            running.append(workers.start())
        drained(bench)
    assert killed_at_work >= 20, "the backlog was too small for the kills to strike"
    crashes = bench.connection.execute("select sum(crashes) from webhook.deliveries").fetchone()
    assert crashes is not None
    assert crashes[0] > 0, "no kill struck a batch"
    bench.must_have_happened_once(identifiers, request_ids)


def test_two_workers_race_over_one_backlog(bench: Lab) -> None:
    request_ids = names(600)
    identifiers = bench.deliver_styles(request_ids)
    # A lease that a busy machine lets run out would be handled twice.
    with Workers(bench, WORKER_BATCH_SIZE="16", LEASE_SECONDS="120") as workers:
        workers.start()
        workers.start()
        drained(bench)
    bench.must_have_happened_once(identifiers, request_ids)
    tries = bench.connection.execute("select max(tries), max(crashes) from webhook.deliveries").fetchone()
    assert tries == (1, 0), "no delivery was handled twice"


def test_connections_to_postgresql_cut_in_the_middle_of_batches(bench: Lab) -> None:
    """Answers to statements that took effect are lost as well: a commit may have happened or not."""
    request_ids = names(500)
    identifiers = bench.deliver_styles(request_ids)
    with (
        trouble(*target(bench.database_url), seed=SEED) as proxy,
        bench.worker(
            DATABASE_URL=through(bench.database_url, proxy), WORKER_BATCH_SIZE="16", EVENT_MAX_ATTEMPTS="1000"
        ),
    ):
        wait_for(lambda: left(bench) < 480, "a beginning")
        proxy.faults = Faults(lose_request=0.02, lose_answer=0.02)
        wait_for(lambda: left(bench) == 0 or proxy.cuts >= 25, "cuts", 60)
        proxy.calm()
        drained(bench)
        assert proxy.cuts >= 5
    bench.must_have_happened_once(identifiers, request_ids)


def test_answers_of_redis_lost_in_the_middle_of_batches(bench: Lab) -> None:
    """The entries stand in the stream, and the worker doesn't know: the marker keeps them from being added again."""
    request_ids = names(150)
    identifiers = bench.deliver_styles(request_ids)
    with (
        trouble(*target(bench.redis_url), seed=SEED) as proxy,
        bench.worker(
            REDIS_URL=through(bench.redis_url, proxy), WORKER_BATCH_SIZE="16", EVENT_MAX_ATTEMPTS="1000"
        ),
    ):
        proxy.faults = Faults(lose_answer=0.3)
        wait_for(lambda: left(bench) == 0 or proxy.cuts >= 6, "cuts", 60)
        proxy.calm()
        drained(bench)
        assert proxy.cuts >= 3
    bench.must_have_happened_once(identifiers, request_ids)


def test_redis_and_the_object_store_away_hold_up_no_avatar(bench: Lab) -> None:
    """fal.md, Redis or object store down: the row waits and is tried for ever; the bot's table is right meanwhile."""
    request_ids = names(200)
    identifiers = bench.deliver_styles(request_ids)
    with ExitStack() as stack:
        redis_proxy = stack.enter_context(trouble(*target(bench.redis_url)))
        s3_proxy = stack.enter_context(trouble(*target(f"http://{bench.s3.endpoint}")))
        redis_proxy.down()
        s3_proxy.down()
        stack.enter_context(
            bench.worker(REDIS_URL=through(bench.redis_url, redis_proxy), MINIO_ENDPOINT=s3_proxy.address)
        )

        def changed() -> bool:
            row = bench.connection.execute("select count(*) from changes").fetchone()
            return row == (200,)

        wait_for(changed, "all avatars completed", 90)
        wait_for(
            lambda: (
                bench.connection.execute(
                    "select count(*) from webhook.effects where name = 'stream' and state = 'failed'"
                ).fetchone()
                == (200,)
            ),
            "all recorded as waiting",
            90,
        )
        assert left(bench) == 200
        assert bench.entries() == []
        redis_proxy.up()
        s3_proxy.up()
        drained(bench)
    bench.must_have_happened_once(identifiers, request_ids)
    dead = bench.connection.execute("select count(*) from webhook.deliveries where state = 'dead'").fetchone()
    assert dead == (0,)


def test_a_slow_object_store_slows_down_but_loses_nothing(bench: Lab) -> None:
    request_ids = names(120)
    identifiers = bench.deliver_styles(request_ids)
    with (
        trouble(*target(f"http://{bench.s3.endpoint}")) as proxy,
        bench.worker(MINIO_ENDPOINT=proxy.address, WORKER_BATCH_SIZE="32"),
    ):
        proxy.faults = Faults(delay=0.3, bytes_per_second=200_000)
        drained(bench)
    bench.must_have_happened_once(identifiers, request_ids)


def test_redis_emptied_in_the_middle_tells_what_is_still_to_be_told(bench: Lab) -> None:
    """Stream, markers, scripts and consumer group are gone: later entries make the stream anew, earlier ones are asked
    for with `events replay` (docs/receiver/worker.md)."""
    bench.redis.xgroup_create(bench.stream, "bot", id="0", mkstream=True)
    first = bench.deliver_styles(names(50))
    with bench.worker():
        wait_for(lambda: len(bench.entries()) == 50, "the first entries")
        wait_for(lambda: left(bench) == 0, "the first deliveries")
        bench.redis.delete(*bench.redis.scan_iter(f"*{bench.stream}*"))
        bench.redis.script_flush()
        later_ids = [f"later-{number}" for number in range(50)]
        later = bench.deliver_styles(later_ids)
        drained(bench)
        assert sorted(int(entry["delivery_id"]) for entry in bench.entries()) == later
        replay(bench)
        wait_for(lambda: len(bench.entries()) == 100, "the entries that were asked for again")
        drained(bench)
    told = bench.entries()
    assert sorted(int(entry["delivery_id"]) for entry in told) == sorted(first + later)
    assert {entry.get("replay") for entry in told} == {None, "1"}
    # Nothing else was done again.
    changes = bench.connection.execute(
        "select max(n) from (select count(*) n from changes group by request) c"
    )
    assert changes.fetchone() == (1,)


def replay(bench: Lab) -> None:
    """`webhook-api events replay --effect stream` for the deliveries whose entries are gone."""
    from webhook_api import actions
    from webhook_api.effects import ORDER

    action = actions.replay(
        "events.replay", "d.state = 'done'", ["stream"], [effect.name for effect in ORDER]
    )
    with bench.connection.transaction():
        ids = [
            row[0]
            for row in bench.connection.execute(
                "select id from webhook.deliveries where request_id like 'r-%' for update"
            ).fetchall()
        ]
        action.apply(bench.connection, ids)  # type: ignore[arg-type]
    bench.connection.execute("notify webhook_deliveries")
