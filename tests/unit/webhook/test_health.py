"""Health: truthful when a dependency fails, hangs or comes back; 200 exactly while deliveries can be accepted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from webhook_api.config import load_settings
from webhook_api.health import SILENCE, CheckFailed, Monitor, report
from webhook_api.inbox.spool import SpoolState

from tests.unit.webhook.test_config import GOOD

OK: dict[str, Any] = {"ok": True, "latency_ms": 1.0}
DOWN: dict[str, Any] = {"ok": False, "latency_ms": 1.0, "error": "unreachable"}
KEYS: dict[str, Any] = {"ok": True, "keys": 1, "age_seconds": 1, "stale": False}
SETTINGS = load_settings(GOOD)
NO_SECRET = load_settings({**GOOD, "FAL_WEBHOOK_SECRET": ""})


def checks(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"database": OK, "redis": OK, "object_store": OK} | changes


@pytest.mark.parametrize(
    ("settings", "given", "keys", "storing", "expected"),
    [
        (SETTINGS, checks(), KEYS, True, (200, "healthy")),
        (SETTINGS, checks(redis=DOWN), KEYS, True, (200, "degraded")),
        (SETTINGS, checks(object_store=DOWN), KEYS, True, (200, "degraded")),
        (SETTINGS, checks(database=DOWN), KEYS, True, (503, "unhealthy")),
        (SETTINGS, checks(), KEYS, False, (503, "unhealthy")),
        (SETTINGS, checks(), {"ok": False, "keys": 0}, True, (200, "degraded")),
        (NO_SECRET, checks(), {"ok": False, "keys": 0}, True, (503, "unhealthy")),
        (NO_SECRET, checks(), {**KEYS, "stale": True}, True, (200, "degraded")),
    ],
)
def test_what_health_says(
    settings: Any, given: dict[str, Any], keys: dict[str, Any], storing: bool, expected: tuple[int, str]
) -> None:
    code, document = report(settings, given, keys, storing=storing)
    assert (code, document["status"]) == expected


TAKES = SpoolState(ok=True, rows=0, bytes=0, oldest_seconds=None, files=1, rejected=0)
HOLDS = SpoolState(ok=True, rows=3, bytes=9000, oldest_seconds=4.5, files=1, rejected=0)
FULL = SpoolState(ok=False, rows=3, bytes=9000, oldest_seconds=4.5, files=1, rejected=0, error="full")


@pytest.mark.parametrize(
    ("spool", "given", "storing", "expected"),
    [
        (TAKES, checks(), True, (200, "healthy")),
        (HOLDS, checks(), True, (200, "degraded")),
        (FULL, checks(), True, (200, "degraded")),
        (HOLDS, checks(database=DOWN), False, (200, "degraded")),
        (TAKES, checks(database=DOWN), True, (200, "degraded")),
        (FULL, checks(database=DOWN), True, (503, "unhealthy")),
        (FULL, checks(), False, (503, "unhealthy")),
    ],
)
def test_what_health_says_of_a_spool(
    spool: SpoolState, given: dict[str, Any], storing: bool, expected: tuple[int, str]
) -> None:
    code, document = report(SETTINGS, given, KEYS, storing=storing, spool=spool)
    assert (code, document["status"]) == expected
    assert document["checks"]["spool"]["rows"] == spool.rows


def test_a_failed_store_shows_although_the_check_passed() -> None:
    _, document = report(SETTINGS, checks(), KEYS, storing=False)
    assert document["checks"]["database"]["error"] == "last_store_failed"


def test_a_check_that_raises_is_down_with_a_word_for_it() -> None:
    def refuse() -> None:
        raise CheckFailed("authentication", "user u at host h")

    def broken() -> None:
        raise ZeroDivisionError

    monitor = Monitor({"a": refuse, "b": broken})
    assert monitor.run_once("a").error == "authentication"
    assert monitor.run_once("b").error == "defect"
    assert "host" not in str(monitor.snapshot())


def test_an_old_answer_is_not_shown_as_a_fresh_one() -> None:
    now = 100.0
    monitor = Monitor({"a": lambda: None}, clock=lambda: now)
    assert monitor.snapshot()["a"]["error"] == "not_checked_yet"
    monitor.run_once("a")
    assert monitor.snapshot()["a"]["ok"]
    now += SILENCE + 2
    assert monitor.snapshot()["a"] == {"ok": False, "latency_ms": 5000.0, "error": "no_answer"}


def test_a_check_that_hangs_holds_nobody_up() -> None:
    release = threading.Event()
    ran = threading.Event()
    monitor = Monitor({"hangs": lambda: release.wait(60) and None, "fine": ran.set}, interval=0.01)
    monitor.start()
    try:
        assert ran.wait(30)
        # Had it waited for the check, it would show its answer.
        assert monitor.snapshot()["hangs"]["error"] == "not_checked_yet"
    finally:
        monitor.stop()
        release.set()
