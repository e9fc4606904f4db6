"""The sender's keys cannot be had, are garbage, or change: 503 or as usual, never 401 for what is genuine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.conftest import SOAK, size
from tests.support.falfake import new_key
from tests.support.ledger import STYLE, Kind, Sender
from tests.support.stackproc import Api, Stack

GARBAGE = (b"", b"<html>Bad gateway</html>", b'{"keys": []}', b'{"keys": [{"x": "AAAA"}]}', b"[" * 100_000)
MANUAL = Kind("old-failed", "style", frozenset({"error"}))


def count() -> int:
    return size("EVENTS", 30, 300)


@pytest.fixture
def instance(stack: Stack) -> Iterator[Callable[..., Api]]:
    """Starts instances that are a test's own."""
    made: list[Api] = []

    def start(name: str, **changes: str) -> Api:
        api = stack.extra_api(f"{name}-{len(stack.ledgers)}", **changes)
        made.append(api)
        api.start()
        stack.wait(lambda: api.get("/")[0] == 200, f"{api.name} answers: {api.log}")
        return api

    yield start
    for api in made:
        api.kill()


def deliver(stack: Stack, api: Api, name: str, **more: Any) -> Any:
    """Deliver to one instance until all is accepted."""
    ledger = stack.ledger(name)
    with Sender(ledger, [api.url], seed=stack.seed, **more) as sender:
        sender.send(stack.events(ledger, count()))
        sender.wait(90)
    return ledger


def test_keys_away_or_garbage_at_the_start(
    stack: Stack, instance: Callable[..., Api], report: Callable[..., None]
) -> None:
    """Keys unknown: 503 for fal, the shared secret goes on; accepted as soon as the keys can be had."""
    stack.jwks.status = 500
    api = instance("keys-away")
    ledger = stack.ledger("keys-away")
    with Sender(ledger, [api.url], seed=stack.seed) as sender:
        manual = stack.events(ledger, 3, MANUAL)
        signed = stack.events(ledger, count(), STYLE)
        sender.send([*manual, *signed])
        stack.wait(lambda: ledger.accepted == len(manual), "the shared secret needs no keys")
        stack.jwks.status = 200
        for document in GARBAGE:
            stack.jwks.document = document
            before = len(ledger.attempts)
            stack.wait(lambda before=before: len(ledger.attempts) > before + 10, "more attempts")
        assert ledger.accepted == len(manual)
        assert set(ledger.answers()) == {"200", "503"}
        stack.set_keys(stack.key)
        sender.wait(90)
    stack.verify()
    report(ledger)


def test_keys_away_after_they_were_known(
    stack: Stack, instance: Callable[..., Api], report: Callable[..., None]
) -> None:
    """Known keys hold while the key server is away, garbage or hanging, and over a restart of the process."""
    api = instance("keys-known")
    deliver(stack, api, "keys-known")
    stack.jwks.status = 503
    after = deliver(stack, api, "keys-gone")
    stack.jwks.status, stack.jwks.document = 200, GARBAGE[1]
    api.kill()
    api.start()
    stack.wait(lambda: api.get("/")[0] == 200, "it answers again")
    restarted = deliver(stack, api, "keys-restarted")
    stack.verify()
    for ledger in (after, restarted):
        ledger.undisturbed()
    report(restarted)


def test_keys_rotated(stack: Stack, instance: Callable[..., Api], report: Callable[..., None]) -> None:
    """New keys are fetched when nothing matches the old ones, once; the old ones are worth nothing from then on."""
    api = instance("keys-rotated")
    deliver(stack, api, "keys-before")
    api.kill()
    old, stack.key = stack.key, new_key()
    stack.set_keys(stack.key)
    asked, began = stack.jwks.requests, time.monotonic()
    api.start()
    stack.wait(lambda: api.get("/")[0] == 200, "it answers again")
    try:
        ledger = deliver(stack, api, "keys-after", forge=0.5)
        # One at the start, one for the first forgery, and then one a minute.
        allowed = 2 + (time.monotonic() - began) / 60
        assert stack.jwks.requests - asked <= allowed, "forgeries made it ask again and again"
        stolen = ledger.forgery()
        ledger.credentials = type(ledger.credentials)(key=old, account_id=ledger.credentials.account_id)
        with Sender(ledger, [api.url], forge=0, again=0) as sender:
            sender.copies(stolen, 3)
            sender.wait(30)
    finally:
        # The other instances have fetched the first key, and are asked with it by the tests that follow.
        stack.key = old
        stack.set_keys(old)
    stack.verify()
    report(ledger, asked=stack.jwks.requests - asked)


@pytest.mark.skipif(not SOAK, reason="takes more than a minute: make soak")
def test_keys_rotated_while_it_runs(
    stack: Stack, instance: Callable[..., Api], report: Callable[..., None]
) -> None:
    """Forgeries have just caused a fetch, so the next one comes within a minute; until then fal tries again."""
    api = instance("keys-rotating")
    deliver(stack, api, "rotating-before", forge=0.5)
    old, stack.key = stack.key, new_key()
    stack.set_keys(stack.key)
    try:
        ledger = stack.ledger("rotating-after")
        ledger.permitted.add(401)
        with Sender(ledger, [api.url], seed=stack.seed) as sender:
            sender.send(stack.events(ledger, count()))
            sender.wait(90)
    finally:
        stack.key = old
        stack.set_keys(old)
    stack.verify()
    report(ledger)
