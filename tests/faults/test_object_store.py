"""The object store is away, slow, or cuts transfers: deliveries are taken as ever, and every object is whole in the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.faults.conftest import size
from tests.support.ledger import PORTRAIT
from tests.support.stackproc import Stack


def count() -> int:
    return size("EVENTS", 80, 1000)


def test_object_store_killed_under_load(stack: Stack, report: Callable[..., None]) -> None:
    with stack.load("s3-killed", count()) as (ledger, _):
        stack.site.s3.kill()
        time.sleep(1.5)
        stack.site.s3.start()
    stack.verify()
    ledger.undisturbed()
    report(ledger)


def test_object_store_slow(stack: Stack, report: Callable[..., None]) -> None:
    with stack.load("s3-slow", count()) as (ledger, sender):
        stack.s3.faults.delay = 0.2
        stack.s3.faults.bytes_per_second = 200_000
        stack.wait(lambda: not sender.open, "all are accepted")
        time.sleep(2)
        stack.s3.calm()
    stack.verify()
    ledger.undisturbed()
    report(ledger)


def test_object_store_cuts_transfers(stack: Stack, report: Callable[..., None]) -> None:
    """Every upload of a model's file breaks in the middle, and some answers get lost; no half file counts as a file."""
    ledger = stack.ledger("s3-cut")
    before = stack.s3.cuts
    stack.s3.faults.cut_after = 20_000
    stack.s3.faults.lose_answer = 0.05
    with stack.sender(ledger, rate=60) as sender:
        sender.send(stack.events(ledger, count() // 4, PORTRAIT) + stack.events(ledger, count() // 2))
        sender.wait(60)
        stack.wait(lambda: stack.s3.cuts - before > 10, "transfers were cut")
        time.sleep(1)
        cuts = stack.s3.cuts - before
        stack.s3.calm()
    seen = stack.verify()
    ledger.undisturbed()
    files = sum(name.startswith("webhooks/") for name in seen.contents)
    assert files, "no archived file was compared"
    report(ledger, cuts=cuts, files_compared=files)
