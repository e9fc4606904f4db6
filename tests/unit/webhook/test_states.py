"""The state machine of a delivery: what follows an attempt."""

from __future__ import annotations

import pytest
from webhook_api.states import Backoff, Breaker, Failure, Policy, Setback, decide

POLICY = Policy(max_attempts=3, unreachable_patience=100.0, parked_patience=1000.0)


def highest(_low: float, high: float) -> float:
    return high


def setback(kind: Failure, tries: int = 1, effect: str = "archive") -> Setback:
    return Setback(effect, kind, "reason", "message", tries)


def test_nothing_failed_is_done() -> None:
    verdict = decide([], tries=1, age=0, policy=POLICY)
    assert (verdict.state, verdict.last_error) == ("done", None)


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        ([Failure.OUTAGE], "retry"),
        ([Failure.THEIRS], "retry"),
        ([Failure.WAITING], "retry"),
        ([Failure.UNREACHABLE], "retry"),
        ([Failure.PARKED], "parked"),
        ([Failure.PARKED, Failure.WAITING], "parked"),
        ([Failure.PARKED, Failure.PERMANENT], "parked"),
        ([Failure.PARKED, Failure.OUTAGE], "retry"),
        ([Failure.PERMANENT], "dead"),
        ([Failure.PERMANENT, Failure.OUTAGE], "retry"),
        ([Failure.INTERRUPTED, Failure.PERMANENT], "pending"),
    ],
)
def test_what_can_still_succeed_goes_before_what_is_lost(kinds: list[Failure], state: str) -> None:
    assert decide([setback(kind) for kind in kinds], tries=1, age=0, policy=POLICY).state == state


def test_an_outage_is_never_given_up() -> None:
    verdict = decide([setback(Failure.OUTAGE, tries=10**6)], tries=10**6, age=1e9, policy=POLICY)
    assert verdict.state == "retry"


@pytest.mark.parametrize(("tries", "state"), [(1, "retry"), (2, "retry"), (3, "dead"), (4, "dead")])
def test_their_faults_are_tried_as_often_as_allowed(tries: int, state: str) -> None:
    assert decide([setback(Failure.THEIRS, tries)], tries=9, age=0, policy=POLICY).state == state


@pytest.mark.parametrize(
    ("kind", "age", "state"),
    [
        (Failure.PARKED, 999, "parked"),
        (Failure.PARKED, 1001, "dead"),
    ],
)
def test_patience_ends_by_age(kind: Failure, age: float, state: str) -> None:
    assert decide([setback(kind)], tries=50, age=age, policy=POLICY).state == state


@pytest.mark.parametrize(("lasting", "state"), [(99, "retry"), (101, "dead")])
def test_patience_with_others_counts_from_their_first_failure(lasting: float, state: str) -> None:
    """Not from the delivery's arrival: after days of an outage of ours, the first stumble must not be the last."""
    failing = Setback("forward", Failure.UNREACHABLE, "reason", "message", lasting=lasting)
    assert decide([failing], tries=50, age=1e9, policy=POLICY).state == state


def test_a_pause_that_was_asked_for_is_kept_unless_something_else_is_due() -> None:
    asked = Setback("forward", Failure.UNREACHABLE, "reason", "message", wait=900.0)
    assert decide([asked], tries=1, age=0, policy=POLICY, uniform=highest).delay == 900.0
    both = [asked, setback(Failure.OUTAGE)]
    assert decide(both, tries=1, age=0, policy=POLICY, uniform=highest).delay == 1.0


def test_every_error_is_shown() -> None:
    setbacks = [setback(Failure.OUTAGE, effect="stream"), setback(Failure.THEIRS, effect="archive")]
    shown = decide(setbacks, tries=1, age=0, policy=POLICY).last_error
    assert shown == "stream: reason: message; archive: reason: message"


def test_backoff_grows_to_its_cap_and_is_jittered_in_full() -> None:
    backoff = Backoff(base=1.0, cap=60.0)
    assert [backoff.delay(tries, highest) for tries in (1, 2, 3, 7, 100, 10**9)] == [1, 2, 4, 60, 60, 60]
    drawn: list[tuple[float, float]] = []
    backoff.delay(4, lambda low, high: drawn.append((low, high)) or low)  # type: ignore[func-returns-value]
    assert drawn == [(0.0, 8.0)]
    assert backoff.delay(1, lambda low, _: low) > 0


def test_the_earliest_hope_decides_the_delay() -> None:
    setbacks = [setback(Failure.THEIRS), setback(Failure.OUTAGE)]
    verdict = decide(setbacks, tries=9, age=0, policy=POLICY, uniform=highest)
    assert verdict.delay == 60.0


def test_what_waits_for_the_avatar_does_not_hurry_a_parked_delivery() -> None:
    setbacks = [setback(Failure.PARKED), setback(Failure.WAITING, effect="stream")]
    assert decide(setbacks, tries=30, age=0, policy=POLICY, uniform=highest).delay == POLICY.parked.cap
    assert (
        decide([setback(Failure.WAITING)], tries=30, age=0, policy=POLICY, uniform=highest).delay
        == POLICY.waiting.cap
    )


def test_a_breaker_refuses_for_a_while_and_longer_each_time() -> None:
    now = 0.0
    breaker = Breaker(lambda: now)
    assert not breaker.is_open()
    for _ in range(20):
        breaker.failed()
    assert breaker.is_open()
    now = 6.0
    assert not breaker.is_open()
    breaker.failed()
    breaker.succeeded()
    assert not breaker.is_open()
