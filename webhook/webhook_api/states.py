"""The state machine of a delivery: what follows an attempt, and when the next one is due.

Pure: no clock, no I/O. A worker leases a delivery, runs its effects, and asks `decide` what becomes of it.

    pending --lease--> leased --+--> done      every effect is done or skipped
       ^                        +--> retry     something failed that may pass
       |                        +--> parked    the bot's row is not there yet
       +---- released (stop) ---+--> dead      something failed for good, and nothing is left to try
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: Draws a float from [low, high]; `random.uniform` outside tests.
Uniform = Callable[[float, float], float]

#: Beyond this exponent every backoff has reached its cap; keeps 2**n small after weeks of outage.
_MAX_EXPONENT = 16
#: Seconds. Full jitter may draw zero; this keeps a failing delivery from spinning.
_FLOOR = 0.1


class DeliveryState(enum.StrEnum):
    """States of `webhook.deliveries.state`."""

    PENDING = "pending"
    LEASED = "leased"
    RETRY = "retry"
    PARKED = "parked"
    DONE = "done"
    DEAD = "dead"


class EffectState(enum.StrEnum):
    """States of `webhook.effects.state`."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


class Failure(enum.StrEnum):
    """Whose fault a failed effect is, which decides whether and how long it is tried again."""

    #: PostgreSQL, Redis or the object store is away or misconfigured: ours, tried without limit.
    OUTAGE = "outage"
    #: Another host cannot be reached or is not well, or the object store fails for one object alone: perhaps theirs,
    #: perhaps ours. Tried until it has lasted `unreachable_patience` seconds.
    UNREACHABLE = "unreachable"
    #: They answered, but wrongly: tried `max_attempts` times.
    THEIRS = "theirs"
    #: Another try cannot help (a forbidden host, a broken data URI).
    PERMANENT = "permanent"
    #: The avatar is not there yet: looked for again for `parked_patience` seconds.
    PARKED = "parked"
    #: An older delivery of the same request must go first.
    WAITING = "waiting"
    #: The worker is stopping or has lost its lease; nothing is held against the delivery.
    INTERRUPTED = "interrupted"


class EffectError(Exception):
    """An effect did not happen.

    `reason` is a short machine-readable word (metrics, log fields), `kind` says whether to try again, and
    the message is for a person. `detail` is what was reached before, and is recorded with the effect. `wait` is how
    many seconds the other side wants to be left alone (`Retry-After`): this effect is not run before they are over.
    """

    def __init__(
        self,
        kind: Failure,
        reason: str,
        message: str,
        detail: dict[str, object] | None = None,
        *,
        wait: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.detail = detail
        self.wait = wait

    def describe(self) -> str:
        """The line that `last_error` shows."""
        return f"{self.reason}: {self}"


@dataclass(frozen=True)
class Backoff:
    """Capped exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter"). Seconds."""

    base: float
    cap: float

    def delay(self, tries: int, uniform: Uniform = random.uniform) -> float:
        """Seconds to wait after `tries` failed attempts: uniform in (0, min(cap, base * 2**(tries-1))]."""
        exponent = min(max(tries, 1) - 1, _MAX_EXPONENT)
        return max(_FLOOR, uniform(0.0, min(self.cap, self.base * 2**exponent)))


@dataclass(frozen=True)
class Policy:
    """How patient the worker is. Times in seconds."""

    max_attempts: int = 12
    unreachable_patience: float = 86_400.0
    parked_patience: float = 7 * 86_400.0
    outage: Backoff = Backoff(1.0, 60.0)
    theirs: Backoff = Backoff(2.0, 600.0)
    parked: Backoff = Backoff(1.0, 300.0)
    waiting: Backoff = Backoff(0.5, 30.0)

    def backoff(self, kind: Failure) -> Backoff:
        """The backoff that belongs to a kind of failure."""
        return {
            Failure.OUTAGE: self.outage,
            Failure.PARKED: self.parked,
            Failure.WAITING: self.waiting,
        }.get(kind, self.theirs)


@dataclass(frozen=True)
class Setback:
    """One effect that failed in this attempt. `tries` are the attempts of that effect that count.

    `wait`: seconds before which it is not run again. `lasting`: seconds since it began to fail in this way.
    """

    effect: str
    kind: Failure
    reason: str
    message: str
    tries: int = 1
    wait: float = 0.0
    lasting: float = 0.0

    def is_final(self, policy: Policy, age: float) -> bool:
        """Whether this effect is given up, `age` seconds after the delivery was first seen."""
        if self.kind is Failure.PERMANENT:
            return True
        if self.kind is Failure.THEIRS:
            return self.tries >= policy.max_attempts
        if self.kind is Failure.UNREACHABLE:
            return self.lasting > policy.unreachable_patience
        if self.kind is Failure.PARKED:
            return age > policy.parked_patience
        return False


@dataclass(frozen=True)
class Verdict:
    """What becomes of a delivery: its state, seconds until it is due, and the error to show."""

    state: DeliveryState
    delay: float
    last_error: str | None


def counts_as_try(kind: Failure) -> bool:
    """Whether a failure is charged against the limit of attempts: only what is not ours."""
    return kind in (Failure.THEIRS, Failure.PERMANENT)


def decide(
    setbacks: Sequence[Setback], tries: int, age: float, policy: Policy, uniform: Uniform = random.uniform
) -> Verdict:
    """The state after an attempt (the `tries`-th) in which `setbacks` happened.

    What can still succeed goes before what is lost: a delivery is dead only when nothing is left to try.
    """
    if not setbacks:
        return Verdict(DeliveryState.DONE, 0.0, None)
    shown = "; ".join(f"{s.effect}: {s.reason}: {s.message}" for s in setbacks)
    if any(s.kind is Failure.INTERRUPTED for s in setbacks):
        return Verdict(DeliveryState.PENDING, 0.0, shown)
    open_ = [s for s in setbacks if not s.is_final(policy, age)]
    if not open_:
        return Verdict(DeliveryState.DEAD, 0.0, shown)
    # What waits for another effect cannot go before it, so it does not hurry the delivery either: thousands of parked
    # deliveries would otherwise be tried at the pace of the waiting.
    leading = [s for s in open_ if s.kind is not Failure.WAITING] or open_
    delay = min(max(s.wait, policy.backoff(s.kind).delay(tries, uniform)) for s in leading)
    parked = any(s.kind is Failure.PARKED for s in open_) and all(
        s.kind in (Failure.PARKED, Failure.WAITING) for s in open_
    )
    return Verdict(DeliveryState.PARKED if parked else DeliveryState.RETRY, delay, shown)


class Breaker:
    """Remembers that a backend is away, so that a backlog does not queue up behind its timeouts.

    After `n` failures in a row, calls are refused for `backoff.delay(n)` seconds. The clock is passed in.
    Used from several threads: a lost update costs one call more, so there is no lock.
    """

    def __init__(self, clock: Callable[[], float], backoff: Backoff = Backoff(0.5, 5.0)) -> None:
        self._clock = clock
        self._backoff = backoff
        self._failures = 0
        self._closed_until = 0.0

    def is_open(self) -> bool:
        """True while calls should not even be tried."""
        return self._clock() < self._closed_until

    def failed(self) -> None:
        """Note a failed call."""
        self._failures += 1
        self._closed_until = self._clock() + self._backoff.delay(self._failures)

    def succeeded(self) -> None:
        """Note a call that worked: the backend is back."""
        self._failures = 0
        self._closed_until = 0.0
