"""The reconciler against a real database and a queue API over HTTPS: what is asked, what it becomes, and what goes wrong."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from webhook_api import db
from webhook_api.cli import main
from webhook_api.inbox import DatabaseInbox, intake_pool
from webhook_api.reconcile import Reconciler, Report, Runner, job, ledger
from webhook_api.reconcile import fal_queue as api
from webhook_api.reconcile.runner import KEY_PAUSE

from tests.support.falqueue import KEY, PORTRAIT, STYLE, FalQueue, Job, fal_queue
from tests.support.proxy import Proxy
from tests.support.sites import REPO
from tests.support.workerlab import Bucket, Lab, lab, wait_for

pytestmark = pytest.mark.backends

LORA = "https://v3.fal.media/files/a/pytorch_lora_weights.safetensors"
CONFIG = "https://v3.fal.media/files/a/config.json"
RESULT = {"diffusers_lora_file": {"url": LORA}, "config_file": {"url": CONFIG}, "seed": 2**63 + 1}
Do = Callable[..., Report]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FalQueue]:
    with fal_queue(tmp_path) as made:
        monkeypatch.setenv("SSL_CERT_FILE", str(made.ca))
        yield made


@pytest.fixture
def do(bench: Lab, queue: FalQueue) -> Do:
    """One run, with settings as given."""

    def run(only: str | None = None, stop: threading.Event | None = None, **changes: str) -> Report:
        runner = Runner(bench.settings(**environ(queue, **changes)), stop or threading.Event())
        try:
            return runner.run(only=only)
        finally:
            runner.close()

    return run


def environ(queue: FalQueue, **changes: str) -> dict[str, str]:
    return {
        "FAL_API_KEY": KEY,
        "FAL_QUEUE_RUN_HOST": queue.host,
        "RECONCILE_REQUESTS_PER_MINUTE": "6000",
        "RECONCILE_EVERY_SECONDS": "1",
        "ARCHIVE_ALLOWED_HOSTS": "v3.fal.media",
        **changes,
    }


def late(bench: Lab, request_id: str, kind: str | None = "portrait", seconds: int = 86_400) -> None:
    bench.avatar(request_id, kind=kind)
    bench.connection.execute(
        "update avatars set training_started_at = now() - make_interval(secs => %s) where fal_request_id = %s",
        (seconds, request_id),
    )


def known(bench: Lab, request_id: str) -> dict[str, Any]:
    with db.connect(bench.database_url, "test") as connection:
        found = ledger.listed(connection, 10, request_id)
    assert len(found) == 1, found
    return found[0]


def learned(bench: Lab) -> list[tuple[str, str, dict[str, Any]]]:
    """Deliveries of the reconciler: request, status, body."""
    rows = bench.connection.execute(
        "select request_id, status, body from webhook.deliveries where source = 'reconcile' order by id"
    ).fetchall()
    return [(name, status, json.loads(body)) for name, status, body in rows]


def hurry(bench: Lab) -> None:
    """Nobody waits for backoffs and pauses in a test."""
    bench.connection.execute("update webhook.reconciliations set next_at = now() where state = 'waiting'")
    bench.connection.execute("update webhook.reconcile_state set paused_until = null")


def null_payload(request_id: str) -> dict[str, Any]:
    return {
        "request_id": request_id, "gateway_request_id": request_id, "status": "OK", "payload": None,
        "payload_error": "Response payload is not JSON serializable. Either return a JSON serializable object or use the "
                         "queue endpoint to retrieve the response.",
    }  # fmt: skip


# What is asked for


def test_an_overdue_training_is_asked_for_and_its_result_is_delivered_once(
    bench: Lab, queue: FalQueue, do: Do
) -> None:
    """fal.md, what implementers get wrong 10: trusting webhooks alone; jobs that wait too long are asked for."""
    late(bench, "r-late")
    late(bench, "r-in-time", seconds=60)
    queue.succeed("r-late", RESULT)
    report = do()
    assert report.outcome == "done"
    assert [row["became"] for row in report.asked] == ["delivered"]
    assert [asked.path for asked in queue.asked] == [
        f"/{PORTRAIT}/requests/r-late/status", f"/{PORTRAIT}/requests/r-late",
    ]  # fmt: skip
    [(request_id, status, body)] = learned(bench)
    assert (request_id, status) == ("r-late", "completed")
    # fal.md, what implementers get wrong 7: fal says OK and payload, so this says the same.
    assert body == {"request_id": "r-late", "gateway_request_id": "r-late", "status": "OK", "payload": RESULT}
    assert known(bench, "r-late")["state"] == "delivered"
    assert do().asked == []
    assert len(learned(bench)) == 1


def test_a_style_is_asked_for_under_its_own_model_and_a_sub_path_is_left_out(
    bench: Lab, queue: FalQueue, do: Do
) -> None:
    late(bench, "r-style", kind="style")
    queue.succeed("r-style", {"finetune_id": "ft-1"}, model="me/my-app")
    do(RECONCILE_MODELS="style=me/my-app/train/fast")
    assert queue.asked[0].path == "/me/my-app/requests/r-style/status"
    assert learned(bench)[0][2]["payload"] == {"finetune_id": "ft-1"}


def test_without_a_training_type_each_model_is_tried(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-some", kind=None)
    queue.succeed("r-some", {"finetune_id": "ft-1"}, model=STYLE)
    assert do().asked[0]["became"] == "delivered"
    assert [asked.path for asked in queue.asked][:2] == [
        f"/{PORTRAIT}/requests/r-some/status", f"/{STYLE}/requests/r-some/status",
    ]  # fmt: skip


def test_what_a_webhook_has_reported_is_not_asked_for(bench: Lab, queue: FalQueue, do: Do) -> None:
    for name in ("r-done", "r-failed", "r-null"):
        late(bench, name)
        queue.succeed(name, RESULT)
    bench.deliver({"request_id": "r-done", "status": "OK", "payload": RESULT}, "completed")
    bench.deliver({"request_id": "r-failed", "status": "ERROR", "payload": None}, "failed")
    bench.deliver(null_payload("r-null"), "completed")
    became = {row["request_id"]: row["became"] for row in do().asked}
    assert became == {"r-done": "settled", "r-failed": "settled", "r-null": "delivered"}
    assert {asked.path.split("/")[4] for asked in queue.asked} == {"r-null"}
    assert "delivery" in known(bench, "r-done")["detail"]


def test_an_avatar_that_has_left_training_meanwhile_is_not_asked_for(
    bench: Lab, queue: FalQueue, do: Do
) -> None:
    late(bench, "r-1")
    queue.jobs["r-1"] = Job()
    assert do().asked[0]["answer"] == "in_progress"
    bench.connection.execute("update avatars set status = 'cancelled' where fal_request_id = 'r-1'")
    hurry(bench)
    before = len(queue.asked)
    assert do().asked[0]["became"] == "settled"
    assert len(queue.asked) == before


def test_what_is_kept_aside_does_not_count_as_reported(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-stale")
    identifier = bench.deliver({"request_id": "r-stale", "status": "OK", "payload": RESULT}, "completed")
    bench.connection.execute(
        "update webhook.deliveries set state = 'dead', aside = 'stale' where id = %s", (identifier,)
    )
    queue.succeed("r-stale", RESULT)
    assert do().asked[0]["became"] == "delivered"


@pytest.mark.parametrize("native_enum", [False, True], ids=["varchar", "enum"])
def test_every_spelling_of_the_bots_table_is_understood(
    database_url: str, redis_url: str, s3: Bucket, tmp_path: Path, queue: FalQueue, native_enum: bool
) -> None:
    with lab(database_url, redis_url, s3, tmp_path) as made:
        made.make_bot_tables(native_enum, upper=True)
        late(made, "r-1")
        with db.connect(made.database_url, "test") as connection:
            settings = made.settings(**environ(queue)).reconcile
            assert ledger.overdue(connection, settings) == [("r-1", "portrait")]


@pytest.mark.parametrize(("native_enum", "before"), [
    (False, ""), (True, ""),
    (False, "create index avatars_training_idx on avatars (status) where status::text = null"),
], ids=["varchar", "enum", "an index that nothing is in"])  # fmt: skip
def test_finding_them_reads_none_of_the_avatars_that_have_long_been_done(
    database_url: str, redis_url: str, s3: Bucket, tmp_path: Path, queue: FalQueue, native_enum: bool,
    before: str,
) -> None:  # fmt: skip
    """Every minute, in a table that only grows: by the index that the embedded PostgreSQL makes and the guide names."""
    with lab(database_url, redis_url, s3, tmp_path) as made:
        made.make_bot_tables(native_enum, upper=True)
        late(made, "r-1")
        connection = made.connection
        connection.execute(
            "insert into avatars (id, user_id, status, fal_request_id, fal_response_data) "
            f"select gen_random_uuid(), (select id from users limit 1), 'COMPLETED'{'::avatar_status' * native_enum}, "
            "'old-' || i, json_build_object('payload', repeat(md5(i::text), 12)) from generate_series(1, 20000) i"
        )
        if before:
            connection.execute(before)  # type: ignore[call-overload]
        connection.execute(index_of_what_trains())
        connection.execute("analyze avatars")
        settings = made.settings(**environ(queue)).reconcile
        with db.connect(made.database_url, "test") as reader, reader.transaction():
            assert ledger.overdue(reader, settings) == [("r-1", "portrait")]
            read = reader.execute(
                "select seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables where relname = 'avatars'"
            ).fetchone()
    assert read is not None
    assert read[0] <= 10


def index_of_what_trains() -> Any:
    """The statement with which the embedded PostgreSQL makes it."""
    text = (REPO / "roles" / "backends" / "files" / "postgres" / "ensure.sql").read_text()
    [found] = re.findall(r"^DO \$\$\nDECLARE.*?avatars_training_idx.*?^\$\$;", text, re.DOTALL | re.MULTILINE)
    return found


def test_a_database_without_the_bots_table_is_no_fault(
    database_url: str, redis_url: str, s3: Bucket, tmp_path: Path, queue: FalQueue
) -> None:
    with lab(database_url, redis_url, s3, tmp_path) as made:
        runner = Runner(made.settings(**environ(queue)), threading.Event())
        try:
            assert runner.run().outcome == "done"
        finally:
            runner.close()


# OK without a payload


def test_ok_without_a_payload_is_fetched_and_completes_the_avatar(
    bench: Lab, queue: FalQueue, tmp_path: Path
) -> None:
    """fal.md: `OK` with `payload: null` succeeded and was billed: fetch the result from the queue API."""
    bench.avatar("r-null")
    queue.succeed("r-null", RESULT)
    with bench.worker(**environ(queue)):
        first = bench.deliver(null_payload("r-null"), "completed")
        bench.connection.execute("notify webhook_deliveries")
        wait_for(lambda: bench.row("r-null")["status"] == "completed", "the avatar is completed")
        [identifier] = [row[0] for row in bench.connection.execute(
            "select id from webhook.deliveries where source = 'reconcile'").fetchall()]  # fmt: skip
        # Its files are not there in this test, so it ends as a dead letter of effect `archive`, or is done.
        wait_for(lambda: "stream" in bench.effects(identifier), "the bot is told")
        row = bench.row("r-null")
        assert (row["diffusers_lora_file_url"], row["config_file_url"]) == (LORA, CONFIG)
        assert row["training_error"] is None
        assert row["fal_response_data"]["seed"] == 2**63 + 1
        told = [entry for entry in bench.entries() if entry["source"] == "reconcile"]
        assert [(entry["request_id"], entry["status"]) for entry in told] == [("r-null", "completed")]
        # fal sends the full result after all: the same again, and the bot hears nothing twice.
        full = {"request_id": "r-null", "gateway_request_id": "g", "status": "OK", "payload": RESULT}
        again = bench.deliver(full, "completed")
        bench.connection.execute("notify webhook_deliveries")
        wait_for(lambda: "stream" in bench.effects(again), "the webhook is processed as well")
        assert bench.effects(again)["stream"]["state"] == "skipped"
        wait_for(lambda: "stream" in bench.effects(first), "the first one is processed")
    with_payload = [entry for entry in bench.entries() if entry["delivery_id"] != str(first)]
    assert len(with_payload) == 1
    assert bench.row("r-null")["status"] == "completed"
    assert len(learned(bench)) == 1


def test_a_delivery_that_commits_late_under_a_low_id_is_found(bench: Lab, queue: FalQueue, do: Do) -> None:
    """Ids are not committed in their order: a position that only moves forward would step over one."""
    with psycopg.connect(bench.database_url) as slow:
        slow.execute(
            """insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256)
            values ('fal', 'r-slow', 'completed:x', 'completed', %s, repeat('0', 64))""",
            (json.dumps(null_payload("r-slow")).encode(),),
        )
        bench.deliver(null_payload("r-fast"), "completed")
        queue.succeed("r-fast", RESULT)
        queue.succeed("r-slow", RESULT)
        assert [row["request_id"] for row in do().asked] == ["r-fast"]
        for _ in range(3):
            assert do().asked == []
        slow.commit()
    assert [row["request_id"] for row in do().asked] == ["r-slow"]


def test_the_position_moves_on_only_when_no_older_transaction_can_be_open(
    bench: Lab, queue: FalQueue, do: Do
) -> None:
    def position() -> tuple[int, int]:
        row = bench.connection.execute(
            "select scanned_id, horizon_id from webhook.reconcile_state"
        ).fetchone()
        assert row is not None
        return row

    do()
    newest = bench.deliver({"request_id": "r", "status": "OK", "payload": {}}, "completed")
    do()
    assert position()[0] < newest
    for _ in range(2):
        bench.connection.execute("update webhook.reconcile_state set horizon_at = now() - interval '10 min'")
        do()
    assert position() == (newest, newest)


# What fal answers


def test_a_running_job_is_asked_for_again_and_makes_no_delivery(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-1")
    queue.jobs["r-1"] = Job(status="IN_QUEUE")
    assert do().asked[0]["answer"] == "queued"
    assert do().asked == [], "it is not due yet"
    queue.jobs["r-1"].status = "IN_PROGRESS"
    hurry(bench)
    assert do().asked[0]["answer"] == "in_progress"
    assert learned(bench) == []
    row = known(bench, "r-1")
    assert (row["state"], row["tries"], row["result"]) == ("waiting", 2, "in_progress")
    queue.succeed("r-1", RESULT)
    hurry(bench)
    do()
    assert [status for _, status, _ in learned(bench)] == ["completed"]


def test_a_failed_job_becomes_a_failure_with_its_details(bench: Lab, queue: FalQueue, do: Do) -> None:
    """fal.md: the queue has no FAILED status; a failed job polls as COMPLETED and its result answers 4xx."""
    late(bench, "r-bad")
    detail = [{"loc": ["body", "images_data_url"], "msg": "not enough images", "type": "value_error"}]
    queue.fail("r-bad", 422, detail)
    do()
    assert learned(bench) == [("r-bad", "failed", {
        "request_id": "r-bad", "gateway_request_id": "r-bad", "status": "ERROR",
        "error": "Invalid status code: 422", "payload": {"detail": detail},
    })]  # fmt: skip


def test_a_request_that_fal_does_not_know_is_recorded_and_nothing_is_made_up(
    bench: Lab, queue: FalQueue, do: Do
) -> None:
    late(bench, "r-gone")
    for _ in range(3):
        assert known(bench, "r-gone")["state"] == "waiting" if queue.asked else True
        do()
        hurry(bench)
    row = known(bench, "r-gone")
    assert (row["state"], row["result"], row["detail"]) == ("gone", "not_found", "404 Request not found")
    assert learned(bench) == []
    before = len(queue.asked)
    do()
    assert len(queue.asked) == before
    assert bench.row("r-gone")["status"] == "training"


@pytest.mark.parametrize("body", [b"\x89PNG not json", b"null", b'{"a":'], ids=["binary", "null", "cut off"])
def test_a_result_that_cannot_be_delivered_is_recorded(
    bench: Lab, queue: FalQueue, do: Do, body: bytes
) -> None:
    late(bench, "r-odd")
    queue.succeed("r-odd", body)
    assert do().asked[0]["became"] == "unusable"
    assert learned(bench) == []


def test_a_result_over_the_limit_is_not_held_in_memory(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-big")
    queue.succeed("r-big", b'{"a":"' + b"x" * 2_000_000 + b'"}')
    assert do(WEBHOOK_BODY_LIMIT_BYTES="1000000").asked[0]["became"] == "unusable"
    assert "too_large" in known(bench, "r-big")["detail"]


def test_an_id_that_cannot_stand_in_an_address_is_never_sent(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "../../keys?x=")
    assert do().asked[0]["became"] == "unusable"
    assert queue.asked == []


def test_no_end_for_too_long_is_given_up(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-1")
    queue.jobs["r-1"] = Job()
    do()
    bench.connection.execute("update webhook.reconciliations set found_at = now() - interval '4 days'")
    hurry(bench)
    assert do().asked[0]["became"] == "given_up"


# What goes wrong


def test_a_refused_key_stops_all_questions_for_a_while_and_says_so(
    bench: Lab, queue: FalQueue, do: Do, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        late(bench, f"r-{number}")
    report = do(FAL_API_KEY="wrong:key")
    assert report.outcome == "paused"
    assert len(queue.asked) == 1, "one question is enough to know"
    assert any(
        record.getMessage() == "reconcile_paused" and record.levelname == "ERROR" for record in caplog.records
    )
    assert "wrong:key" not in caplog.text
    assert do().outcome == "paused"
    with db.connect(bench.database_url, "test") as connection:
        reason, seconds, _ = ledger.paused(connection)
    assert reason == "key_refused"
    assert KEY_PAUSE - 60 < seconds <= KEY_PAUSE
    # The key is put right, and somebody asks for one by hand after the pause.
    hurry(bench)
    assert do().outcome == "done"


def test_throttled_means_the_time_that_fal_names(bench: Lab, queue: FalQueue, do: Do) -> None:
    for number in range(3):
        late(bench, f"r-{number}")
    queue.trouble = [(429, {"Retry-After": "240"}, b'{"detail":"Too many requests"}')]
    assert do().outcome == "paused"
    assert len(queue.asked) == 1
    with db.connect(bench.database_url, "test") as connection:
        reason, seconds, _ = ledger.paused(connection)
    assert reason == "throttled"
    assert 200 < seconds <= 240


def test_trouble_of_fal_is_tried_again_and_then_left_alone(bench: Lab, queue: FalQueue, do: Do) -> None:
    for number in range(6):
        late(bench, f"r-{number}")
        queue.succeed(f"r-{number}", RESULT)
    queue.trouble = [(503, {}, b"upstream connect error")] * 3
    assert do().outcome == "paused"
    assert len(queue.asked) == 3, "after three useless answers fal is left alone"
    hurry(bench)
    assert do().outcome == "done"
    assert len(learned(bench)) == 6
    with db.connect(bench.database_url, "test") as connection:
        assert ledger.paused(connection) == (None, 0.0, 0), "pauses in a row are forgotten"


def test_an_api_that_does_not_answer_is_given_up_in_time(
    bench: Lab, queue: FalQueue, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "READ_SECONDS", 0.5)
    late(bench, "r-1")
    queue.hang.clear()
    started = time.monotonic()
    asked = do().asked
    assert (asked[0]["answer"], asked[0]["became"]) == ("unavailable", "waiting")
    assert "timeout" in asked[0]["detail"]
    assert time.monotonic() - started < 10


def test_a_host_with_another_certificate_is_not_given_the_key(
    bench: Lab, queue: FalQueue, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    late(bench, "r-1")
    assert "tls" in do().asked[0]["detail"]
    assert queue.asked == []


def test_an_api_that_is_away_is_no_fault_of_the_request(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-1")
    asked = do(FAL_QUEUE_RUN_HOST="127.0.0.1:1").asked
    assert (asked[0]["answer"], asked[0]["became"]) == ("unavailable", "waiting")
    assert "connection" in asked[0]["detail"]


def test_a_database_that_goes_away_in_the_middle_loses_and_doubles_nothing(
    bench: Lab, queue: FalQueue, database_url: str
) -> None:
    late(bench, "r-1")
    queue.succeed("r-1", RESULT)
    parts = psycopg.conninfo.conninfo_to_dict(bench.database_url)
    with Proxy(str(parts["host"]), int(str(parts["port"]))) as proxy:
        away = psycopg.conninfo.make_conninfo(bench.database_url, host="127.0.0.1", port=proxy.port)
        settings = bench.settings(**environ(queue, DATABASE_URL=bench.database_url))
        pool = intake_pool(away, "test", max_size=2)
        pool.open()
        real = api.FalQueue(KEY, queue.host, max_bytes=10**7)

        class Cutting:
            def ask(self, model: str, request_id: str, pace: Callable[[], None]) -> Any:
                answer = real.ask(model, request_id, pace)
                proxy.down()
                return answer

        reconciler = Reconciler(settings.reconcile, Cutting(), DatabaseInbox(pool))
        try:
            with db.connect(away, "test", statement_timeout=5) as connection, pytest.raises(psycopg.Error):
                reconciler.run(connection)
            assert learned(bench) == []
            proxy.up()
            hurry(bench)
            runner = Runner(settings, threading.Event())
            try:
                assert runner.run().asked[0]["became"] == "delivered"
            finally:
                runner.close()
        finally:
            real.close()
            pool.close()
    assert len(learned(bench)) == 1


def test_stored_and_then_killed_is_not_asked_for_again(bench: Lab, queue: FalQueue, do: Do) -> None:
    late(bench, "r-1")
    queue.succeed("r-1", RESULT)
    do()
    # As if the process had died between the inbox and its own note.
    bench.connection.execute(
        "update webhook.reconciliations set state = 'waiting', closed_at = null, next_at = now()"
    )
    before = len(queue.asked)
    assert do().asked[0]["became"] == "settled"
    assert len(queue.asked) == before
    assert len(learned(bench)) == 1


def test_two_workers_at_once_are_one_runner(bench: Lab, queue: FalQueue, do: Do) -> None:
    for number in range(4):
        late(bench, f"r-{number}")
        queue.succeed(f"r-{number}", RESULT)
    queue.hang.clear()
    reports: list[Report] = []
    threads = [threading.Thread(target=lambda: reports.append(do())) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: any(report.outcome == "busy" for report in reports), "the second one steps back")
    queue.hang.set()
    for thread in threads:
        thread.join(30)
    assert sorted(report.outcome for report in reports) == ["busy", "done"]
    assert len(queue.asked) == 8
    assert len(learned(bench)) == 4


def test_questions_keep_their_distance(
    bench: Lab, queue: FalQueue, do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the database's own turns: what a busy machine adds before one request it takes from the next distance."""
    turns: list[float] = []
    earliest: list[float] = []
    take = ledger.turn

    def noted(connection: db.Connection, interval: float) -> float:
        began = time.monotonic()
        seconds = take(connection, interval)
        earliest.append(began + seconds)
        row = connection.execute(
            "select extract(epoch from next_request_at)::float8 from webhook.reconcile_state"
        ).fetchone()
        assert row is not None
        turns.append(row[0])
        return seconds

    monkeypatch.setattr(ledger, "turn", noted)
    for number in range(3):
        late(bench, f"r-{number}")
        queue.succeed(f"r-{number}", RESULT)
    do(RECONCILE_REQUESTS_PER_MINUTE="200")  # one every 0.3 s
    assert len(queue.asked) == len(turns) == 6
    assert all(later - turn > 0.299 for turn, later in pairwise(turns))
    assert all(asked.at > turn - 0.01 for asked, turn in zip(queue.asked, earliest, strict=True))


