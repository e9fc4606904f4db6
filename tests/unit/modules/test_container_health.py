"""The health gate against recorded inspections and scripted events."""

from __future__ import annotations

import queue
from datetime import UTC, datetime, timedelta

import pytest
from ansible.module_utils.container_health import (
    HealthGate,
    Memory,
    Wanted,
    exit_text,
    failure_message,
    judge,
    parse_time,
)
from ansible.module_utils.docker_engine import EngineError

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


def stamp(seconds_ago: float) -> str:
    return (NOW - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z"


def container(
    status="running", health=None, restarts=0, exit_code=0, oom=False, started=60.0, finished=None, **state
):
    found = {
        "Id": "f" * 64,
        "Image": "sha256:" + "1" * 64,
        "RestartCount": restarts,
        "Config": {"Image": "127.0.0.1:5000/webhook-api@sha256:" + "2" * 64, "Labels": {"release": "r-1"}},
        "State": {
            "Status": status,
            "ExitCode": exit_code,
            "OOMKilled": oom,
            "Error": "",
            "StartedAt": stamp(started),
            "FinishedAt": "0001-01-01T00:00:00Z" if finished is None else stamp(finished),
            **state,
        },
    }
    if health:
        log = [{"End": stamp(1), "ExitCode": int(health != "healthy"), "Output": "connection refused"}]
        found["State"]["Health"] = {"Status": health, "FailingStreak": 3, "Log": log}
    return found


def verdict(found, wanted=None, memory=None, now=0.0):
    return judge(wanted or Wanted("c"), found, memory or Memory(), now, NOW)


@pytest.mark.parametrize(
    ("found", "outcome", "reason"),
    [
        (container(health="healthy"), "ready", "healthy"),
        (container(health="healthy", restarts=50), "ready", "healthy"),
        (container(), "ready", "running"),
        (container(started=0.2), "wait", "settling"),
        (container(health="starting"), "wait", "starting"),
        (container(health="unhealthy"), "wait", "unhealthy"),
        (container("created"), "wait", "created"),
        (container("created", Error="port is already allocated"), "failed", "start_failed"),
        (container("exited", exit_code=1), "failed", "exited"),
        (container("dead"), "failed", "exited"),
        (container("paused"), "failed", "paused"),
        (container("restarting", restarts=1, started=1, finished=0.9), "wait", "restarting"),
        (container("restarting", restarts=7, started=1, finished=0.9), "failed", "crash_loop"),
        (container("restarting", restarts=7, started=9000, finished=0.9), "wait", "restarting"),
        (None, "failed", "missing"),
    ],
)
def test_what_one_look_says(found, outcome, reason):
    said = verdict(found)
    assert (said.outcome, said.reason) == (outcome, reason)


def test_one_crash_is_a_slow_start_and_two_are_a_loop():
    memory = Memory()
    assert verdict(container(health="starting"), memory=memory).outcome == "wait"
    assert verdict(container(health="starting", restarts=1), memory=memory).outcome == "wait"
    said = verdict(container(health="starting", restarts=2, exit_code=78), memory=memory)
    assert said.reason == "crash_loop"
    assert "EX_CONFIG" in said.text


def test_restarts_of_long_ago_do_not_count():
    memory = Memory()
    assert verdict(container(health="starting", restarts=50), memory=memory).outcome == "wait"
    assert verdict(container(health="starting", restarts=51), memory=memory).outcome == "wait"
    assert verdict(container(health="starting", restarts=52), memory=memory).reason == "crash_loop"


def test_a_new_container_under_the_name_starts_counting_anew():
    memory = Memory()
    verdict(container(health="starting", restarts=9), memory=memory)
    assert verdict(container(health="starting", restarts=0), memory=memory).outcome == "wait"
    assert verdict(container(health="starting", restarts=1), memory=memory).outcome == "wait"
    assert verdict(container(health="starting", restarts=2), memory=memory).reason == "crash_loop"


def test_an_unhealthy_container_has_a_grace_that_recovery_renews():
    wanted, memory = Wanted("c", unhealthy_grace=10), Memory()
    assert verdict(container(health="unhealthy"), wanted, memory, 0).outcome == "wait"
    assert verdict(container(health="unhealthy"), wanted, memory, 9).outcome == "wait"
    assert verdict(container(health="healthy"), wanted, memory, 9.5).outcome == "ready"
    assert verdict(container(health="unhealthy"), wanted, memory, 10).outcome == "wait"
    assert verdict(container(health="unhealthy"), wanted, memory, 20).outcome == "failed"


def test_a_health_check_may_be_demanded():
    assert verdict(container(), Wanted("c", require_healthcheck=True)).reason == "no_healthcheck"


def test_a_wrong_label_fails_even_a_healthy_container():
    said = verdict(container(health="healthy"), Wanted("c", expect_labels={"release": "r-2"}))
    assert said.reason == "wrong_label"
    assert "'r-1'" in said.text
    assert "not set" in verdict(container(), Wanted("c", expect_labels={"other": "x"})).text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"ExitCode": 137, "OOMKilled": True}, "memory limit"),
        ({"ExitCode": 78}, "setting"),
        ({"ExitCode": 127}, "not found"),
        ({"ExitCode": 5}, "exit code 5"),
    ],
)
def test_exits_in_words(state, words):
    assert words in exit_text(state)


