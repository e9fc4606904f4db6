"""The life of fal's keys beyond a single request: background, several processes, outages, alarms."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl.signing import SigningKey
from prometheus_client import REGISTRY
from webhook_api.auth import AuthError, FalVerifier, KeyStore
from webhook_api.auth import keys as keys_module
from webhook_api.auth.keys import Cache, KeySourceError, Known
from webhook_api.auth.signing import sign

from tests.support.falfake import ACCOUNT, jwks, new_key
from tests.support.keysource import NOW, Clock, Source

BODY = b'{"request_id":"req-1","status":"OK","payload":null}'


DOWN = KeySourceError("unreachable", "down")


@pytest.fixture
def key() -> SigningKey:
    return new_key()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source(key: SigningKey) -> Iterator[Source]:
    made = Source(key)
    yield made
    made.go.set()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def settled(store: KeyStore, source: Source, fetches: int) -> None:
    until(lambda: source.fetches >= fetches and store._flight is None, f"{fetches} fetches")


def idle(store: KeyStore) -> None:
    until(lambda: store._flight is None, "no fetch is under way")


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_keys_are_renewed_in_the_background_without_any_delivery(
    source: Source, clock: Clock, key: SigningKey
) -> None:
    store = KeyStore(source, clock=clock)
    store.tick()
    settled(store, source, 1)
    clock.now += keys_module.REFRESH_AFTER - 1
    store.tick()
    assert source.fetches == 1
    new = new_key()
    source.keys = (key, new)
    clock.now += 2
    store.tick()
    settled(store, source, 2)
    assert store.current() == (key.verify_key, new.verify_key)


def test_a_thread_of_its_own_does_it(source: Source) -> None:
    store = KeyStore(source)
    store.start()
    until(lambda: store.status()["ok"], "keys without a request")
    store.stop()


def test_failures_are_asked_again_more_and_more_rarely(source: Source, clock: Clock) -> None:
    source.error = DOWN
    store = KeyStore(source, clock=clock)
    asked_at: list[float] = []
    for _ in range(3600):
        before = source.fetches
        store.tick()
        idle(store)
        if source.fetches > before:
            asked_at.append(clock.now - NOW)
        clock.now += 1
    assert len(asked_at) < 40
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked_at)]
    assert gaps[0] <= keys_module.FAILURE_PAUSE + 1
    assert gaps[-1] >= keys_module.FAILURE_PAUSE_MAX / 2
    source.error = None
    clock.now += keys_module.FAILURE_PAUSE_MAX
    store.tick()
    until(lambda: store.status()["ok"], "keys are there again")


def test_stale_keys_serve_with_an_alarm_in_health_metrics_and_log(
    source: Source, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = KeyStore(source, clock=clock)
    store.warm()
    source.error = DOWN
    clock.now += keys_module.STALE_AFTER + 1
    failures = metric("webhook_jwks_fetch_failures_total", reason="unreachable")
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            store.tick()
            settled(store, source, 2)
            clock.now += 400
    assert store.current()
    idle(store)
    assert store.status() | {"age_seconds": 0} == {
        "ok": True, "keys": 1, "age_seconds": 0, "stale": True, "error": "unreachable",
    }  # fmt: skip
    assert metric("webhook_jwks_stale") == 1
    assert metric("webhook_jwks_age_seconds") > keys_module.STALE_AFTER
    assert metric("webhook_jwks_fetch_failures_total", reason="unreachable") > failures
    alarms = [record for record in caplog.records if record.message == "jwks_stale"]
    assert len(alarms) == 1
    assert 22 < alarms[0].__dict__["hours_left"] < 24
    source.error = None
    clock.now += keys_module.FAILURE_PAUSE_MAX
    store.tick()
    until(lambda: not store.status()["stale"], "fresh again")
    store.tick()
    assert metric("webhook_jwks_stale") == 0


def test_no_keys_at_all_is_shown(source: Source, clock: Clock) -> None:
    source.error = DOWN
    store = KeyStore(source, clock=clock)
    store.warm()
    assert store.status() == {"ok": False, "keys": 0, "error": "unreachable"}
    assert metric("webhook_jwks_keys") == 0


def test_a_source_that_hangs_holds_no_request_longer_than_the_wait(source: Source, clock: Clock) -> None:
    source.go.clear()
    store = KeyStore(source, clock=clock, wait=0.05)
    for _ in range(5):
        with pytest.raises(AuthError, match="not known"):
            store.current()
    assert store._flight is not None, "nobody waited for the end of the fetch"
    assert source.fetches == 1
    source.go.set()
    until(lambda: store.status()["ok"], "the one fetch has brought the keys")


def test_forged_deliveries_do_not_hold_every_thread(source: Source, clock: Clock, key: SigningKey) -> None:
    store = KeyStore(source, clock=clock, wait=30, waiters=2)
    verifier = FalVerifier(store, frozenset({ACCOUNT}), clock)
    store.warm()
    source.go.clear()
    clock.now += keys_module.RENEW_INTERVAL + 1
    forged = sign(new_key(), "req-1", ACCOUNT, int(clock.now), BODY)
    ended: list[str] = []

    def deliver() -> None:
        with pytest.raises(AuthError) as caught:
            verifier.verify(verifier.claims(forged), BODY)
        ended.append(caught.value.reason)

    threads = [threading.Thread(target=deliver) for _ in range(12)]
    for thread in threads:
        thread.start()
    # While the fetch hangs, all but the few that wait for it have their answer, and a genuine one is taken.
    until(lambda: len(ended) == len(threads) - 2, "the others were answered at once")
    # 503 and not 401: while the fetch is under way nobody can tell what they are.
    assert set(ended) == {"keys_unknown"}
    assert verifier.verify(verifier.claims(sign(key, "req-1", ACCOUNT, int(clock.now), BODY)), BODY)
    source.go.set()
    for thread in threads:
        thread.join(30)
    assert ended[-2:] == ["bad_signature"] * 2
    assert source.fetches == 2


def test_processes_share_what_one_of_them_has_fetched(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey
) -> None:
    cache = tmp_path / "jwks.json"
    first, second = (KeyStore(source, clock=clock, cache_file=cache) for _ in range(2))
    first.warm()
    second.warm()
    assert source.fetches == 1
    new = new_key()
    source.keys = (key, new)
    clock.now += keys_module.REFRESH_AFTER + 1
    first.tick()
    settled(first, source, 2)
    second.tick()
    assert second.current() == (key.verify_key, new.verify_key)
    assert source.fetches == 2


def test_a_refresh_of_the_console_reaches_running_processes(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey
) -> None:
    cache = tmp_path / "jwks.json"
    running = KeyStore(source, clock=clock, cache_file=cache)
    running.warm()
    new = new_key()
    source.keys = (new,)
    clock.now += 1
    console = KeyStore(source, clock=clock, cache_file=cache)
    assert console.refresh(30)["ok"]
    running.tick()
    assert running.current() == (new.verify_key,)
    assert source.fetches == 2


def test_a_refresh_never_waits_for_an_earlier_attempt(source: Source, clock: Clock) -> None:
    store = KeyStore(source, clock=clock)
    for number in range(1, 4):
        store.refresh(30)
        assert source.fetches == number


@pytest.mark.parametrize(
    "content",
    ['{"fetched_at": NaN, "source": "memory", "jwks": "%s"}', '{"fetched_at": 1e400, "source": "memory", "jwks": "%s"}',
     '{"fetched_at": 99999999999, "source": "memory", "jwks": "%s"}', "[" * 100_000, "\x00", "7"],
)  # fmt: skip
def test_a_poisoned_cache_is_no_obstacle_and_no_way_in(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey, content: str
) -> None:
    cache = tmp_path / "jwks.json"
    forged = jwks(new_key()).decode().replace('"', '\\"')
    cache.write_text(content.replace("%s", forged))
    assert KeyStore(source, clock=clock, cache_file=cache).current() == (key.verify_key,)


def test_a_full_disk_keeps_the_keys_in_memory(tmp_path: Path, source: Source, key: SigningKey) -> None:
    store = KeyStore(source, cache_file=tmp_path / "missing" / "jwks.json")
    assert store.current() == (key.verify_key,)


def test_nothing_is_left_beside_the_cache(tmp_path: Path, clock: Clock) -> None:
    cache = Cache(tmp_path / "jwks.json", "memory")
    cache.save(jwks(new_key()), 1.0)
    cache.save(jwks(new_key()), 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["jwks.json"]
    assert json.loads((tmp_path / "jwks.json").read_text())["fetched_at"] == 2.0


def test_a_clock_that_jumps_loses_no_keys(source: Source, clock: Clock, key: SigningKey) -> None:
    store = KeyStore(source, clock=clock)
    store.warm()
    source.error = DOWN
    clock.now -= 7200
    assert store.current() == (key.verify_key,)
    idle(store)
    source.error = None
    clock.now += 400
    store.tick()
    idle(store)
    assert store.status()["age_seconds"] == 0


def test_garbage_in_place_of_keys_leaves_the_old_ones(source: Source, clock: Clock, key: SigningKey) -> None:
    store = KeyStore(source, clock=clock)
    store.warm()
    for document in (b"<html>", b'{"keys": []}', b"\xff"):
        source.fetch = lambda document=document: document  # type: ignore[method-assign, misc]
        store.refresh(30)
        assert store.current() == (key.verify_key,)
        assert store.status()["error"] in {"not_jwks", "no_keys"}


def test_a_process_without_threads_to_spare_fetches_later(
    source: Source, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = KeyStore(source, clock=clock, wait=30)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(AuthError, match="not known"):
            store.current()
    assert store.current()


class Overtaken(KeyStore):
    """Another thread's fetch begins and ends between this one's look at the keys and its own attempt."""

    overtake = False

    def _fetch(self, *args: Any, **options: Any) -> None:
        if self.overtake:
            self.overtake = False
            self.refresh(30)
        super()._fetch(*args, **options)


@pytest.mark.parametrize("look", [KeyStore.current, KeyStore.tick])
@pytest.mark.parametrize("error", [None, DOWN])
def test_old_keys_are_not_fetched_again_when_another_has_just_tried(
    source: Source, clock: Clock, look: Callable[[KeyStore], object], error: KeySourceError | None
) -> None:
    store = Overtaken(source, clock=clock)
    store.warm()
    clock.now += keys_module.REFRESH_AFTER + 1
    source.error, store.overtake = error, True
    look(store)
    idle(store)
    assert not store.overtake
    assert source.fetches == 2


@pytest.mark.parametrize("error", [None, DOWN])
def test_the_background_fetches_no_second_time_what_a_request_has_just_fetched(
    source: Source, clock: Clock, error: KeySourceError | None
) -> None:
    store = Overtaken(source, clock=clock)
    source.error, store.overtake = error, True
    store.tick()
    idle(store)
    assert not store.overtake
    assert source.fetches == 1


class Disk:
    """In place of fsync: a disk that takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.go = threading.Event(), threading.Event()
        self.gave_up = False
        monkeypatch.setattr(keys_module.os, "fsync", self)

    def __call__(self, _handle: int) -> None:
        self.asked.set()
        self.gave_up = not self.go.wait(30)


