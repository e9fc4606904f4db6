"""What the worker promises of many deliveries handled together: as if each had been handled alone."""

from __future__ import annotations

import base64
import json
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from webhook_api import trace
from webhook_api.effects import ORDER, avatar, raw_archive
from webhook_api.effects.base import Effect, Job, Outcome, Result, Tools
from webhook_api.states import EffectError, Failure, Policy
from webhook_api.worker import batch, loop, queue
from webhook_api.worker.loop import Worker

from tests.support.mediahost import File, MediaHost
from tests.support.workerlab import Lab, wait_for

pytestmark = pytest.mark.backends

FEW = 24


def names(count: int = FEW) -> list[str]:
    return [f"r-{number:04}" for number in range(count)]


def all_in(bench: Lab, identifiers: list[int], *states: str) -> None:
    for identifier in identifiers:
        bench.wait_state(identifier, *states, seconds=60)


def style(request_id: str, finetune: str = "ft") -> dict[str, Any]:
    return {"request_id": request_id, "status": "OK", "payload": {"finetune_id": finetune}}


def claim(bench: Lab, owner: str, limit: int, seconds: float, **more: Any) -> list[queue.Claim]:
    """A claim that does not wait for its turn."""
    return queue.claim(bench.connection, owner, limit, seconds, force=True, **more) or []  # type: ignore[arg-type]


def test_a_batch_is_one_segment_and_every_delivery_is_read_back_alone(bench: Lab) -> None:
    """fal.md, what implementers get wrong, 11: the raw bytes are the record, whatever else is made of them."""
    bench.count_changes()
    identifiers = bench.deliver_styles(names())
    with bench.worker():
        all_in(bench, identifiers, "done")
    bench.must_have_happened_once(identifiers, names())
    details = [bench.effects(identifier)["raw_archive"]["detail"] for identifier in identifiers]
    [key] = {detail["key"] for detail in details}
    assert key.startswith("deliveries/segments/")
    assert list(bench.objects()) == [key]
    store = bench.store()
    for identifier, detail in zip(identifiers, details, strict=True):
        found = raw_archive.fetch(store, detail)
        assert found["delivery_id"] == identifier
        assert base64.b64decode(found["body_base64"]) == bytes(bench.delivery(identifier)["body"])
        assert found["headers"] == {"X-Fal-Webhook-Signature": "00"}
    traced = trace.trace(bench.settings(), names()[3])
    [item] = traced["deliveries"][0]["objects"]
    assert item["exists"]
    assert item["part"] == {name: details[3][name] for name in ("offset", "length", "sha256")}


def test_an_archived_delivery_that_was_changed_or_lost_is_found_out(bench: Lab) -> None:
    identifiers = bench.deliver_styles(names(3))
    with bench.worker():
        all_in(bench, identifiers, "done")
    store = bench.store()
    details = [bench.effects(identifier)["raw_archive"]["detail"] for identifier in identifiers]
    data = bytearray(store.read(details[0]["key"]) or b"")
    data[details[1]["offset"] + 5] ^= 1
    store.put(details[0]["key"], bytes(data), "application/x-ndjson", {})
    assert raw_archive.fetch(store, details[0])["delivery_id"] == identifiers[0]
    with pytest.raises(EffectError, match="does not hold the bytes") as damaged:
        raw_archive.fetch(store, details[1])
    assert damaged.value.reason == "raw_archive_damaged"
    store.remove(details[0]["key"])
    with pytest.raises(EffectError) as lost:
        raw_archive.fetch(store, details[0])
    assert lost.value.reason == "raw_archive_missing"


def test_an_archived_delivery_of_an_older_release_is_read_back(bench: Lab) -> None:
    """It was an object of its own, and its record named no place in it."""
    [identifier] = bench.deliver_styles(names(1))
    with bench.worker():
        bench.wait_state(identifier, "done")
    detail = bench.effects(identifier)["raw_archive"]["detail"]
    old = {"key": detail["key"], "size": detail["length"], "sha256": detail["sha256"]}
    assert raw_archive.fetch(bench.store(), old)["delivery_id"] == identifier


