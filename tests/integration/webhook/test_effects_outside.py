"""`forward` and `telegram` against real HTTP servers: signed, once, in time, and nobody's way is blocked by them."""

from __future__ import annotations

import base64
import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from standardwebhooks import Webhook

from tests.support.recorded_server import Answer, Asked, Recorded, Route, serve
from tests.support.workerlab import Lab, process, wait_for

pytestmark = pytest.mark.backends

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OLD_SECRET = "whsec_" + base64.b64encode(b"another-key-of-thirty-two-bytes!").decode()
TOKEN = "12345678:AAhunter2-hunter2_hunter2"
SEND = f"POST /bot{TOKEN}/sendMessage"
SEED = 2**53 + 111


def style(request_id: str, **payload: Any) -> dict[str, Any]:
    return {"request_id": request_id, "status": "OK", "payload": {"finetune_id": "ft", **payload}}


def answering(routes: dict[str, Route]) -> AbstractContextManager[Recorded]:
    return serve(Recorded(routes))


def forward_to(server: Recorded, **changes: str) -> dict[str, str]:
    return {
        "FORWARD_URL": f"{server.url}/in",
        "FORWARD_SECRET": SECRET,
        "OUTBOUND_ALLOW_PRIVATE_HOSTS": server.url[7:],
        **changes,
    }


def telegram_at(server: Recorded, **changes: str) -> dict[str, str]:
    return {
        "TELEGRAM_API_URL": server.url,
        "TELEGRAM_BOT_TOKEN": TOKEN,
        "TELEGRAM_CHAT_ID": "-100200",
        "OUTBOUND_ALLOW_PRIVATE_HOSTS": server.url[7:],
        **changes,
    }


def hurried(bench: Lab, identifier: int, state: str) -> Callable[[], bool]:
    def there() -> bool:
        bench.hurry()
        return bool(bench.delivery(identifier)["state"] == state)

    return there


def sent(message_id: int = 7) -> Answer:
    return Answer(200, json.dumps({"ok": True, "result": {"message_id": message_id}}).encode())


def test_a_delivery_is_handed_on_signed(bench: Lab) -> None:
    avatar = bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(204, b"")}) as server, bench.worker(**forward_to(server)):
        identifier = bench.deliver(style("r-1", seed=SEED, note="ä\u2028<>"), "completed")
        bench.wait_state(identifier, "done")
    (asked,) = server.asked
    document = Webhook(SECRET).verify(asked.body, asked.headers)
    assert document["type"] == "delivery.completed"
    data = document["data"]
    assert (data["delivery_id"], data["avatar_id"], data["avatar_status"]) == (
        identifier,
        avatar,
        "completed",
    )
    assert data["original"] == style("r-1", seed=SEED, note="ä\u2028<>")
    effect = bench.effects(identifier)["forward"]
    assert effect["detail"]["message_id"] == asked.headers["webhook-id"]
    assert len(bench.entries()) == 1


def test_nothing_is_handed_on_unless_it_is_asked_for_and_no_probe_ever(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(204, b"")}) as server:
        with bench.worker():
            plain = bench.deliver(style("r-1"), "completed")
            bench.wait_state(plain, "done")
        assert set(bench.effects(plain)) == {"avatar", "raw_archive", "archive", "stream"}
        with bench.worker(**forward_to(server)):
            probe = bench.deliver(style("probe-1"), "completed", probe=True)
            bench.wait_state(probe, "done")
        assert bench.effects(probe)["forward"]["state"] == "skipped"
    assert server.asked == []


def test_what_is_tried_again_keeps_its_id_and_both_secrets_hold(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    answers = iter([Answer(500), Answer(302, b"", {"Location": "/other"}), Answer(503), Answer(200)])
    with answering({"POST /in": lambda _asked: next(answers)}) as server:
        both = forward_to(server, FORWARD_SECRET=f"{SECRET} {OLD_SECRET}")
        with bench.worker(**both):
            identifier = bench.deliver(style("r-1"), "completed")
            wait_for(hurried(bench, identifier, "done"), "the fourth attempt", 60)
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 1
    assert [asked.path for asked in server.asked] == ["/in"] * 4
    for asked in server.asked:
        Webhook(SECRET).verify(asked.body, asked.headers)
        Webhook(OLD_SECRET).verify(asked.body, asked.headers)
    assert bench.effects(identifier)["avatar"]["tries"] == 1
    assert len(bench.entries()) == 1


@pytest.mark.parametrize("status", [410, 404])
def test_a_server_that_says_no_is_given_up_alone(bench: Lab, status: int) -> None:
    bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(status)}) as server, bench.worker(**forward_to(server)):
        identifier = bench.deliver(style("r-1"), "completed")
        wait_for(hurried(bench, identifier, "dead"), "given up", 60)
    assert len(server.asked) == 3
    effects = bench.effects(identifier)
    assert effects["forward"]["detail"]["reason"] == f"forward_http_{status}"
    assert {name for name, effect in effects.items() if effect["state"] != "failed"} == {
        "avatar", "raw_archive", "archive", "stream",
    }  # fmt: skip
    assert bench.row("r-1")["status"] == "completed"


