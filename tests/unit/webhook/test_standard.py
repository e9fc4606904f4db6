"""Standard Webhooks: the scheme of configured senders. The project's own library signs what is verified here."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest
from nacl.signing import SigningKey
from standardwebhooks.webhooks import Webhook
from webhook_api.auth import AuthError, StandardVerifier
from webhook_api.auth.standard import MalformedKey, message, read_public_key, read_secret

from tests.support.falfake import new_key

NOW = 1_800_000_000
BODY = b'{"id":"p-1","status":"succeeded","output":["https://replicate.delivery/x.png"]}'
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(range(1, 25))).decode()


def by_library(secret: str = SECRET, body: bytes = BODY, at: int = NOW, delivery_id: str = ID) -> str:
    # The library takes a naive time for one in UTC.
    return Webhook(secret).sign(
        delivery_id, datetime.fromtimestamp(at, UTC).replace(tzinfo=None), body.decode()
    )


def by_key(key: SigningKey, body: bytes = BODY, at: int = NOW, delivery_id: str = ID) -> str:
    return "v1a," + base64.b64encode(key.sign(message(delivery_id, at, body)).signature).decode()


def headers(signature: str, at: int = NOW, delivery_id: str = ID) -> dict[str, str]:
    return {"Webhook-Id": delivery_id, "Webhook-Timestamp": str(at), "Webhook-Signature": signature}


@pytest.fixture
def key() -> SigningKey:
    return new_key()


@pytest.fixture
def verifier(key: SigningKey) -> StandardVerifier:
    return StandardVerifier(
        "replicate", secrets=(read_secret(SECRET),), public_keys=(key.verify_key,), shape="replicate",
        clock=lambda: float(NOW),
    )  # fmt: skip


def reason(verifier: StandardVerifier, given: dict[str, str], body: bytes = BODY) -> str:
    with pytest.raises(AuthError) as caught:
        verifier.verify(verifier.claims(given), body)
    return caught.value.reason


def test_the_librarys_signature(verifier: StandardVerifier) -> None:
    verified = verifier.verify(verifier.claims(headers(by_library())), BODY)
    assert (verified.source, verified.request_id, verified.shape) == ("replicate", ID, "replicate")
    assert (verified.age, verified.aside, verified.signed, verified.account_id) == (0, None, True, None)


def test_an_example_of_the_specification() -> None:
    # Published by Standard Webhooks: secret, id, time and body with their signature.
    secret = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    verifier = StandardVerifier("svix", secrets=(secret,), clock=lambda: 1614265330.0)
    given = headers("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", 1614265330, ID)
    assert verifier.verify(verifier.claims(given), body).source == "svix"


def test_ed25519(verifier: StandardVerifier, key: SigningKey) -> None:
    assert verifier.verify(verifier.claims(headers(by_key(key))), BODY).source == "replicate"
    assert reason(verifier, headers(by_key(new_key()))) == "bad_signature"


def test_one_of_several_signatures_is_enough(verifier: StandardVerifier, key: SigningKey) -> None:
    for right in (by_library(), by_key(key)):
        for given in (f"{by_library(OTHER)} {right}", f"v2,AAAA {right}", f"{right} {by_library(OTHER)}"):
            assert verifier.verify(verifier.claims(headers(given)), BODY)


def test_secrets_and_keys_are_rotated_by_having_several(key: SigningKey) -> None:
    new = new_key()
    both = StandardVerifier(
        "s", secrets=(read_secret(SECRET), read_secret(OTHER)), public_keys=(key.verify_key, new.verify_key),
        clock=lambda: float(NOW),
    )  # fmt: skip
    for signature in (by_library(SECRET), by_library(OTHER), by_key(key), by_key(new)):
        assert both.verify(both.claims(headers(signature)), BODY)


@pytest.mark.parametrize(
    ("at", "aside"), [(NOW - 301, "stale"), (NOW - 300, None), (NOW + 300, None), (NOW + 301, "future")]
)
def test_the_window_of_300_seconds(verifier: StandardVerifier, at: int, aside: str | None) -> None:
    assert verifier.verify(verifier.claims(headers(by_library(at=at), at)), BODY).aside == aside


def test_everything_is_covered(verifier: StandardVerifier, key: SigningKey) -> None:
    for signature in (by_library(), by_key(key)):
        assert reason(verifier, headers(signature), BODY + b" ") == "bad_signature"
        assert reason(verifier, headers(signature, at=NOW + 1)) == "bad_signature"
        assert reason(verifier, headers(signature, delivery_id="msg_2")) == "bad_signature"


def test_a_version_does_not_stand_for_another(verifier: StandardVerifier, key: SigningKey) -> None:
    assert reason(verifier, headers(by_library().replace("v1,", "v1a,"))) == "bad_signature"
    assert reason(verifier, headers(by_key(key).replace("v1a,", "v1,"))) == "bad_signature"
    assert reason(verifier, headers(by_library().replace("v1,", "v2,"))) == "bad_signature"
    # The public key is no secret: whoever takes it for one must not get in.
    trick = "whsec_" + base64.b64encode(bytes(key.verify_key)).decode()
    assert reason(verifier, headers(by_library(trick))) == "bad_signature"


@pytest.mark.parametrize("name", ["Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"])
def test_each_header_must_be_there(verifier: StandardVerifier, name: str) -> None:
    given = headers(by_library())
    del given[name]
    assert reason(verifier, given) == "missing_header"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Webhook-Id", ""), ("Webhook-Id", "a.b"), ("Webhook-Id", "a,b"), ("Webhook-Id", "a b"), ("Webhook-Id", "i" * 256),
        ("Webhook-Timestamp", f" {NOW}"), ("Webhook-Timestamp", f"{NOW}.0"), ("Webhook-Timestamp", "1e9"),
        ("Webhook-Timestamp", "nan"), ("Webhook-Timestamp", "-1"), ("Webhook-Timestamp", f"{NOW}, {NOW}"),
        ("Webhook-Signature", ""), ("Webhook-Signature", "v1"), ("Webhook-Signature", "v1,"),
        ("Webhook-Signature", "v1,a b"),
        ("Webhook-Signature", "v1,AA,v1,AA"), ("Webhook-Signature", " v1,AAAA"), ("Webhook-Signature", "v1,AAAA "),
        ("Webhook-Signature", "v1,é"), ("Webhook-Signature", " ".join(["v1,AAAA"] * 9)),
        ("Webhook-Signature", " ".join(["v1," + "A" * 512] * 16)),
    ],
)  # fmt: skip
def test_lenient_forms_are_refused(verifier: StandardVerifier, name: str, value: str) -> None:
    # The library raises ValueError, UnicodeDecodeError or accepts some of these: docs/decisions/0401.
    assert reason(verifier, {**headers(by_library()), name: value}) == "malformed_header"


def test_another_text_of_the_same_bytes_is_no_signature(verifier: StandardVerifier, key: SigningKey) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for signature, padding in ((by_library(), "="), (by_key(key), "==")):
        bare = signature.rstrip("=")
        near = alphabet[alphabet.index(bare[-1]) ^ 1]
        assert (
            base64.b64decode(bare.split(",")[1] + padding)[:31]
            == base64.b64decode((bare[:-1] + near).split(",")[1] + padding)[:31]
        )
        assert reason(verifier, headers(bare[:-1] + near + padding)) == "bad_signature"
        assert reason(verifier, headers(bare)) == "bad_signature"


def test_padding_of_a_secret_does_not_matter() -> None:
    raw = bytes(range(25))
    text = base64.b64encode(raw).decode()
    assert read_secret("whsec_" + text) == read_secret("whsec_" + text.rstrip("=")) == raw


@pytest.mark.parametrize(
    "text", ["", "whsec_", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_MfKQ9r8GKYqr", "whsec_MfKQ 9r8GKYqrTwjUPD8ILPZIo2LaLa",
             "whsec_" + "A" * 1000, "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw====", "whsec_é"]
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    with pytest.raises(MalformedKey) as caught:
        read_secret(text)
    assert "MfKQ" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "whpk_", "whpk_AAAA", "whsk_" + "A" * 43 + "=", "whpk_" + "A" * 86 + "=="]
)
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(MalformedKey):
        read_public_key(text)


def test_a_public_key_with_and_without_padding(key: SigningKey) -> None:
    text = "whpk_" + base64.b64encode(bytes(key.verify_key)).decode()
    assert read_public_key(text) == read_public_key(text.rstrip("=")) == key.verify_key