def test_probes_share_no_segment_so_that_removing_one_takes_nothing_else_away(bench: Lab) -> None:
    identifiers = bench.deliver_styles(names(4))
    probes = [bench.deliver(style(f"probe-{number}"), "completed", probe=True) for number in range(3)]
    with bench.worker():
        all_in(bench, identifiers + probes, "done")
    trace.remove(bench.settings(), "probe-1")
    store = bench.store()
    for identifier in [*identifiers, probes[0], probes[2]]:
        detail = bench.effects(identifier)["raw_archive"]["detail"]
        assert raw_archive.fetch(store, detail)["delivery_id"] == identifier
    assert len(bench.entries(probe=True)) == 2


def test_what_the_bots_table_refuses_concerns_that_delivery_alone(bench: Lab) -> None:
    bench.connection.execute("alter table avatars add constraint chosen check (finetune_id <> 'bad-r-0007')")
    bench.count_changes()
    bad = bench.deliver_styles(["r-0007"], "bad")
    good = bench.deliver_styles([name for name in names() if name != "r-0007"], "good")
    with bench.worker():
        all_in(bench, good, "done")

        def dead() -> bool:
            bench.hurry()
            return bool(bench.delivery(bad[0])["state"] == "dead")

        wait_for(dead, "a dead letter")
    effect = bench.effects(bad[0])["avatar"]
    assert (effect["tries"], effect["detail"]["reason"]) == (3, "avatar_refused")
    assert {bench.delivery(identifier)["tries"] for identifier in good} == {1}
    assert len(bench.entries()) == len(good)


def test_a_row_that_the_bot_holds_keeps_no_other_waiting(bench: Lab) -> None:
    identifiers = bench.deliver_styles(names())
    with psycopg.connect(bench.database_url) as bot, bench.worker():
        bot.execute("select 1 from avatars where fal_request_id = 'r-0005' for update")
        all_in(bench, identifiers[:5] + identifiers[6:], "done")
        assert bench.delivery(identifiers[5])["state"] != "done"
        bot.rollback()
        bench.hurry()
        all_in(bench, identifiers, "done")
    assert len(bench.entries()) == FEW


def test_two_rows_of_one_request_are_two_even_when_the_bot_holds_one(bench: Lab) -> None:
    held = bench.avatar("twice", kind="style")
    bench.avatar("twice", kind="style")
    with psycopg.connect(bench.database_url) as bot, bench.worker():
        bot.execute("select 1 from avatars where id = %s for update", (held,))
        identifier = bench.deliver(style("twice"), "completed")
        bench.wait_state(identifier, "retry")
        bot.rollback()

        def ambiguous() -> bool:
            bench.hurry()
            return "avatar_ambiguous" in (bench.delivery(identifier)["last_error"] or "")

        wait_for(ambiguous, "both rows are seen")
    changed = bench.connection.execute("select count(*) from avatars where status <> 'training'").fetchone()
    assert changed == (0,)


def test_each_delivery_of_a_batch_ends_as_it_would_alone(bench: Lab) -> None:
    """fal.md, the right answer to each fault: unknown request_id is parked, and matched again later."""
    bench.avatar("twice", kind="style")
    bench.avatar("twice", kind="style")
    bench.avatar("plain", kind="style")
    bench.avatar("lacking", kind="style")
    bench.avatar("over", kind="style", status="completed")
    bench.avatar("going", kind="style")
    with bench.connection.transaction():
        found = {
            "plain": bench.deliver(style("plain"), "completed"),
            "unknown": bench.deliver(style("unknown"), "completed"),
            "twice": bench.deliver(style("twice"), "completed"),
            "lacking": bench.deliver({"request_id": "lacking", "status": "OK", "payload": {}}, "completed"),
            "over": bench.deliver({"request_id": "over", "status": "ERROR", "error": "late"}, "failed"),
            "going": bench.deliver({"request_id": "going", "status": "in_progress", "progress": 40}, "in_progress"),
            "garbage": bench.deliver(b"[1, 2", "unknown"),
        }  # fmt: skip
    with bench.worker():
        for name, state in {
            "plain": "done", "unknown": "parked", "twice": "retry", "lacking": "done", "over": "done",
            "going": "done", "garbage": "dead",
        }.items():  # fmt: skip
            bench.wait_state(found[name], state)
        assert bench.row("plain")["status"] == "completed"
        assert bench.row("lacking")["status"] == "error"
        assert bench.row("over")["status"] == "completed"
        assert (bench.row("going")["status"], bench.row("going")["training_progress"]) == ("training", 40)
        assert "avatar_ambiguous" in bench.delivery(found["twice"])["last_error"]
        bench.avatar("unknown", kind="style")
        bench.hurry()
        bench.wait_state(found["unknown"], "done")
    told = {entry["request_id"]: entry["status"] for entry in bench.entries()}
    assert told == {
        "plain": "completed", "unknown": "completed", "lacking": "completed", "over": "failed", "going": "in_progress",
    }  # fmt: skip


