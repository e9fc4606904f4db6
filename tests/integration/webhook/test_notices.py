"""Notices of incidents: real PostgreSQL, real HTTP servers, several workers, restarts, and receivers that fail."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from standardwebhooks import Webhook
from webhook_api.states import EffectError, Failure
from webhook_api.worker import notices

from tests.support.recorded_server import Answer, Asked, Recorded, serve
from tests.support.workerlab import Lab, process, wait_for

pytestmark = pytest.mark.backends

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
TOKEN = "12345678:AAhunter2-hunter2_hunter2"
SEND = f"POST /bot{TOKEN}/sendMessage"
LOOKS = 2.5
"""Seconds in which every worker has looked at least once more."""


def settings(server: Recorded, **changes: str) -> dict[str, str]:
    return {
        "NOTICE_URL": f"{server.url}/ops",
        "FORWARD_SECRET": SECRET,
        "NOTICE_EVERY_SECONDS": "1",
        "NOTICE_SETTLE_SECONDS": "0",
        "OUTBOUND_ALLOW_PRIVATE_HOSTS": server.url[7:],
        **changes,
    }


def dead_letter(bench: Lab, request_id: str) -> int:
    identifier = bench.deliver({"request_id": request_id, "status": "OK"}, "completed")
    bench.connection.execute(
        "update webhook.deliveries set state = 'dead', last_error = 'a test' where id = %s", (identifier,)
    )
    return identifier


def discard(bench: Lab, *identifiers: int) -> None:
    bench.connection.execute(
        "update webhook.deliveries set discarded_at = now() where id = any(%s)", (list(identifiers),)
    )


def rows(bench: Lab) -> list[tuple[Any, ...]]:
    return bench.connection.execute(
        "select kind, closed_at is not null, told from webhook.incidents order by id"
    ).fetchall()


def told(server: Recorded) -> list[dict[str, Any]]:
    """What has arrived, each of it verified by the project's own library."""
    return [Webhook(SECRET).verify(asked.body, asked.headers) for asked in server.asked]


def have_come(server: Recorded, number: int) -> Callable[[], bool]:
    return lambda: len(server.asked) >= number


def test_an_incident_is_told_once_by_all_workers_together_and_once_when_it_is_over(bench: Lab) -> None:
    with serve(Recorded({"POST /ops": Answer(204, b"")})) as server:
        given = settings(server)
        with process(bench, **given, INSTANCE_ID="w-1"), process(bench, **given, INSTANCE_ID="w-2"):
            first = dead_letter(bench, "r-1")
            wait_for(have_come(server, 1), "the notice")
            second = dead_letter(bench, "r-2")
            time.sleep(LOOKS)
        with process(bench, **given, INSTANCE_ID="w-3"):
            time.sleep(LOOKS)
            assert len(server.asked) == 1, "one more dead letter, or a restart, is no other incident"
            discard(bench, first, second)
            wait_for(have_come(server, 2), "the end")
            time.sleep(LOOKS)
    opened, closed = told(server)
    assert opened["type"] == "incident.opened"
    assert (opened["data"]["kind"], opened["data"]["count"]) == ("dead_letters", 1)
    assert closed["type"] == "incident.closed"
    assert closed["data"]["incident"] == opened["data"]["incident"]
    assert closed["data"]["since"] == opened["data"]["since"] < closed["data"]["until"]
    assert rows(bench) == [("dead_letters", True, {"webhook": "closed"})]


def test_the_next_incident_is_told_again(bench: Lab) -> None:
    with serve(Recorded({"POST /ops": Answer(200)})) as server, process(bench, **settings(server)):
        for number in (1, 2):
            identifier = dead_letter(bench, f"r-{number}")
            wait_for(have_come(server, 2 * number - 1), "the notice")
            discard(bench, identifier)
            wait_for(have_come(server, 2 * number), "the end")
    assert [notice["type"] for notice in told(server)] == ["incident.opened", "incident.closed"] * 2
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 4


def test_a_receiver_that_fails_is_told_until_it_hears_under_one_id(bench: Lab) -> None:
    answers = iter([Answer(500), Answer(503), Answer(302, b"", {"Location": "/x"}), Answer(200)])
    route = {"POST /ops": lambda _asked: next(answers)}
    with serve(Recorded(route)) as server, process(bench, **settings(server)):
        dead_letter(bench, "r-1")
        wait_for(lambda: rows(bench) and rows(bench)[0][2], "an arrival", 60)
        time.sleep(LOOKS)
    assert len(server.asked) == 4
    assert len({asked.headers["webhook-id"] for asked in server.asked}) == 1
    assert rows(bench) == [("dead_letters", False, {"webhook": "opened"})]


