"""The breaker: while the database is down only one request at a time finds that out the slow way."""

from __future__ import annotations

from webhook_api.db import Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_lets_everyone_try_until_a_failure() -> None:
    breaker = Breaker(1.0, Clock())
    assert all(breaker.admit() for _ in range(5))
    assert breaker.closed


def test_after_a_failure_all_are_refused_for_the_pause_and_then_one_may_try() -> None:
    clock = Clock()
    breaker = Breaker(1.0, clock)
    breaker.fail("timeout")
    assert not breaker.admit()
    assert breaker.reason == "timeout"
    clock.now = 1.1
    assert breaker.admit()
    assert not breaker.admit()
    breaker.fail("timeout")
    assert not breaker.admit()
    clock.now = 2.2
    assert breaker.admit()
    breaker.succeed()
    assert breaker.closed
    assert all(breaker.admit() for _ in range(5))