def test_deliveries_of_one_request_keep_their_order_among_others(bench: Lab) -> None:
    for number in range(6):
        bench.avatar(f"r-{number}", kind="style")
    identifiers = []
    with bench.connection.transaction():
        for status in ("in_queue", "in_progress", "OK"):
            for number in range(6):
                body = {**style(f"r-{number}"), "status": status}
                kept = {"in_queue": "queued", "in_progress": "in_progress", "OK": "completed"}[status]
                identifiers.append(bench.deliver(body, kept))
    with bench.worker(), bench.worker(INSTANCE_ID="second"):
        all_in(bench, identifiers, "done")
    for number in range(6):
        order = [entry["status"] for entry in bench.entries() if entry["request_id"] == f"r-{number}"]
        assert order == ["queued", "in_progress", "completed"]


def test_one_delivery_of_a_request_is_in_a_batch_and_large_or_deadly_ones_are_alone(bench: Lab) -> None:
    bench.deliver_styles(names(2))
    again = bench.deliver({**style("r-0000"), "note": "another"}, "completed")
    large = bench.deliver({**style("large"), "pad": "x" * batch.LARGE}, "completed")
    deadly = bench.deliver(style("deadly"), "completed")
    bench.connection.execute("update webhook.deliveries set crashes = 2 where id = %s", (deadly,))
    # The older one's avatar is settled, so that the newer one may be claimed together with it.
    bench.connection.execute(
        "insert into webhook.effects (delivery_id, name, state) "
        "select id, 'avatar', 'done' from webhook.deliveries where request_id = 'r-0000'"
    )
    claims = claim(bench, "one", 10, 60)
    together, alone = batch.split(claims)
    assert [delivery.request_id for delivery in together] == names(2)
    assert [delivery.id for delivery in alone] == [again, large, deadly]


def test_a_claim_takes_no_more_than_fits_into_memory(bench: Lab) -> None:
    for number in range(6):
        bench.deliver({**style(f"r-{number}"), "pad": "x" * 100_000}, "completed")
    assert len(claim(bench, "one", 10, 60, max_bytes=250_000)) == 2
    assert len(claim(bench, "two", 10, 60, max_bytes=10)) == 1
    assert len(claim(bench, "three", 10, 60)) == 3


def test_what_may_kill_its_worker_is_leased_alone(bench: Lab) -> None:
    """All that is leased when a worker dies is charged with it, so a killer must take no crowd with it."""
    suspects = bench.deliver_styles(names(3))
    bench.connection.execute("update webhook.deliveries set crashes = 2, state = 'retry'")
    innocent = [bench.deliver(style(f"i-{number}"), "completed") for number in range(3)]
    first = [each.delivery.id for each in claim(bench, "one", 10, 60)]
    assert sorted(first) == [suspects[0], *innocent]
    assert claim(bench, "two", 10, 60, suspects=0) == []
    assert [each.delivery.id for each in claim(bench, "three", 10, 60)] == [suspects[1]]


def test_a_worker_has_one_that_may_kill_it_at_a_time(bench: Lab) -> None:
    """Also over several claims: while the first is under way, the next ones wait, and nobody else does."""
    gate = threading.Event()
    with MediaHost() as media:
        media.files = {"/file": File(b"x" * 1000, gate=gate)}
        payload = {"finetune_id": "ft", "file": {"url": media.url("/file")}}
        suspects = []
        for name in names(3):
            bench.avatar(name, kind="style")
            suspects.append(
                bench.deliver({"request_id": name, "status": "OK", "payload": payload}, "completed")
            )
        bench.connection.execute("update webhook.deliveries set crashes = 2, state = 'retry'")
        try:
            with bench.worker(
                ARCHIVE_ALLOW_HTTP_HOSTS=media.address, WORKER_CONCURRENCY="3", LEASE_SECONDS="60"
            ):
                assert media.half_sent.wait(120)
                # Of the same queue, and claimed after it.
                with bench.connection.transaction():
                    others = bench.deliver_styles([f"other-{number}" for number in range(3)])
                    bench.connection.execute(
                        "update webhook.deliveries set state = 'retry' where id = any(%s)", (others,)
                    )
                bench.hurry()
                all_in(bench, others, "done")
                assert [bench.delivery(each)["state"] for each in suspects] == ["leased", "retry", "retry"]
                gate.set()
                all_in(bench, suspects, "done")
        finally:
            gate.set()