def test_what_is_over_before_it_could_be_told_is_not_told(bench: Lab) -> None:
    working = threading.Event()
    route = {"POST /ops": lambda _asked: Answer(200 if working.is_set() else 500)}
    with serve(Recorded(route)) as server, process(bench, **settings(server)):
        identifier = dead_letter(bench, "r-1")
        wait_for(have_come(server, 1), "an attempt")
        discard(bench, identifier)
        wait_for(lambda: rows(bench)[0][1], "the end of the incident")
        working.set()
        heard = len(server.asked)
        time.sleep(LOOKS)
    assert len(server.asked) == heard
    assert rows(bench) == [("dead_letters", True, {})]


def test_stuck_deliveries_are_told_to_telegram(bench: Lab) -> None:
    answer = Answer(200, json.dumps({"ok": True, "result": {"message_id": 7}}).encode())
    with serve(Recorded({SEND: answer})) as server:
        given = settings(
            server,
            NOTICE_URL="",
            NOTICE_TELEGRAM="true",
            NOTICE_STUCK_SECONDS="600",
            TELEGRAM_API_URL=server.url,
            TELEGRAM_BOT_TOKEN=TOKEN,
            TELEGRAM_CHAT_ID="-100200",
        )
        stuck = bench.deliver({"request_id": "r-1", "status": "OK"}, "completed")
        parked = bench.deliver({"request_id": "r-2", "status": "OK"}, "completed")
        bench.connection.execute(
            "update webhook.deliveries set first_seen_at = now() - interval '1 hour', "
            "next_attempt_at = now() + interval '1 hour', state = case id when %s then 'retry' else 'parked' end "
            "where id in (%s, %s)",
            (stuck, stuck, parked),
        )
        with process(bench, **given):
            wait_for(have_come(server, 1), "the message")
            bench.connection.execute(
                "update webhook.deliveries set state = 'done', done_at = now() where id = %s", (stuck,)
            )
            wait_for(have_come(server, 2), "the end")
            time.sleep(LOOKS)
    opened, closed = (json.loads(asked.body) for asked in server.asked)
    assert "stuck" in opened["text"]
    assert "Deliveries: 1" in opened["text"]
    assert opened["chat_id"] == "-100200"
    assert "no delivery is stuck" in closed["text"].lower()
    assert rows(bench) == [("stuck", True, {"telegram": "closed"})]


def test_without_settings_nobody_looks(bench: Lab) -> None:
    with bench.worker():
        dead_letter(bench, "r-1")
        time.sleep(LOOKS)
    assert rows(bench) == []


class Recording:
    """A channel that notes what it is told, and may fail after it has arrived."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, str]] = []
        self.lost = False

    def tell(self, incident: Any, notice: str, _stop: Callable[[], bool]) -> None:
        self.heard.append((incident.id, notice))
        if self.lost:
            raise EffectError(Failure.UNREACHABLE, "notice_timeout", "the answer was lost")


def test_one_worker_at_a_time_looks_and_a_lost_answer_is_told_again(bench: Lab) -> None:
    given = bench.settings(NOTICE_URL="https://ops.example/", FORWARD_SECRET=SECRET)
    channel = Recording()
    dead_letter(bench, "r-1")
    bench.connection.execute("select pg_advisory_lock(%s)", (notices.LOCK_KEY,))
    assert not notices.look(given, {"webhook": channel}, lambda: False)
    assert (channel.heard, rows(bench)) == ([], [])
    bench.connection.execute("select pg_advisory_unlock(%s)", (notices.LOCK_KEY,))
    channel.lost = True
    assert notices.look(given, {"webhook": channel}, lambda: False)
    channel.lost = False
    notices.look(given, {"webhook": channel}, lambda: False)
    notices.look(given, {"webhook": channel}, lambda: False)
    assert len(channel.heard) == 2
    assert len(set(channel.heard)) == 1


def test_an_old_end_is_no_news(bench: Lab) -> None:
    bench.connection.execute(
        "insert into webhook.incidents (kind, opened_at, last_seen_at, closed_at, deliveries, oldest_seconds, told) values "
        "('stuck', now() - interval '3 days', now() - interval '2 days', now() - interval '2 days', 1, 1, "
        '\'{"webhook": "opened"}\')'
    )
    channel = Recording()
    given = bench.settings(NOTICE_URL="https://ops.example/", FORWARD_SECRET=SECRET)
    notices.look(given, {"webhook": channel}, lambda: False)
    assert channel.heard == []


def test_a_receiver_that_hangs_costs_deliveries_nothing(bench: Lab) -> None:
    release = threading.Event()

    def hang(_asked: Asked) -> Answer:
        release.wait(20)
        return Answer(200)

    bench.avatar("r-2", kind="style")
    with serve(Recorded({"POST /ops": hang})) as server, process(bench, **settings(server)):
        dead_letter(bench, "r-1")
        wait_for(have_come(server, 1), "the call")
        identifier = bench.deliver(
            {"request_id": "r-2", "status": "OK", "payload": {"finetune_id": "ft"}}, "completed"
        )
        bench.wait_state(identifier, "done", seconds=10)
        release.set()
