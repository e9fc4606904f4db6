"""Who may deliver: each rule of both schemes, and the life of the keys."""

from __future__ import annotations

import base64
import json
import logging
import threading
from pathlib import Path

import pytest
from nacl.signing import SigningKey
from webhook_api import metrics
from webhook_api.auth import Authenticator, AuthError, FalVerifier, KeyStore, SecretVerifier
from webhook_api.auth import keys as keys_module
from webhook_api.auth.keys import KeySourceError, parse_jwks
from webhook_api.auth.signing import FAL_HEADERS, message, sign

from tests.support.falfake import ACCOUNT, SECRET, new_key
from tests.support.keysource import NOW, Clock, Source

BODY = b'{"request_id":"req-1","status":"OK","payload":null}'


@pytest.fixture
def key() -> SigningKey:
    return new_key()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source(key: SigningKey) -> Source:
    return Source(key)


@pytest.fixture
def verifier(source: Source, clock: Clock) -> FalVerifier:
    return FalVerifier(KeyStore(source, clock=clock), frozenset({ACCOUNT}), clock)


def headers(key: SigningKey, *, body: bytes = BODY, account: str = ACCOUNT, at: int = NOW) -> dict[str, str]:
    return sign(key, "req-1", account, at, body)


def reason(verifier: FalVerifier, given: dict[str, str], body: bytes = BODY) -> str:
    with pytest.raises(AuthError) as caught:
        verifier.verify(verifier.claims(given), body)
    return caught.value.reason


def test_the_signed_message_is_fals() -> None:
    # Four lines, no final newline, lower-case hex of the raw body (fal.ai, inference/webhooks).
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert message("r", "u", 17, b"abc") == f"r\nu\n17\n{digest}".encode()


def test_a_genuine_delivery(verifier: FalVerifier, key: SigningKey) -> None:
    verified = verifier.verify(verifier.claims(headers(key, at=NOW - 10)), BODY)
    assert (verified.source, verified.request_id, verified.account_id) == ("fal", "req-1", ACCOUNT)
    assert verified.age == 10


def test_every_key_is_tried(source: Source, verifier: FalVerifier, key: SigningKey) -> None:
    source.keys = (new_key(), new_key(), key)
    assert verifier.verify(verifier.claims(headers(key)), BODY).source == "fal"


@pytest.mark.parametrize("name", FAL_HEADERS)
def test_each_header_must_be_there(verifier: FalVerifier, key: SigningKey, name: str) -> None:
    given = headers(key)
    del given[name]
    assert reason(verifier, given) == "missing_header"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (FAL_HEADERS[0], ""), (FAL_HEADERS[0], "a b"), (FAL_HEADERS[0], "req-1\n"), (FAL_HEADERS[0], "r" * 201),
        (FAL_HEADERS[1], "a,b"), (FAL_HEADERS[1], "ü"),
        (FAL_HEADERS[2], f" {NOW}"), (FAL_HEADERS[2], f"+{NOW}"), (FAL_HEADERS[2], f"{NOW}.0"),
        (FAL_HEADERS[2], "1_800_000_000"), (FAL_HEADERS[2], f"{NOW}, {NOW}"), (FAL_HEADERS[2], f"0{NOW}"),
        (FAL_HEADERS[2], "١٨٠٠٠٠٠٠٠٠"), (FAL_HEADERS[2], f"{NOW}\n"), (FAL_HEADERS[2], "9" * 5000),
        (FAL_HEADERS[3], "zz" * 64), (FAL_HEADERS[3], "ab" * 63), (FAL_HEADERS[3], " ".join(["ab"] * 64)),
    ],
)  # fmt: skip
def test_lenient_forms_are_refused(verifier: FalVerifier, key: SigningKey, name: str, value: str) -> None:
    assert reason(verifier, {**headers(key), name: value}) == "malformed_header"


@pytest.mark.parametrize(("name", "value"), [(FAL_HEADERS[0], "req-2"), (FAL_HEADERS[1], "other"),
                                             (FAL_HEADERS[2], str(NOW + 1))])  # fmt: skip
def test_each_header_is_covered(verifier: FalVerifier, key: SigningKey, name: str, value: str) -> None:
    assert reason(verifier, {**headers(key), name: value}) == "bad_signature"


