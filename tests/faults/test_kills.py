"""API and worker processes are killed at random points under load; the points are drawn from a fixed seed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

from tests.faults.conftest import SEED, size
from tests.support.ledger import Ledger, Sender
from tests.support.stackproc import Stack

RATE = 50.0
"""Deliveries a second while processes die."""
PAUSE = 0.4
"""Mean of the seconds between two kills. Shorter than a start takes: some die before they are ready."""


def kills(stack: Stack) -> int:
    return sum(process.kills for process in stack.processes)


def kill_one(stack: Stack, chance: random.Random, done: Counter[str]) -> None:
    """SIGKILL to a whole instance, to gunicorn's worker alone, or to a worker; all run again at once."""
    victim = chance.choice(stack.processes)
    if victim in stack.apis and victim.alive and chance.random() < 0.3:
        victim.kill_child()
        done[f"{victim.name} child"] += 1
    else:
        victim.kill()
        done[victim.name] += 1
    for process in stack.processes:
        process.start()


def keep_busy(stack: Stack, ledger: Ledger, sender: Sender) -> None:
    """No kill finds the processes idle: some deliveries were accepted since the last one, and more are on their way."""
    if sender.open < 2 * RATE:
        sender.send(stack.events(ledger, int(3 * RATE)))
    accepted = ledger.accepted
    stack.wait(lambda: ledger.accepted > accepted or not sender.open, "deliveries are accepted between kills")


def test_processes_killed_at_random_points(stack: Stack, report: Callable[..., None]) -> None:
    """Before and after a commit, in the middle of effects, while they start: at least 200 times in a soak."""
    wanted, chance, before = size("KILLS", 24, 240), random.Random(SEED), kills(stack)
    done: Counter[str] = Counter()
    with stack.load("kills", int(3 * RATE), RATE) as (ledger, sender):
        while kills(stack) - before < wanted:
            keep_busy(stack, ledger, sender)
            time.sleep(chance.expovariate(1 / PAUSE))
            kill_one(stack, chance, done)
    stack.verify()
    report(ledger, kills=kills(stack) - before, killed=dict(sorted(done.items())))


def test_processes_killed_while_postgresql_comes_and_goes(stack: Stack, report: Callable[..., None]) -> None:
    """Killed with deliveries in the spool, and while it is drained: others take its files over, and drain nothing twice."""
    wanted, chance, before = size("SPOOL_KILLS", 10, 100), random.Random(SEED + 1), kills(stack)
    done: Counter[str] = Counter()
    with stack.load("kills-spool", int(3 * RATE), RATE) as (ledger, sender):
        ledger.ambiguous = True
        while kills(stack) - before < wanted:
            keep_busy(stack, ledger, sender)
            stack.postgres.down()
            time.sleep(chance.uniform(0.1, 0.8))
            if chance.random() < 0.5:
                kill_one(stack, chance, done)
            stack.postgres.up()
            time.sleep(chance.uniform(0.0, 0.8))
            kill_one(stack, chance, done)
    stack.verify()
    report(ledger, kills=kills(stack) - before, killed=dict(sorted(done.items())))