def test_times_of_the_engine():
    assert parse_time("2026-11-22T12:00:00.123456789Z") == NOW.replace(microsecond=123456)
    assert parse_time("2026-11-22T12:00:00Z") == NOW
    assert parse_time("0001-01-01T00:00:00Z") is None
    assert parse_time("") is None
    assert parse_time("nonsense") is None


class Stream:
    """Events that the test hands out; None ends the stream."""

    def __init__(self):
        self.queue = queue.Queue()

    def __iter__(self):
        return iter(self.queue.get, None)

    def close(self):
        self.queue.put(None)


class FakeEngine:
    """Shows the next recorded inspection at each look; announces every change but the first as an event."""

    def __init__(self, looks, *, events="work"):
        self.looks, self.mode = {name: list(found) for name, found in looks.items()}, events
        self.order: list[str] = []
        self.stream = Stream()

    def events(self, since, names, actions):
        self.order.append("subscribe")
        if self.mode == "refused":
            raise EngineError("engine_error", "no events here")
        if self.mode == "breaks":
            self.stream.close()
        return self.stream

    def inspect(self, name):
        self.order.append("look")
        looks = self.looks[name]
        found = looks.pop(0) if len(looks) > 1 else looks[0]
        if self.mode == "work" and len(looks) > 1:
            self.stream.queue.put({"status": "health_status: healthy"})
        elif self.mode == "work":
            self.stream.queue.put({"status": "start"})
        return found

    def image_names(self, image):
        return [image, "127.0.0.1:5000/webhook-api:tag"]

    def last_lines(self, name, lines):
        return []


def gate(looks, wanted=None, **options):
    engine = FakeEngine(looks, **options)
    return engine, HealthGate(engine, wanted or [Wanted(name) for name in looks], wall=lambda: NOW)


def test_it_subscribes_before_the_first_look():
    engine, health = gate({"a": [container(health="healthy")]})
    assert health.wait()[0]["ok"]
    assert engine.order == ["subscribe", "look"]
    assert health.events_used


@pytest.mark.parametrize("mode", ["work", "breaks", "refused"])
@pytest.mark.timeout(20)
def test_it_gets_there_by_events_and_without(mode):
    looks = {
        "a": [container(health="starting"), container(health="starting"), container(health="healthy")],
        "b": [container("created"), container(health="healthy")],
    }
    _, health = gate(looks, events=mode)
    assert [result["ok"] for result in health.wait()] == [True, True]


def test_a_timeout_names_what_it_was_waiting_for():
    _, health = gate({"a": [container(health="starting")]}, [Wanted("a", timeout=0.2)])
    (result,) = health.wait()
    assert result["reason"] == "timeout"
    assert "has not passed yet" in result["detail"]


def test_one_failure_does_not_end_the_wait_for_the_others():
    looks = {"dead": [container("exited", exit_code=1)], "slow": [container(health="starting"), container()]}
    _, health = gate(looks)
    dead, slow = health.wait()
    assert not dead["ok"]
    assert slow["ok"]


@pytest.mark.parametrize(
    ("image", "ok"),
    [
        ("127.0.0.1:5000/webhook-api@sha256:" + "2" * 64, True),
        ("sha256:" + "1" * 64, True),
        ("127.0.0.1:5000/webhook-api:tag", True),
        ("127.0.0.1:5000/webhook-api@sha256:" + "3" * 64, False),
    ],
)
def test_the_image_that_is_expected(image, ok):
    _, health = gate({"a": [container(health="healthy")]}, [Wanted("a", expect_image=image)])
    (result,) = health.wait()
    assert result["ok"] is ok
    assert ok or result["reason"] == "wrong_image"


def test_the_message_has_everything_that_one_needs():
    _, health = gate(
        {"a": [container("exited", exit_code=137, oom=True)], "b": [container(health="healthy")]}
    )
    results = health.wait()
    results[0]["log"] = ["last words"]
    message = failure_message(results)
    for words in ("1 of 2", "a: it has ended", "memory limit", "last words"):
        assert words in message
    assert "b:" not in message


def test_a_health_log_is_returned():
    _, health = gate({"a": [container(health="unhealthy")]}, [Wanted("a", unhealthy_grace=0)])
    (result,) = health.wait()
    assert result["reason"] == "unhealthy"
    assert result["health_log"][0]["output"] == "connection refused"
    assert "connection refused" in failure_message([result])