def test_stopping_does_not_wait_for_the_next_turn(bench: Lab, queue: FalQueue) -> None:
    for number in range(3):
        late(bench, f"r-{number}")
        queue.succeed(f"r-{number}", RESULT)
    stop = threading.Event()
    settings = bench.settings(**environ(queue, RECONCILE_REQUESTS_PER_MINUTE="1"))
    thread = threading.Thread(target=job, args=(settings, stop))
    thread.start()
    wait_for(lambda: queue.asked, "the first question")
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_without_a_key_nothing_is_asked(bench: Lab, queue: FalQueue) -> None:
    late(bench, "r-1")
    job(bench.settings(FAL_QUEUE_RUN_HOST=queue.host), threading.Event())
    assert queue.asked == []


# By hand


def call(bench: Lab, queue: FalQueue, *arguments: str, **changes: str) -> Result:
    return CliRunner().invoke(
        main, ["reconcile", *arguments], env={**bench.environ(), **environ(queue, **changes)}
    )


def test_one_request_is_asked_for_by_hand_and_recorded(bench: Lab, queue: FalQueue) -> None:
    bench.avatar("r-hand", kind="style")
    queue.succeed("r-hand", {"finetune_id": "ft"}, model=STYLE)
    done = call(bench, queue, "--request-id", "r-hand", "--json", "--as", "asel")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["asked"][0]["became"] == "delivered"
    row = bench.connection.execute("select who, action, filter, affected from webhook.audit").fetchone()
    assert row == ("asel", "reconcile.ask", {"request_id": "r-hand"}, 1)
    again = call(bench, queue, "--request-id", "r-hand")
    assert again.exit_code == 1
    assert "settled" in again.output