def test_a_server_that_fails_for_more_than_a_day_is_given_up(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(500)}) as server, bench.worker(**forward_to(server)):
        identifier = bench.deliver(style("r-1"), "completed")

        def tried() -> bool:
            bench.hurry()
            return bool(bench.delivery(identifier)["tries"] > 5)

        wait_for(tried, "more tries than EVENT_MAX_ATTEMPTS", 60)
        assert bench.delivery(identifier)["state"] != "dead"
        bench.connection.execute(
            "update webhook.effects set detail = detail || '{\"since\": 1}' where name = 'forward'"
        )

        def dead() -> bool:
            # An attempt that was under way may have written the former time again.
            bench.connection.execute(
                "update webhook.effects set detail = detail || '{\"since\": 1}' where name = 'forward'"
            )
            return hurried(bench, identifier, "dead")()

        wait_for(dead, "given up", 60)
    detail = bench.effects(identifier)["forward"]["detail"]
    assert (detail["kind"], detail["final"]) == ("unreachable", True)
    assert bench.effects(identifier)["forward"]["tries"] == 0


def test_a_pause_that_is_asked_for_is_kept(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(503, b"", {"Retry-After": "1800"})}) as server:
        with bench.worker(**forward_to(server)):
            identifier = bench.deliver(style("r-1"), "completed")
            bench.wait_state(identifier, "retry")
        due = bench.connection.execute(
            "select extract(epoch from next_attempt_at - now()) from webhook.deliveries"
        ).fetchone()
        assert due is not None
        assert 1600 < due[0] <= 1800
        # Not even a new worker asks, when another effect or a person hurries the delivery.
        with bench.worker(**forward_to(server)):
            before = bench.delivery(identifier)["tries"]
            bench.hurry()
            wait_for(lambda: bench.delivery(identifier)["tries"] > before, "another attempt")
            bench.wait_state(identifier, "retry")
    assert len(server.asked) == 1


def test_a_server_that_hangs_delays_no_avatar(bench: Lab) -> None:
    gate = threading.Event()

    def hang(_asked: Asked) -> Answer:
        gate.wait(60)
        return Answer(204, b"")

    for number in range(60):
        bench.avatar(f"r-{number}", kind="style")
    with answering({"POST /in": hang}) as server:
        changes = forward_to(server, FORWARD_TIMEOUT_SECONDS="30", WORKER_CONCURRENCY="2")
        with bench.worker(**changes):
            started = time.monotonic()
            for number in range(60):
                bench.deliver(style(f"r-{number}"), "completed")
            wait_for(lambda: len(bench.entries()) == 60, "all entries while the server hangs", 29)
            assert time.monotonic() - started < 29
            gate.set()

            def all_done() -> bool:
                bench.hurry()
                row = bench.connection.execute(
                    "select count(*) from webhook.deliveries where state = 'done'"
                ).fetchone()
                return bool(row and row[0] == 60)

            wait_for(all_done, "all handed on", 60)
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 60


def test_killed_between_the_answer_and_its_record(bench: Lab) -> None:
    """The receiver gets it twice, under one id: that is what the id is for."""
    bench.avatar("r-1", kind="style")
    taken = threading.Event()
    gate = threading.Event()

    def take(_asked: Asked) -> Answer:
        if not taken.is_set():
            taken.set()
            gate.wait(60)
        return Answer(204, b"")

    with answering({"POST /in": take}) as server:
        identifier = bench.deliver(style("r-1"), "completed")
        with process(bench, **forward_to(server)) as first:
            assert taken.wait(30)
            first.send_signal(signal.SIGKILL)
            first.wait(10)
        gate.set()
        with process(bench, **forward_to(server)):
            bench.wait_state(identifier, "done", seconds=60)
    assert len(server.asked) == 2
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 1
    assert len(bench.entries()) == 1


