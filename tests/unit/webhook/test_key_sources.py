"""Keys over HTTP from a real server on loopback: every way in which it can misbehave, each bounded in time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import urllib3
from webhook_api.auth.keys import MAX_DOCUMENT, KeySourceError, KeyStore, UrlSource

from tests.support.falfake import JwksServer, jwks, jwks_server, new_key


@pytest.fixture
def server() -> Iterator[JwksServer]:
    with jwks_server(new_key()) as made:
        yield made


@pytest.fixture
def http() -> Iterator[urllib3.PoolManager]:
    with urllib3.PoolManager() as pool:
        yield pool


def reason(source: UrlSource) -> str:
    with pytest.raises(KeySourceError) as caught:
        source.fetch()
    return caught.value.reason


def test_keys_are_fetched_once(server: JwksServer, http: urllib3.PoolManager) -> None:
    store = KeyStore(UrlSource(server.url, http))
    for _ in range(50):
        assert len(store.current()) == 1
    assert server.requests == 1


def test_rotation_over_http(server: JwksServer, http: urllib3.PoolManager) -> None:
    now = 1000.0
    store = KeyStore(UrlSource(server.url, http), clock=lambda: now)
    old = store.current()
    now += 61
    key = new_key()
    server.document = jwks(key)
    assert store.renewed(old) == (key.verify_key,)


@pytest.mark.parametrize("status", [301, 302, 404, 500])
def test_anything_but_200_is_no_key_set(server: JwksServer, http: urllib3.PoolManager, status: int) -> None:
    server.status = status
    assert reason(UrlSource(server.url, http)) == "status"


def test_a_huge_document_is_given_up(server: JwksServer, http: urllib3.PoolManager) -> None:
    server.document = b" " * (MAX_DOCUMENT + 1)
    assert reason(UrlSource(server.url, http)) == "too_large"


def test_a_server_that_hangs_is_given_up(server: JwksServer, http: urllib3.PoolManager) -> None:
    server.hold.clear()
    started = time.monotonic()
    assert reason(UrlSource(server.url, http)) == "unreachable"
    assert time.monotonic() - started < 20


def test_a_server_that_is_not_there(http: urllib3.PoolManager) -> None:
    assert reason(UrlSource("http://127.0.0.1:1/jwks.json", http)) == "unreachable"