def test_the_raw_body_is_covered(verifier: FalVerifier, key: SigningKey) -> None:
    assert reason(verifier, headers(key), BODY + b" ") == "bad_signature"
    assert reason(verifier, headers(key), b"") == "bad_signature"


def test_a_strangers_key(verifier: FalVerifier) -> None:
    assert reason(verifier, headers(new_key())) == "bad_signature"


@pytest.mark.parametrize(("at", "expected"), [(NOW - 301, "stale"), (NOW + 301, "future")])
def test_the_window_of_300_seconds(verifier: FalVerifier, key: SigningKey, at: int, expected: str) -> None:
    verified = verifier.verify(verifier.claims(headers(key, at=at)), BODY)
    assert (verified.aside, verified.age) == (expected, NOW - at)
    nearer = at + 1 if expected == "stale" else at - 1
    assert verifier.verify(verifier.claims(headers(key, at=nearer)), BODY).aside is None


def test_stale_means_genuine_but_late(verifier: FalVerifier) -> None:
    assert reason(verifier, headers(new_key(), at=NOW - 9999)) == "bad_signature"


@pytest.mark.parametrize("at", [NOW, NOW - 9999, NOW + 9999])
def test_another_customer_of_fal(verifier: FalVerifier, key: SigningKey, at: int) -> None:
    # Also when it is late: nobody else may have anything kept here.
    assert reason(verifier, headers(key, account="somebody-else", at=at)) == "account_not_allowed"


