"""Everything goes down and comes back, one after the other and several at once, while 1,000 deliveries come in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.faults.conftest import SEED, size
from tests.support.stackproc import Stack


def test_everything_goes_down_and_comes_back(stack: Stack, report: Callable[..., None]) -> None:
    total, rounds, rate = size("DELIVERIES", 1000, 6000), size("ROUNDS", 1, 6), 100.0
    chance = random.Random(SEED)
    site = stack.site

    def keys_away(status: int) -> None:
        stack.jwks.status = status

    faults: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
        ("postgres", site.postgres.kill, site.postgres.start),
        ("redis", site.redis.kill, site.redis.start),
        ("object store", site.s3.kill, site.s3.start),
        ("keys", lambda: keys_away(503), lambda: keys_away(200)),
        ("postgres line", stack.postgres.down, stack.postgres.up),
        ("redis line", stack.redis.down, stack.redis.up),
        ("object store line", stack.s3.down, stack.s3.up),
        *((process.name, process.kill, process.start) for process in stack.processes),
    ]
    order: list[str] = []
    with stack.load("everything", total, rate) as (ledger, _):
        ledger.ambiguous = True
        for _ in range(rounds):
            chance.shuffle(faults)
            for first, second in zip(faults[::2], [*faults[1::2], faults[0]], strict=False):
                # Two overlap: the second goes before the first is back.
                first[1]()
                time.sleep(chance.uniform(0, 0.6))
                second[1]()
                time.sleep(chance.uniform(0, 0.6))
                first[2]()
                time.sleep(chance.uniform(0, 0.3))
                second[2]()
                order += [first[0], second[0]]
        stack.site.heal()
        stack.heal()
    stack.verify()
    report(ledger, went_down=len(order), order=order[:22])