def test_a_request_that_is_not_known_ends_with_1(bench: Lab, queue: FalQueue) -> None:
    done = call(bench, queue, "--request-id", "r-none", "--training-type", "portrait")
    assert done.exit_code == 1
    assert "not_found" in done.output


def test_a_dry_run_asks_nothing_and_changes_nothing(bench: Lab, queue: FalQueue) -> None:
    late(bench, "r-1")
    bench.deliver(null_payload("r-2"), "completed")
    done = call(bench, queue, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    assert {row["request_id"]: row["reason"] for row in json.loads(done.stdout)["requests"]} == {
        "r-1": "overdue", "r-2": "no_payload",
    }  # fmt: skip
    assert queue.asked == []
    assert bench.connection.execute("select count(*) from webhook.reconciliations").fetchone() == (0,)


def test_exit_codes_say_what_is_in_the_way(bench: Lab, queue: FalQueue) -> None:
    late(bench, "r-1")
    assert call(bench, queue, FAL_API_KEY="").exit_code == 78
    assert call(bench, queue, FAL_API_KEY="wrong:key").exit_code == 69
    shown = call(bench, queue, "--list", "--json")
    assert json.loads(shown.stdout)["pause_reason"] == "key_refused"
    with db.connect(bench.database_url, "test") as connection, db.sole(connection, ledger.LOCK_KEY) as held:
        assert held
        assert call(bench, queue).exit_code == 75