def test_what_an_operator_asks_for_again_is_another_message(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    with answering({"POST /in": Answer(204, b"")}) as server, bench.worker(**forward_to(server)):
        identifier = bench.deliver(style("r-1"), "completed")
        bench.wait_state(identifier, "done")
        bench.connection.execute(
            "update webhook.effects set state = 'failed', detail = '{\"replay\": 1}' where name = 'forward'"
        )
        bench.connection.execute(
            "update webhook.deliveries set state = 'retry', done_at = null, next_attempt_at = now()"
        )
        wait_for(lambda: len(server.asked) == 2, "the second message")
        bench.wait_state(identifier, "done")
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 2


def test_a_body_that_a_copy_would_falsify_goes_as_bytes(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    raw = b'{"request_id":"r-1","status":"OK","payload":{"finetune_id":"ft","a":1,"a":2,"n":NaN}}'
    with answering({"POST /in": Answer(204, b"")}) as server, bench.worker(**forward_to(server)):
        identifier = bench.deliver(raw, "completed")
        bench.connection.execute(
            "update webhook.deliveries set request_id = 'r-1' where id = %s", (identifier,)
        )
        wait_for(lambda: server.asked, "the call")
    data = json.loads(server.asked[0].body)["data"]
    assert base64.b64decode(data["original_base64"]) == raw
    assert "original" not in data


def test_telegram_hears_how_a_training_ended(bench: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench.avatar("r-1")
    error = "<b>CUDA</b> & \u202e\x00 out of memory " + "x" * 5000
    with answering({SEND: sent()}) as server, bench.worker(**telegram_at(server)):
        progress = bench.deliver({"request_id": "r-1", "status": "IN_PROGRESS"}, "in_progress")
        bench.wait_state(progress, "done")
        identifier = bench.deliver({"request_id": "r-1", "status": "ERROR", "error": error}, "failed")
        bench.wait_state(identifier, "done")
    (asked,) = server.asked
    document = json.loads(asked.body)
    assert (document["chat_id"], document["parse_mode"]) == ("-100200", "HTML")
    assert "<b>❌ Training failed</b>" in document["text"]
    assert "&lt;b&gt;CUDA&lt;/b&gt; &amp;" in document["text"]
    assert len(document["text"]) < 4096
    assert bench.effects(progress)["telegram"]["state"] == "skipped"
    effect = bench.effects(identifier)["telegram"]
    assert effect["detail"] == {"message_id": 7, "repeated": False}
    assert "hunter2" not in str([record.__dict__ for record in caplog.records])


def test_a_flood_waits_as_long_as_telegram_says(bench: Lab, caplog: pytest.LogCaptureFixture) -> None:
    bench.avatar("r-1", kind="style")
    flood = {
        "ok": False,
        "error_code": 429,
        "description": "Too Many Requests",
        "parameters": {"retry_after": 900},
    }
    with (
        answering({SEND: Answer(429, json.dumps(flood).encode())}) as server,
        bench.worker(**telegram_at(server)),
    ):
        identifier = bench.deliver(style("r-1"), "completed")
        bench.wait_state(identifier, "retry")
        bench.hurry()
        wait_for(lambda: bench.delivery(identifier)["tries"] > 1, "another attempt")
        bench.wait_state(identifier, "retry")
        # Another delivery's message waits as well.
        bench.avatar("r-2", kind="style")
        other = bench.deliver(style("r-2"), "completed")
        bench.wait_state(other, "retry")
    assert len(server.asked) == 1
    for each in (identifier, other):
        detail = bench.effects(each)["telegram"]["detail"]
        assert detail["not_before"] - time.time() > 600
        assert not detail.get("announced")
        assert "hunter2" not in json.dumps(bench.effects(each), default=str)
    assert len(bench.entries()) == 2
    assert "hunter2" not in str([record.__dict__ for record in caplog.records])


def test_a_message_that_may_have_been_sent_says_so_when_it_comes_again(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    taken, gate = threading.Event(), threading.Event()

    def take(_asked: Asked) -> Answer:
        if not taken.is_set():
            taken.set()
            gate.wait(60)
        return sent(8)

    with answering({SEND: take}) as server:
        identifier = bench.deliver(style("r-1"), "completed")
        with process(bench, **telegram_at(server)) as first:
            assert taken.wait(30)
            first.send_signal(signal.SIGKILL)
            first.wait(10)
        gate.set()
        with process(bench, **telegram_at(server)):
            bench.wait_state(identifier, "done", seconds=60)
    texts = [json.loads(asked.body)["text"] for asked in server.asked]
    assert ["repetition" in text for text in texts] == [False, True]
    assert bench.effects(identifier)["telegram"]["detail"] == {"message_id": 8, "repeated": True}


def test_a_message_that_was_refused_is_no_repetition(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    no = Answer(403, b'{"ok":false,"error_code":403,"description":"Forbidden: bot was kicked"}')
    answers = iter([no, Answer(401, b"{}"), sent()])
    with answering({SEND: lambda _asked: next(answers)}) as server, bench.worker(**telegram_at(server)):
        identifier = bench.deliver(style("r-1"), "completed")
        wait_for(hurried(bench, identifier, "done"), "sent", 60)
    assert all("repetition" not in json.loads(asked.body)["text"] for asked in server.asked)


def test_what_was_given_up_raises_an_alarm_once(bench: Lab) -> None:
    bench.avatar("r-1", kind="style")
    bench.avatar("r-2", kind="style")
    with answering({SEND: sent()}) as server, bench.worker(**telegram_at(server, TELEGRAM_NOTIFY="given_up")):
        good = bench.deliver(style("r-1"), "completed")
        bench.wait_state(good, "done")
        evil = {"url": "https://evil.example/<x>"}
        identifier = bench.deliver(style("r-2", file=evil), "completed")
        wait_for(hurried(bench, identifier, "dead"), "given up", 60)
    (asked,) = server.asked
    text = json.loads(asked.body)["text"]
    assert "Given up" in text
    assert "media_host_refused" in text
    assert "r-2" in text
    assert bench.effects(good)["telegram_alarm"]["state"] == "skipped"
    assert "telegram" not in bench.effects(identifier)
