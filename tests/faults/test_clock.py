"""The clocks of sender and receiver differ by ten minutes: kept aside with 200, never processed, and a fresh copy is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.conftest import size
from tests.support.stackproc import Stack


@pytest.mark.parametrize("shift", [-600.0, 600.0], ids=["slow", "fast"])
def test_clock_ten_minutes_off(stack: Stack, shift: float, report: Callable[..., None]) -> None:
    ledger = stack.ledger(f"clock-{'slow' if shift < 0 else 'fast'}")
    fresh = stack.events(ledger, size("EVENTS", 20, 500))
    signed = [event for event in fresh if event.source == "fal" and event.kind.processed]
    off = [ledger.event(event.kind, shift=shift, request_id=event.request_id) for event in signed]
    with stack.sender(ledger) as sender:
        sender.send(off)
        sender.wait(60)
        stack.settle()
        states = {
            row["state"] for row in stack.rows("select state from webhook.deliveries where aside is not null")
        }
        assert states == {"dead"}
        sender.send(fresh)
        sender.wait(60)
    stack.verify()
    ledger.undisturbed()
    report(ledger, kept_aside=len(off))