def test_learning_accepts_and_reports_once(
    source: Source, clock: Clock, key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    learning = FalVerifier(KeyStore(source, clock=clock), frozenset(), clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            learning.verify(learning.claims(headers(key, account="acct-9")), BODY)
    learned = [record for record in caplog.records if record.message == "fal_account_learned"]
    assert [record.__dict__["account_id"] for record in learned] == ["acct-9"]


def test_unknown_keys_are_never_a_bad_signature(
    source: Source, verifier: FalVerifier, key: SigningKey
) -> None:
    source.error = KeySourceError("unreachable", "down")
    assert reason(verifier, headers(key)) == "keys_unknown"


def test_a_failed_fetch_counts_for_a_while(
    source: Source, verifier: FalVerifier, key: SigningKey, clock: Clock
) -> None:
    source.error = KeySourceError("unreachable", "down")
    for _ in range(20):
        assert reason(verifier, headers(key)) == "keys_unknown"
    assert source.fetches == 1
    source.error = None
    clock.now += keys_module.FAILURE_PAUSE + 1
    assert verifier.verify(verifier.claims(headers(key, at=int(clock.now))), BODY)


def test_garbage_causes_one_fetch_a_minute(
    source: Source, verifier: FalVerifier, key: SigningKey, clock: Clock
) -> None:
    verifier.verify(verifier.claims(headers(key)), BODY)
    assert source.fetches == 1
    for second in range(120):
        clock.now = NOW + second
        assert reason(verifier, headers(new_key(), at=NOW)) == "bad_signature"
    assert source.fetches <= 3


def test_a_rotated_key_is_fetched_when_nothing_matches(
    source: Source, verifier: FalVerifier, key: SigningKey, clock: Clock
) -> None:
    verifier.verify(verifier.claims(headers(key)), BODY)
    new = new_key()
    source.keys = (key, new)
    clock.now += 61
    assert verifier.verify(verifier.claims(headers(new)), BODY)
    assert source.fetches == 2


def test_known_keys_serve_while_the_source_is_down_but_not_for_ever(
    source: Source, verifier: FalVerifier, key: SigningKey, clock: Clock
) -> None:
    verifier.verify(verifier.claims(headers(key)), BODY)
    source.error = KeySourceError("unreachable", "down")
    clock.now = NOW + keys_module.MAX_AGE - 10
    assert verifier.verify(verifier.claims(headers(key, at=int(clock.now))), BODY)
    clock.now = NOW + keys_module.MAX_AGE + 10
    assert reason(verifier, headers(key, at=int(clock.now))) == "keys_unknown"


def test_keys_survive_a_restart(tmp_path: Path, source: Source, clock: Clock, key: SigningKey) -> None:
    cache = tmp_path / "jwks-cache.json"
    KeyStore(source, clock=clock, cache_file=cache).warm()
    assert cache.stat().st_mode & 0o777 == 0o600
    source.error = KeySourceError("unreachable", "down")
    clock.now += 3600
    again = KeyStore(source, clock=clock, cache_file=cache)
    assert again.current() == (key.verify_key,)
    clock.now += keys_module.MAX_AGE
    with pytest.raises(AuthError, match="not known"):
        KeyStore(source, clock=clock, cache_file=cache).current()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fetched_at": 1}', '{"fetched_at":"x","source":"memory","jwks":""}']
)
def test_a_broken_cache_is_no_obstacle(tmp_path: Path, source: Source, key: SigningKey, content: str) -> None:
    cache = tmp_path / "jwks-cache.json"
    cache.write_text(content)
    assert KeyStore(source, cache_file=cache).current() == (key.verify_key,)


def test_a_cache_of_another_source_is_not_used(tmp_path: Path, source: Source, clock: Clock) -> None:
    cache = tmp_path / "jwks-cache.json"
    KeyStore(source, clock=clock, cache_file=cache).warm()
    other = Source(new_key())
    other.name = "another address"
    assert KeyStore(other, clock=clock, cache_file=cache).current() == (other.keys[0].verify_key,)


def test_a_clock_set_back_does_not_stop_fetches(source: Source, clock: Clock) -> None:
    source.error = KeySourceError("unreachable", "down")
    store = KeyStore(source, clock=clock)
    store.warm()
    source.error = None
    clock.now -= 7200
    assert store.current()


def test_many_threads_make_one_fetch(clock: Clock, key: SigningKey) -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(Source):
        def fetch(self) -> bytes:
            entered.set()
            assert release.wait(60)
            return super().fetch()

    slow = Slow(key)
    store = KeyStore(slow, clock=clock)
    results: list[object] = []
    threads = [threading.Thread(target=lambda: results.append(store.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert entered.wait(30)
    release.set()
    for thread in threads:
        thread.join(30)
    assert results == [(key.verify_key,)] * 8
    assert slow.fetches == 1


def test_who_looked_before_a_fetch_ended_makes_no_second_one(source: Source, key: SigningKey) -> None:
    """The fetch of another thread ends between this one's look at the keys and its own attempt."""

    class Late(KeyStore):
        looked_early = False

        def _usable(self) -> keys_module.Known | None:
            if source.fetches and not self.looked_early:
                self.looked_early = True
                return None
            return super()._usable()

    store = Late(source)
    store.refresh(30)
    store.looked_early = False
    assert store.current() == (key.verify_key,)
    assert store.looked_early
    assert source.fetches == 1


def test_status_says_what_health_shows(source: Source, clock: Clock) -> None:
    store = KeyStore(source, clock=clock)
    assert store.status() == {"ok": False, "keys": 0}
    store.warm()
    clock.now += 5
    assert store.status() == {"ok": True, "keys": 1, "age_seconds": 5, "stale": False}


def entry(key: SigningKey, **changes: object) -> dict[str, object]:
    x = base64.urlsafe_b64encode(bytes(key.verify_key)).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "x": x} | changes


def test_padding_does_not_matter(key: SigningKey) -> None:
    padded = base64.urlsafe_b64encode(bytes(key.verify_key)).decode()
    document = json.dumps({"keys": [entry(key), {"x": padded}]}).encode()
    assert parse_jwks(document) == (key.verify_key, key.verify_key)


def test_other_keys_are_passed_over(key: SigningKey) -> None:
    others = [
        {"kty": "RSA", "n": "x"},
        entry(key, crv="X25519"),
        entry(key, x="short"),
        entry(key, x=7),
        7,
        None,
    ]
    assert parse_jwks(json.dumps({"keys": [*others, entry(key)]}).encode()) == (key.verify_key,)


@pytest.mark.parametrize(
    ("document", "expected"),
    [(b"<html>", "not_jwks"), (b"[]", "not_jwks"), (b'{"keys":{}}', "not_jwks"), (b"\xff", "not_jwks"),
     (b'{"keys":[]}', "no_keys"), (b"[" * 100_000, "not_jwks")],
)  # fmt: skip
def test_what_is_no_key_set(document: bytes, expected: str) -> None:
    with pytest.raises(KeySourceError) as caught:
        parse_jwks(document)
    assert caught.value.reason == expected


def authenticator(verifier: FalVerifier, secret: str | None = SECRET) -> Authenticator:
    return Authenticator(fal=verifier, manual=SecretVerifier(secret))


def auth_reason(auth: Authenticator, given: dict[str, str]) -> str:
    with pytest.raises(AuthError) as caught:
        auth.verify(auth.claims(given), BODY)
    return caught.value.reason


def test_the_secret(verifier: FalVerifier) -> None:
    auth = authenticator(verifier)
    assert auth.verify(auth.claims({"X-Webhook-Secret": SECRET}), BODY).source == "manual"
    for wrong in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), "ü"):
        assert auth_reason(auth, {"X-Webhook-Secret": wrong}) == "bad_secret"


def test_without_a_configured_secret_all_are_refused(verifier: FalVerifier) -> None:
    for secret in (None, ""):
        for given in ("", "None", "x"):
            assert (
                auth_reason(authenticator(verifier, secret), {"X-Webhook-Secret": given})
                == "secret_not_configured"
            )


PREVIOUS = "the-secret-of-before"


def test_while_a_secret_is_replaced_the_one_of_before_is_accepted_as_well(verifier: FalVerifier) -> None:
    auth = Authenticator(fal=verifier, manual=SecretVerifier(SECRET, PREVIOUS))
    for good in (SECRET, PREVIOUS):
        assert auth.verify(auth.claims({"X-Webhook-Secret": good}), BODY).source == "manual"
    for wrong in ("", PREVIOUS[:-1], PREVIOUS + "x", SECRET + PREVIOUS, f"{SECRET} {PREVIOUS}", "ü"):
        assert auth_reason(auth, {"X-Webhook-Secret": wrong}) == "bad_secret"
    assert auth_reason(authenticator(verifier), {"X-Webhook-Secret": PREVIOUS}) == "bad_secret"


def test_both_secrets_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes says nothing about which of the two was nearly right."""
    compared: list[bytes] = []

    def digest(given: bytes, secret: bytes) -> bool:
        compared.append(secret)
        return given == secret

    monkeypatch.setattr("webhook_api.auth.secret.hmac.compare_digest", digest)
    both = SecretVerifier(SECRET, PREVIOUS)
    for given in (SECRET, PREVIOUS):
        both.claims({"X-Webhook-Secret": given})
    with pytest.raises(AuthError):
        both.claims({"X-Webhook-Secret": "wrong"})
    assert compared == [SECRET.encode(), PREVIOUS.encode()] * 3


def test_a_previous_secret_alone_lets_nobody_in() -> None:
    for given in (PREVIOUS, ""):
        with pytest.raises(AuthError) as caught:
            SecretVerifier(None, PREVIOUS).claims({"X-Webhook-Secret": given})
        assert caught.value.reason == "secret_not_configured"


def test_calls_with_the_previous_secret_are_counted() -> None:
    """When the number stands still, every caller has the new one."""
    both = SecretVerifier(SECRET, PREVIOUS)

    def count() -> float:
        return metrics.REGISTRY.get_sample_value("webhook_previous_secret_total") or 0.0

    before = count()
    both.claims({"X-Webhook-Secret": SECRET})
    assert count() == before
    both.claims({"X-Webhook-Secret": PREVIOUS})
    assert count() == before + 1


def test_nothing_falls_back(verifier: FalVerifier, key: SigningKey) -> None:
    auth = authenticator(verifier)
    assert auth_reason(auth, {}) == "missing_credentials"
    assert auth_reason(auth, {"X-Webhook-Secret": SECRET, FAL_HEADERS[0]: "req-1"}) == "missing_header"
    assert auth_reason(auth, {"X-Webhook-Secret": SECRET, **headers(new_key())}) == "bad_signature"
    assert auth.verify(auth.claims({"X-Webhook-Secret": "wrong", **headers(key)}), BODY).source == "fal"