def test_what_a_claim_leased_whose_answer_never_came_is_given_back(bench: Lab) -> None:
    """The commit took effect, and the connection was lost: nobody works on these, and no worker has died."""
    bench.deliver_styles(names(5))
    lost = [each.delivery.id for each in claim(bench, "me:7", 3, 60)]
    kept = [each.delivery.id for each in claim(bench, "me:77", 2, 60)]
    assert queue.abandon(bench.connection, "me:7", "lost") == 3  # type: ignore[arg-type]
    for identifier in lost:
        found = bench.delivery(identifier)
        assert (found["state"], found["tries"], found["crashes"]) == ("retry", 0, 0)
    assert {bench.delivery(identifier)["state"] for identifier in kept} == {"leased"}


def test_reports_of_fal_and_of_the_reconciler_tell_the_bot_once(bench: Lab) -> None:
    bench.deliver_styles(["r-1"])
    bench.avatar("r-2", kind="style")
    with bench.worker():
        wait_for(lambda: len(bench.entries()) == 1, "the entry")
        late = bench.deliver(
            {**style("r-1", "ft-r-1"), "gateway_request_id": "g"}, "completed", source="reconcile"
        )
        bench.wait_state(late, "done")
        # The other way round, and both orders of a failure, whose text differs.
        first = bench.deliver(style("r-2"), "completed", source="reconcile")
        bench.wait_state(first, "done")
        second = bench.deliver({**style("r-2"), "error": None}, "completed")
        bench.wait_state(second, "done")
    assert "told by delivery" in bench.effects(late)["stream"]["detail"]["why"]
    assert bench.effects(second)["stream"]["detail"]["why"] == f"told by delivery {first}"
    assert [entry["request_id"] for entry in bench.entries()] == ["r-1", "r-2"]


def test_a_result_that_the_reconciler_adds_is_told(bench: Lab) -> None:
    """fal.md, what implementers get wrong, 10: OK without a payload succeeded; what is fetched afterwards must count."""
    bench.avatar("r-1", kind="style")
    with bench.worker():
        bare = bench.deliver({"request_id": "r-1", "status": "OK", "payload": None}, "completed")
        bench.wait_state(bare, "done")
        assert bench.row("r-1")["status"] == "error"
        full = bench.deliver(style("r-1"), "completed", source="reconcile")
        bench.wait_state(full, "done")
    assert bench.row("r-1")["status"] == "completed"
    assert [entry["delivery_id"] for entry in bench.entries()] == [str(bare), str(full)]