def test_a_slow_disk_keeps_nobody_from_keys_that_are_known(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, cache = Disk(monkeypatch), tmp_path / "jwks.json"
    store = KeyStore(source, clock=clock, cache_file=cache, wait=60)
    assert store.current() == (key.verify_key,)
    assert disk.asked.wait(30)
    # Nor is there another fetch while the file is written, however old the last one is by then.
    clock.now += keys_module.REFRESH_AFTER + 1
    assert store.renewed((key.verify_key,)) is None
    assert store.current() == (key.verify_key,)
    store.tick()
    assert source.fetches == 1
    assert not disk.gave_up
    disk.go.set()
    idle(store)
    assert json.loads(cache.read_text())["source"] == "memory"


def test_who_may_not_wait_gets_new_keys_before_they_are_on_the_disk(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    store = KeyStore(source, clock=clock, cache_file=tmp_path / "jwks.json", wait=60, waiters=1)
    store.current()
    assert disk.asked.wait(30)
    assert store._waiting.acquire(blocking=False)
    assert store.renewed(()) == (key.verify_key,)
    assert not disk.gave_up
    disk.go.set()
    idle(store)


def test_a_refresh_ends_with_the_file_written(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, cache = Disk(monkeypatch), tmp_path / "jwks.json"
    store = KeyStore(source, cache_file=cache)
    there: list[bool] = []
    console = threading.Thread(target=lambda: there.append(store.refresh(60)["ok"] and cache.exists()))
    console.start()
    assert disk.asked.wait(30)
    until(lambda: store.status()["ok"], "the keys are known")
    disk.go.set()
    console.join(30)
    assert there == [True]


def test_a_process_that_ends_leaves_no_half_written_cache(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KeyStore(source, cache_file=tmp_path / "jwks.json", wait=30)

    def slow(_handle: int) -> None:
        assert store._stop.wait(30)
        time.sleep(0.1)

    monkeypatch.setattr(keys_module.os, "fsync", slow)
    assert store.current()
    store.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["jwks.json"]


class Other:
    """Another thread that fetches in the midst of what this one does: to its end, or until it finds the lock taken."""

    def __init__(self, store: KeyStore) -> None:
        self._lock, self._moment, self._thread = threading.Lock(), threading.Event(), threading.Thread()
        self._store = store
        store._lock = self  # type: ignore[assignment]

    def go(self) -> None:
        """Only once."""
        if self._thread.ident is None:
            self._thread = threading.Thread(target=self._fetch)
            self._thread.start()
            assert self._moment.wait(30)

    def done(self) -> None:
        self._thread.join(30)
        idle(self._store)

    def _fetch(self) -> None:
        self._store.refresh(30)
        self._moment.set()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._moment.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_an_older_view_is_not_shown_after_a_newer_one(source: Source, clock: Clock) -> None:
    class Looked(KeyStore):
        def _stale(self, known: Known) -> bool:
            stale = super()._stale(known)
            if stale:
                other.go()
            return stale

    store = Looked(source, clock=clock)
    store.warm()
    other = Other(store)
    clock.now += keys_module.STALE_AFTER + 1
    store._show()
    other.done()
    assert source.fetches == 2
    assert metric("webhook_jwks_stale") == 0
    assert metric("webhook_jwks_age_seconds") == 0


def test_older_keys_of_another_process_do_not_replace_what_was_fetched_meanwhile(
    tmp_path: Path, source: Source, clock: Clock, key: SigningKey
) -> None:
    class Looked(KeyStore):
        held: Known | None = None

        @property
        def _known(self) -> Known | None:  # type: ignore[override]
            known = self.held
            if known is None and cache.exists():
                other.go()
            return known

        @_known.setter
        def _known(self, known: Known | None) -> None:
            self.held = known

    cache = tmp_path / "jwks.json"
    store = Looked(source, clock=clock, cache_file=cache)
    other = Other(store)
    Cache(cache, "memory").save(jwks(new_key()), clock.now - 120)
    store._adopt_cache()
    other.done()
    assert source.fetches == 1
    assert store.current() == (key.verify_key,)
