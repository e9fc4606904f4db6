"""Group commit apart from any database: who leads, who shares, and what each hears when it goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from webhook_api.inbox.group import Bounds, GroupCommit, QueueFull, WaitedTooLong

PATIENCE = 30.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


class Writer:
    """Keeps the first batch until it is let go, so that the others gather behind it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.began = threading.Event()
        self.go = threading.Event()
        self.fail: BaseException | None = None
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def __call__(self, items: Sequence[int], seconds: float) -> list[int | BaseException]:
        with self._lock:
            self.batches.append(list(items))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        # Before a test knows of it: it may then put another event in its place, for the next batch.
        go = self.go
        self.began.set()
        assert go.wait(PATIENCE)
        with self._lock:
            self.at_once -= 1
        if self.fail is not None:
            raise self.fail
        return [ValueError(item) if item < 0 else item * 10 for item in items]


def behind_one(
    group: GroupCommit[int, int], writer: Writer, items: Sequence[int], pool: ThreadPoolExecutor
) -> list[Future[int]]:
    """Submit 1, which leads, and then the others, which wait."""
    futures = [pool.submit(group.submit, 1, 1, PATIENCE)]
    assert writer.began.wait(PATIENCE)
    for already, item in enumerate(items):
        futures.append(pool.submit(group.submit, item, 1, PATIENCE))
        wait_for(lambda already=already: group.waiting == already + 1, "it queues")
    return futures


def test_alone_there_is_nothing_to_wait_for() -> None:
    writer = Writer()
    writer.go.set()
    group: GroupCommit[int, int] = GroupCommit(writer)
    assert group.submit(4, 1, 1.0) == 40
    assert writer.batches == [[4]]
    assert group.idle


def test_those_that_come_meanwhile_share_the_next_commit() -> None:
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer)
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2, 3, 4, 5], pool)
        writer.go.set()
        assert [future.result(PATIENCE) for future in futures] == [10, 20, 30, 40, 50]
    assert writer.batches == [[1], [2, 3, 4, 5]]
    assert writer.most_at_once == 1
    assert group.idle
    assert group.waiting == 0


def test_a_failed_commit_fails_everyone_in_it_and_nobody_else() -> None:
    """fal.md, what implementers get wrong, 8: nobody of a failed write is answered as if it had been written."""
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer, bounds=Bounds(rows=3))
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2, 3, 4, 5], pool)
        writer.fail = OSError("commit failed")
        writer.go.set()
        for future in futures:
            with pytest.raises(OSError, match="commit failed"):
                future.result(PATIENCE)
        writer.fail = None
        assert group.submit(6, 1, PATIENCE) == 60
    assert [len(batch) for batch in writer.batches] == [1, 3, 1, 1]


def test_each_has_its_own_result_and_its_own_fault() -> None:
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer)
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2, -3, 4], pool)
        writer.go.set()
        assert futures[1].result(PATIENCE) == 20
        assert futures[3].result(PATIENCE) == 40
        with pytest.raises(ValueError, match="-3"):
            futures[2].result(PATIENCE)


def test_batches_are_bounded_by_rows_and_by_bytes() -> None:
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer, bounds=Bounds(rows=2, bytes=10))
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2, 3, 4], pool)
        large = pool.submit(group.submit, 5, 100, PATIENCE)
        wait_for(lambda: group.waiting == 4, "it queues")
        writer.go.set()
        assert [future.result(PATIENCE) for future in futures] == [10, 20, 30, 40]
        assert large.result(PATIENCE) == 50
    assert writer.batches == [[1], [2, 3], [4], [5]]


def test_what_waits_is_bounded_and_the_next_hears_it_at_once() -> None:
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer, bounds=Bounds(waiting=2, waiting_bytes=10))
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2], pool)
        with pytest.raises(QueueFull):
            group.submit(9, 10, PATIENCE)
        futures.append(pool.submit(group.submit, 3, 1, PATIENCE))
        wait_for(lambda: group.waiting == 2, "it queues")
        with pytest.raises(QueueFull):
            group.submit(9, 1, PATIENCE)
        writer.go.set()
        assert [future.result(PATIENCE) for future in futures] == [10, 20, 30]


def test_nobody_waits_past_its_deadline_and_one_that_left_is_not_written() -> None:
    writer = Writer()
    group: GroupCommit[int, int] = GroupCommit(writer)
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [], pool)
        with pytest.raises(WaitedTooLong) as caught:
            group.submit(2, 1, 0.05)
        assert not caught.value.taken
        assert group.waiting == 0
        writer.go.set()
        assert futures[0].result(PATIENCE) == 10
        assert group.submit(3, 1, PATIENCE) == 30
    assert writer.batches == [[1], [3]]


def test_one_that_gives_up_while_it_is_written_knows_that_it_may_be_there() -> None:
    writer, written = Writer(), threading.Event()

    class Group(GroupCommit[int, int]):
        """The deadline of 3 comes as soon as it is being written."""

        def _wait(self, ticket: Any) -> bool:
            if ticket.item == 3:
                assert written.wait(PATIENCE)
                ticket.deadline = 0.0
            return super()._wait(ticket)

    group = Group(writer)
    with ThreadPoolExecutor(8) as pool:
        futures = behind_one(group, writer, [2], pool)
        impatient = pool.submit(group.submit, 3, 1, PATIENCE)
        wait_for(lambda: group.waiting == 2, "it queues")
        writer.began.clear()
        # The first batch ends, the second begins and is kept.
        release, writer.go = writer.go, threading.Event()
        release.set()
        assert writer.began.wait(PATIENCE)
        written.set()
        with pytest.raises(WaitedTooLong) as caught:
            impatient.result(PATIENCE)
        assert caught.value.taken
        writer.go.set()
        assert [future.result(PATIENCE) for future in futures] == [10, 20]
    assert group.idle


def test_a_storm_loses_nobody() -> None:
    seen: list[int] = []

    def write(items: Sequence[int], seconds: float) -> list[int | BaseException]:
        seen.extend(items)
        return [ValueError(item) if item % 7 == 0 else item for item in items]

    group: GroupCommit[int, int] = GroupCommit(write, bounds=Bounds(rows=5, bytes=20), leaders=2)

    def one(item: int) -> int:
        try:
            return group.submit(item, item % 9, PATIENCE)
        except ValueError:
            return -item

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(one, range(3000)))
    assert results == [-item if item % 7 == 0 else item for item in range(3000)]
    assert sorted(seen) == list(range(3000))
    assert group.idle
