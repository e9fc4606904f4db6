"""The life of fal's keys beyond a single request: background, several processes, outages, alarms."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nacl.signing import SigningKey
from prometheus_client import REGISTRY
from webhook_api.auth import AuthError, FalVerifier, KeyStore
from webhook_api.auth import keys as keys_module
from webhook_api.auth.keys import Cache, KeySourceError
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
    started = time.monotonic()
    for _ in range(5):
        with pytest.raises(AuthError, match="not known"):
            store.current()
    assert time.monotonic() - started < 20
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
