"""Many at once: copies of one delivery, and workers over the same rows, one of which was taken for dead."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from tests.faults.conftest import size
from tests.support.ledger import PORTRAIT, STYLE, Ledger
from tests.support.stackproc import Stack


def test_hundred_copies_at_once(stack: Stack, report: Callable[..., None]) -> None:
    """Over both instances: one row, one set of effects, each copy counted, and one of them alone told that it is new."""
    copies = size("COPIES", 100, 1000)
    for number, kind in enumerate((PORTRAIT, STYLE)):
        ledger = stack.ledger(f"copies-{number}")
        (event,) = stack.events(ledger, 1, kind)
        with stack.sender(ledger, threads=50, again=0, forge=0) as sender:
            sender.copies(event, copies)
            sender.wait(60)
        stack.verify()
        (entry,) = ledger.entries.values()
        assert entry.accepted == copies
        # Where the machine is too busy for the database's second, some stand in the spool, which knows of no copies.
        stored = [a for a in entry.attempts if a.status == 200 and a.answer["delivery_id"] is not None]
        told_new = sum(1 for a in stored if not a.answer["duplicate"])
        assert told_new == 1 if len(stored) == copies else told_new <= 1
        report(ledger)


def waiting_rows(stack: Stack, name: str) -> Ledger:
    """Accepted deliveries that no worker has seen yet; all workers are gone."""
    for worker in stack.workers:
        worker.kill()
    ledger = stack.ledger(name)
    with stack.sender(ledger) as sender:
        sender.send(stack.events(ledger, size("EVENTS", 150, 2000)))
        sender.wait(60)
    return ledger


def holds_leases(stack: Stack, worker: str) -> list[object]:
    return stack.rows("select id from webhook.deliveries where lease_owner like %s", f"{worker}:%")


def test_two_workers_over_the_same_rows(stack: Stack, report: Callable[..., None]) -> None:
    """Both start at once over one backlog and take part in it."""
    ledger = waiting_rows(stack, "race")
    # Slow enough, and little enough at a time, for neither to be done before the other has begun.
    stack.s3.faults.delay = 2.0
    for worker in stack.workers:
        worker.environment["WORKER_BATCH_SIZE"] = "4"
        worker.start()
        del worker.environment["WORKER_BATCH_SIZE"]
    busy: set[str] = set()

    def both() -> bool:
        busy.update(worker.name for worker in stack.workers if holds_leases(stack, worker.name))
        return len(busy) == 2

    stack.wait(both, "both workers hold leases")
    stack.s3.calm()
    stack.verify()
    report(ledger)
    for worker in stack.workers:
        worker.kill()
        worker.start()


def test_frozen_worker_wakes_up_after_its_leases_ended(stack: Stack, report: Callable[..., None]) -> None:
    """It was taken for dead, another one has done its work; what it still wanted to do does no harm."""
    ledger = waiting_rows(stack, "frozen")
    frozen, other = stack.workers
    stack.s3.faults.delay = 2.0
    frozen.start()
    stack.wait(lambda: holds_leases(stack, frozen.name), "it holds leases")
    assert frozen.pid is not None
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        held = len(holds_leases(stack, frozen.name))
        stack.s3.calm()
        other.start()
        stack.wait(lambda: not holds_leases(stack, frozen.name), "its leases were taken over")
        stack.settle()
    finally:
        mark = frozen.log.stat().st_size
        os.kill(frozen.pid, signal.SIGCONT)
    stack.wait(lambda: frozen.log.stat().st_size > mark, "it says something again")
    time.sleep(0.5)
    stack.verify()
    assert held, "it held nothing when it froze"
    report(ledger, leases_lost=held)