def test_a_failure_learned_twice_is_told_once(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with bench.worker():
        first = bench.deliver(
            {"request_id": "r-1", "status": "ERROR", "error": "a"}, "failed", source="reconcile"
        )
        bench.wait_state(first, "done")
        late = bench.deliver({"request_id": "r-1", "status": "ERROR", "error": "b"}, "failed")
        bench.wait_state(late, "done")
    assert len(bench.entries()) == 1
    assert bench.effects(late)["stream"]["state"] == "skipped"


def test_a_stop_in_the_middle_of_a_backlog_leaves_no_lease(bench: Lab) -> None:
    bench.count_changes()
    request_ids = names(400)
    identifiers = bench.deliver_styles(request_ids)
    with bench.worker(WORKER_BATCH_SIZE="16", LEASE_SECONDS="120"):
        wait_for(lambda: len(bench.entries()) > 20, "some entries")
    states = dict(
        bench.connection.execute("select state, count(*) from webhook.deliveries group by state").fetchall()
    )
    assert "leased" not in states
    assert states.get("pending", 0) + states.get("retry", 0) > 0, "stopped in the middle"
    with bench.worker(LEASE_SECONDS="120"):
        all_in(bench, identifiers, "done")
    bench.must_have_happened_once(identifiers, request_ids)
    crashes = bench.connection.execute("select max(crashes) from webhook.deliveries").fetchone()
    assert crashes == (0,)


def test_a_trickle_of_duplicates_neither_blocks_nor_is_blocked(bench: Lab) -> None:
    """Intake locks rows for their arrivals' count while the worker locks many at once: no deadlock, nothing lost."""
    bench.count_changes()
    request_ids = names(300)
    identifiers = bench.deliver_styles(request_ids)
    stop = threading.Event()
    slowest: list[float] = []

    def duplicates() -> None:
        with psycopg.connect(bench.database_url, autocommit=True) as intake:
            while not stop.wait(0.01):
                # The other way round than the worker: newest first.
                began = intake.execute("select clock_timestamp()").fetchone()
                intake.execute(
                    "update webhook.deliveries d set attempts = d.attempts + 1 from (select id from webhook.deliveries "
                    "where state = 'leased' order by id desc limit 30) as busy where busy.id = d.id"
                )
                ended = intake.execute("select clock_timestamp()").fetchone()
                assert began is not None
                assert ended is not None
                slowest.append((ended[0] - began[0]).total_seconds())

    thread = threading.Thread(target=duplicates)
    thread.start()
    try:
        with bench.worker(WORKER_BATCH_SIZE="32"):
            all_in(bench, identifiers, "done")
    finally:
        stop.set()
        thread.join(30)
    bench.must_have_happened_once(identifiers, request_ids)
    assert slowest
    assert max(slowest) < 5


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_metrics_say_what_happened(bench: Lab) -> None:
    port = free_port()
    bench.avatar("r-1", kind="style")
    with bench.worker(WORKER_METRICS_PORT=str(port)):
        bench.wait_state(bench.deliver(style("r-1"), "completed"), "done")
        bench.wait_state(bench.deliver(style("unknown"), "completed"), "parked")
        assert scrape(port, "/healthz") == "ok\n"
        text = scrape(port)
    assert 'webhook_worker_attempts_total{state="done"}' in text
    assert 'webhook_worker_effects_total{effect="stream",state="done"}' in text
    assert (
        'webhook_worker_effect_failures_total{effect="avatar",kind="parked",reason="avatar_not_found"}'
        in text
    )
    assert "webhook_worker_age_at_done_seconds_bucket" in text
    assert "webhook_worker_batch_deliveries_count" in text
    wait = [line for line in text.splitlines() if line.startswith("webhook_inbox_deliveries{")]
    assert {line.split('"')[1] for line in wait} == {"pending", "leased", "retry", "parked", "dead", "aside"}
    for line in text.splitlines():
        if line.startswith("# HELP"):
            assert len(line.split(" ", 3)[3]) > 5, line


def test_a_metrics_port_that_is_taken_keeps_no_worker_from_its_work(bench: Lab) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        bench.avatar("r-1", kind="style")
        with bench.worker(WORKER_METRICS_PORT=str(taken.getsockname()[1])):
            bench.wait_state(bench.deliver(style("r-1"), "completed"), "done")


def test_the_cost_of_a_batch_does_not_grow_with_the_table(bench: Lab) -> None:
    """With 60,000 finished deliveries: the same indexes, and hardly more blocks. A million: bench/worker."""
    bench.deliver_styles(names(40))
    finished(bench, 500)
    small = explained(bench)
    finished(bench, 60_000)
    large = explained(bench)
    for name, plan in large.items():
        assert "Seq Scan on deliveries" not in shown(plan), f"{name}\n{shown(plan)}"
        assert "Seq Scan on effects" not in shown(plan), f"{name}\n{shown(plan)}"
        before, after = blocks(small[name]), blocks(plan)
        assert after < 2 * before + 200, f"{name} touched {before} blocks, now {after}\n{shown(plan)}"


def finished(bench: Lab, count: int) -> None:
    """Put deliveries of the past into the inbox."""
    run = bench.connection.execute
    run("alter table webhook.deliveries disable trigger user")
    run(
        """
        insert into webhook.deliveries (source, request_id, dedup_key, status, body, body_sha256, state, done_at)
        select 'fal', 'old-' || g || '-' || %(count)s, 'completed:x', 'completed', '{}', repeat('0', 64), 'done', now()
        from generate_series(1, %(count)s) g
        """,
        {"count": count},
    )
    run(
        "insert into webhook.effects (delivery_id, name, state) "
        "select id, 'stream', 'done' from webhook.deliveries where state = 'done' on conflict do nothing"
    )
    run("alter table webhook.deliveries enable trigger user")
    run("vacuum analyze webhook.deliveries")
    run("vacuum analyze webhook.effects")


def explained(bench: Lab) -> dict[str, dict[str, Any]]:
    """The plans of the worker's statements, run and taken back."""
    plans = {}
    for name, query, given in statements(bench):
        with bench.connection.transaction(force_rollback=True):
            row = bench.connection.execute(
                f"explain (analyze, buffers, format json) {query}",  # type: ignore[call-overload]
                given,
            ).fetchone()
        plans[name] = row[0][0]["Plan"]
    return plans


def blocks(plan: dict[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


def statements(bench: Lab) -> list[tuple[str, str, dict[str, Any]]]:
    """The worker's statements over the inbox, with what they are given for 40 deliveries."""
    from webhook_api import gauges
    from webhook_api.effects import base, stream

    ids = [
        row[0]
        for row in bench.connection.execute("select id from webhook.deliveries where state = 'pending'")
    ]
    claimed = {"owner": "x", "limit": 40, "lease": 60.0, "bytes": 10**7, "suspects": 1}
    owners = [f"x:{identifier}:0" for identifier in ids]
    many = {
        "ids": ids, "owners": owners, "states": ["done"] * len(ids), "delays": [0.0] * len(ids),
        "errors": [None] * len(ids),
    }  # fmt: skip
    requests = {"ids": ids, "request_ids": names(40), "probes": [False] * 40, "statuses": ["completed"] * 40}
    return [
        ("claim fresh", queue._CLAIM_FRESH, claimed),
        ("claim again", queue._CLAIM_AGAIN, claimed),
        ("next due", queue._NEXT_DUE, {}),
        ("expire", queue._EXPIRE, {"limit": 3}),
        ("records", queue._RECORDS.replace("%s", "%(ids)s"), many),
        ("fence", base._FENCE_MANY, many),
        ("older", stream._OLDER, requests),
        ("told", stream._TOLD_BY_RECONCILE, requests),
        ("told by others", stream._TOLD_BY_OTHERS, requests),
        ("renew", queue._RENEW, {"owners": owners, "lease": 60.0}),
        ("finish", queue._FINISH_MANY, many),
        ("wake", queue._WAKE, requests),
        ("gauges", gauges._QUERY.replace("%", "%%"), {}),
    ]


def shown(plan: dict[str, Any], depth: int = 0) -> str:
    line = (
        f"{'  ' * depth}{plan['Node Type']} on {plan.get('Relation Name', '')} {plan.get('Index Name', '')}"
    )
    return "\n".join([line, *(shown(child, depth + 1) for child in plan.get("Plans", ()))])


def test_json_of_every_record_is_plain(bench: Lab) -> None:
    [identifier] = bench.deliver_styles(names(1))
    with bench.worker():
        bench.wait_state(identifier, "done")
    for effect in bench.effects(identifier).values():
        json.dumps(effect["detail"])


@contextmanager
def tools(bench: Lab) -> Iterator[Tools]:
    """What effects work with, without a worker that claims."""
    idle = Worker(bench.settings(), bench.tmp_path / "idle")
    idle._database.open()
    try:
        yield idle._tools
    finally:
        idle._database.close()
        idle._redis.close()
        idle._wake_in.close()
        idle._wake_out.close()


@pytest.mark.parametrize("after", ["nothing", "avatar"])
def test_a_batch_whose_leases_were_taken_over_records_nothing(bench: Lab, after: str) -> None:
    """A worker that was taken for dead wakes up in the middle: whoever has the lease now decides."""
    identifiers = bench.deliver_styles(names(4))

    def take_over(_job: Job) -> Outcome | None:
        bench.connection.execute("update webhook.deliveries set lease_owner = 'another'")
        return Outcome.skipped("the thief")

    with tools(bench) as given:
        claims = claim(bench, "one", 10, 60)
        deliveries, _ = batch.split(claims)
        thief = Effect("thief", lambda _job: Outcome.skipped(""), quick=take_over)
        place = 0 if after == "nothing" else 1
        order = [*ORDER[:place], thief, *ORDER[place:]]
        handled = batch.attempt_many(deliveries, order, given, Policy(), lambda _delivery: False)
    assert handled.ended == []
    for identifier in identifiers:
        found = bench.delivery(identifier)
        assert (found["state"], found["lease_owner"]) == ("leased", "another")
        assert set(bench.effects(identifier)) == ({"avatar"} if after == "avatar" else set())
    done = "completed" if after == "avatar" else "training"
    assert {bench.row(name)["status"] for name in names(4)} == {done}
    if after == "nothing":
        assert bench.entries() == []


def test_a_defect_in_a_batch_concerns_nobody_else(bench: Lab) -> None:
    """What breaks for all together is tried for each alone; what breaks there as well is told from the others."""
    identifiers = bench.deliver_styles(names(3))

    def broken(_jobs: object) -> dict[int, Outcome]:
        raise ValueError("a defect")

    with tools(bench) as given:
        deliveries, _ = batch.split(claim(bench, "one", 10, 60))
        order = [ORDER[0], Effect("raw_archive", raw_archive.run, many=broken), *ORDER[2:]]
        handled = batch.attempt_many(deliveries, order, given, Policy(), lambda _delivery: False)
    assert [delivery.id for delivery in handled.alone] == identifiers
    assert {frozenset(bench.effects(identifier)) for identifier in identifiers} == {frozenset({"avatar"})}


@pytest.mark.parametrize("path", ["batch", "alone"])
def test_a_commit_that_nobody_heard_of_is_not_done_again(
    bench: Lab, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """An error that is written once more is a change too: OK without a payload leaves one behind (fal.md)."""
    bench.avatar("r-1")
    bench.connection.execute(
        """
        create table changes (at timestamptz default now());
        create function count_change() returns trigger language plpgsql as
            'begin insert into changes default values; return null; end';
        create trigger changed after update on avatars for each row execute function count_change()
        """
    )
    unheard: list[str] = []

    def lose_the_answer(result: Any) -> Any:
        if not unheard:
            unheard.append(path)
            raise EffectError(Failure.OUTAGE, "database_unavailable", "the connection is lost")
        return result

    def run(job: Job) -> Outcome:
        outcome: Outcome = lose_the_answer(avatar.run(job))
        return outcome

    def many(jobs: Sequence[Job]) -> dict[int, Result]:
        if path == "alone":
            return {}
        results: dict[int, Result] = lose_the_answer(avatar.run_many(jobs))
        return results

    monkeypatch.setattr(loop, "ORDER", (Effect("avatar", run, many=many), *ORDER[1:]))
    identifier = bench.deliver({"request_id": "r-1", "status": "OK", "payload": None}, "completed")
    with bench.worker():

        def done() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["state"] == "done")

        wait_for(done, "done", 60)
    assert unheard == [path]
    assert bench.connection.execute("select count(*) from changes").fetchone() == (1,)
    assert len(bench.entries()) == 1


def test_a_hanging_media_host_holds_up_no_avatar(bench: Lab) -> None:
    """Files that do not come wait by themselves, however many: others' avatars are not behind them."""
    gate = threading.Event()
    with MediaHost() as media:
        media.files = {"/file": File(b"x" * 1000, gate=gate)}
        slow = {"status": "OK", "payload": {"finetune_id": "ft", "file": {"url": media.url("/file")}}}
        try:
            with bench.worker(ARCHIVE_ALLOW_HTTP_HOSTS=media.address, WORKER_CONCURRENCY="1"):
                for number in range(300):
                    bench.avatar(f"slow-{number}", kind="style")
                    bench.deliver({"request_id": f"slow-{number}", **slow}, "completed")
                assert media.half_sent.wait(120)
                bench.avatar("quick", kind="style")
                identifier = bench.deliver(
                    {"request_id": "quick", "status": "ERROR", "error": "no"}, "failed"
                )
                bench.wait_state(identifier, "done", seconds=30)
                # Theirs as well: only the files are waited for.
                for number in (0, 299):
                    wait_for(lambda n=number: bench.row(f"slow-{n}")["status"] == "completed", "avatar", 30)
        finally:
            gate.set()
