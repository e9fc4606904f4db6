"""Whose deliveries are taken: pinned accounts, and the one that is learned."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
from webhook_api.auth import Accounts, AuthError, LearnedFile
from webhook_api.auth.accounts import ASIDE_ROW, Budget, Learned


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fal-account.json"


def learning(path: Path | None = None, budget: Budget | None = None) -> Accounts:
    return Accounts(frozenset(), LearnedFile(path) if path else None, clock=lambda: 17.0, budget=budget)


def refused(accounts: Accounts, account: str, size: int = 0, *, fresh: bool = True) -> bool:
    try:
        accounts.admit(account, size, fresh=fresh)
    except AuthError as error:
        return error.reason == "account_not_allowed"
    return False


def test_a_pinned_account_is_the_only_one(path: Path) -> None:
    path.write_text('{"account_id": "other"}')
    accounts = Accounts(frozenset({"mine", "second"}), LearnedFile(path))
    assert accounts.admit("mine", 0, fresh=True) is None
    assert accounts.admit("second", 0, fresh=False) is None
    assert refused(accounts, "other")
    assert accounts.status() == {"mode": "pinned", "accounts": ["mine", "second"]}


def test_the_first_proven_account_is_learned_and_others_are_kept_aside(path: Path) -> None:
    accounts = learning(path)
    assert accounts.admit("mine", 10, fresh=True) is None
    assert accounts.admit("other", 10, fresh=True) == "account"
    assert accounts.admit("mine", 10, fresh=True) is None
    assert accounts.status() == {"mode": "learning", "learned": "mine", "learned_at": 17.0, "persisted": True}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_stale_delivery_teaches_nothing(path: Path) -> None:
    accounts = learning(path)
    assert accounts.admit("old", 10, fresh=False) is None
    assert accounts.admit("mine", 10, fresh=True) is None
    assert accounts.status()["learned"] == "mine"


def test_it_outlives_a_restart_and_is_reported_once_a_process(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learning(path).admit("mine", 0, fresh=True)
    again = learning(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert again.admit("other", 0, fresh=True) == "account"
            assert again.admit("mine", 0, fresh=True) is None
    told = [record for record in caplog.records if record.message == "fal_account_learned"]
    assert [record.__dict__["account_id"] for record in told] == ["mine"]


def test_many_processes_learn_the_same_account(path: Path) -> None:
    stores = [learning(path) for _ in range(16)]
    barrier = threading.Barrier(len(stores))
    verdicts: list[str | None] = [None] * len(stores)

    def deliver(number: int) -> None:
        barrier.wait(30)
        verdicts[number] = stores[number].admit(f"account-{number}", 0, fresh=True)

    threads = [threading.Thread(target=deliver, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert verdicts.count(None) == 1
    assert len({store.status()["learned"] for store in stores}) == 1
    assert [name for name in os.listdir(path.parent) if name != path.name] == []


def test_what_is_kept_of_others_is_bounded_and_refills(path: Path) -> None:
    clock = Clock()
    accounts = learning(path, Budget(10 * ASIDE_ROW, 100.0, clock))
    accounts.admit("mine", 0, fresh=True)
    verdicts = [refused(accounts, "other") for _ in range(12)]
    assert verdicts == [False] * 10 + [True] * 2
    assert not refused(accounts, "mine", 10**9)
    clock.now += 50
    assert [refused(accounts, "other") for _ in range(6)] == [False] * 5 + [True]
    assert refused(accounts, "other", 10**9)


def test_stale_ones_are_bounded_too_while_nothing_is_learned() -> None:
    accounts = learning(budget=Budget(3 * ASIDE_ROW, 1e9))
    assert [refused(accounts, "other", fresh=False) for _ in range(5)] == [False] * 3 + [True] * 2


def test_removing_the_file_forgets(path: Path) -> None:
    accounts = learning(path)
    accounts.admit("wrong", 0, fresh=True)
    path.unlink()
    assert accounts.admit("mine", 0, fresh=True) is None
    assert learning(path).status()["learned"] == "mine"


def test_a_disk_that_takes_nothing_is_no_obstacle(tmp_path: Path) -> None:
    accounts = learning(tmp_path / "missing" / "fal-account.json")
    assert accounts.admit("mine", 0, fresh=True) is None
    assert accounts.admit("other", 0, fresh=True) == "account"
    status = accounts.status()
    assert (status["learned"], status["persisted"], status["error"]) == ("mine", False, "unreadable")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"account_id": 7}', '{"account_id": "a b"}', "\udcff", "[" * 5000]
)
def test_a_broken_file_is_shown_and_not_overwritten(path: Path, content: str) -> None:
    raw = content.encode("utf-8", "surrogateescape")
    path.write_bytes(raw)
    accounts = learning(path)
    assert accounts.admit("mine", 0, fresh=True) is None
    assert accounts.admit("other", 0, fresh=True) == "account"
    assert accounts.status()["error"] == "malformed"
    assert path.read_bytes() == raw


def test_the_file_says_what_was_learned(path: Path) -> None:
    assert LearnedFile(path).claim(Learned("mine", 5.0)) == Learned("mine", 5.0)
    assert LearnedFile(path).claim(Learned("other", 6.0)) == Learned("mine", 5.0)
    assert json.loads(path.read_text()) == {"account_id": "mine", "learned_at": 5.0}
