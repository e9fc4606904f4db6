"""What holds for every delivery: a valid one is accepted, and nothing that differs from it by a bit is."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nacl.signing import SigningKey
from webhook_api import sources
from webhook_api.auth import AuthError, FalVerifier, KeyStore, StandardVerifier, Verified, Verifier
from webhook_api.auth.keys import KeySourceError, parse_jwks
from webhook_api.auth.model import TOLERANCE
from webhook_api.auth.signing import FAL_HEADERS, STANDARD_HEADERS, sign
from webhook_api.auth.standard import message, sign_symmetric

from tests.support.properties import examples

NOW = 1_800_000_000
KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 5)]
STRANGER = SigningKey(bytes([99]) * 32)
SECRETS = tuple(bytes([number]) * 24 for number in range(1, 4))
ACCOUNT = "user-1"

BODIES = st.binary(max_size=200)
REQUEST_IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,199}", fullmatch=True)
ACCOUNTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:|@+-]{0,199}", fullmatch=True)
MESSAGE_IDS = st.from_regex(r"[A-Za-z0-9_~:|@+=/-]{1,255}", fullmatch=True)
IN_WINDOW = st.integers(-TOLERANCE, TOLERANCE)
OUT_OF_WINDOW = st.integers(TOLERANCE + 1, NOW - 1) | st.integers(-NOW, -TOLERANCE - 1)
HEADER_TEXTS = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=300) | st.none()


class Memory:
    """A key set in memory."""

    name = "memory"

    def __init__(self, document: bytes) -> None:
        self.document = document

    def fetch(self) -> bytes:
        return self.document


@st.composite
def key_sets(draw: st.DrawFn) -> bytes:
    """A JWKS with all KEYS, in any order, with or without padding, with other members and other keys between."""
    entries: list[Any] = []
    for key in draw(st.permutations(KEYS)):
        x = base64.urlsafe_b64encode(bytes(key.verify_key)).decode()
        entry = {"x": x if draw(st.booleans()) else x.rstrip("=")}
        others = {"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": "k"}
        members = [*entry.items(), *draw(st.lists(st.sampled_from(sorted(others.items())), unique=True))]
        entries.append(dict(draw(st.permutations(members))))
        if draw(st.booleans()):
            entries.append(draw(st.sampled_from([{"kty": "RSA", "n": "AQ"}, None, 7, {"x": "short"}, {}])))
    return json.dumps({"keys": entries}).encode()


def fal(document: bytes, now: float = NOW) -> FalVerifier:
    return FalVerifier(
        KeyStore(Memory(document), clock=lambda: now, wait=60), frozenset({ACCOUNT}), lambda: now
    )


PLAIN_SET = json.dumps(
    {"keys": [{"x": base64.urlsafe_b64encode(bytes(key.verify_key)).decode()} for key in KEYS]}
).encode()
# One store for all examples of a property: its renewal is limited in rate, so examples start no threads.
FAL = fal(PLAIN_SET)
STANDARD = StandardVerifier(
    "s", secrets=SECRETS, public_keys=tuple(key.verify_key for key in KEYS), clock=lambda: float(NOW)
)


def prove(verifier: Verifier, headers: dict[str, Any], body: bytes) -> Verified:
    given = {name: value for name, value in headers.items() if value is not None}
    return verifier.verify(verifier.claims(given), body)


def refused(verifier: Verifier, headers: dict[str, Any], body: bytes) -> str:
    with pytest.raises(AuthError) as caught:
        prove(verifier, headers, body)
    return caught.value.reason


@examples(60)
@given(key_sets(), st.sampled_from(KEYS), REQUEST_IDS, BODIES, IN_WINDOW)
def test_a_valid_delivery_is_always_accepted(
    document: bytes, key: SigningKey, request_id: str, body: bytes, age: int
) -> None:
    verified = prove(fal(document), sign(key, request_id, ACCOUNT, NOW - age, body), body)
    assert (verified.request_id, verified.account_id, verified.age) == (request_id, ACCOUNT, age)
    assert verified.aside is None


@examples(60)
@given(st.sampled_from(KEYS), REQUEST_IDS, BODIES, OUT_OF_WINDOW)
def test_out_of_the_window_it_is_kept_aside_and_never_accepted(
    key: SigningKey, request_id: str, body: bytes, age: int
) -> None:
    verified = prove(FAL, sign(key, request_id, ACCOUNT, NOW - age, body), body)
    assert verified.aside == ("stale" if age > 0 else "future")


@examples(60)
@given(REQUEST_IDS, ACCOUNTS, BODIES, st.integers(-2 * TOLERANCE, 2 * TOLERANCE))
def test_another_account_is_never_accepted(request_id: str, account: str, body: bytes, age: int) -> None:
    assume(account != ACCOUNT)
    assert refused(FAL, sign(KEYS[0], request_id, account, NOW - age, body), body) == "account_not_allowed"


def flipped(text: str, bit: int) -> str:
    """The text with one bit of its Latin-1 bytes turned: what a header can hold."""
    raw = bytearray(text.encode("latin-1"))
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    return raw.decode("latin-1")


@examples(400)
@given(REQUEST_IDS, BODIES, st.sampled_from((*FAL_HEADERS, "body")), st.integers(0, 10_000))
def test_no_bit_may_be_turned(request_id: str, body: bytes, where: str, bit: int) -> None:
    headers = sign(KEYS[0], request_id, ACCOUNT, NOW, body)
    if where == "body":
        assume(body)
        changed = bytearray(body)
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
        assert refused(FAL, headers, bytes(changed)) == "bad_signature"
        return
    headers[where] = flipped(before := headers[where], bit)
    # The other case of a hexadecimal digit is the same signature.
    assume(headers[where].lower() != before.lower())
    assert refused(FAL, headers, body) in {"bad_signature", "malformed_header"}


@examples(200)
@given(st.fixed_dictionaries(dict.fromkeys(FAL_HEADERS, HEADER_TEXTS)), BODIES)
def test_garbage_is_refused_with_a_reason(headers: dict[str, str | None], body: bytes) -> None:
    assert refused(FAL, headers, body) in {"missing_header", "malformed_header", "bad_signature"}


@examples(100)
@given(REQUEST_IDS, BODIES, st.permutations(FAL_HEADERS))
def test_values_in_other_headers_are_refused(request_id: str, body: bytes, order: list[str]) -> None:
    assume(tuple(order) != FAL_HEADERS)
    headers = sign(KEYS[0], request_id, ACCOUNT, NOW, body)
    moved = dict(zip(order, headers.values(), strict=True))
    refused(FAL, moved, body)


@st.composite
def standard_headers(draw: st.DrawFn, body: bytes, at: int) -> dict[str, str]:
    """A valid delivery: one right signature, of either kind, between others."""
    delivery_id = draw(MESSAGE_IDS)
    secret, key = draw(st.sampled_from(SECRETS)), draw(st.sampled_from(KEYS))
    symmetric = sign_symmetric(secret, delivery_id, at, body)
    signature = base64.b64encode(key.sign(message(delivery_id, at, body)).signature).decode()
    wrong = [
        sign_symmetric(b"x" * 24, delivery_id, at, body),
        "v1a," + base64.b64encode(STRANGER.sign(message(delivery_id, at, body)).signature).decode(),
        "v2,AAAA",
    ]
    right = draw(st.sampled_from([symmetric, "v1a," + signature]))
    entries = [*draw(st.lists(st.sampled_from(wrong), max_size=5)), right]
    values = (delivery_id, str(at), " ".join(draw(st.permutations(entries))))
    return dict(zip(STANDARD_HEADERS, values, strict=True))


@examples(100)
@given(st.data(), BODIES, IN_WINDOW)
def test_a_valid_standard_webhook_is_always_accepted(data: st.DataObject, body: bytes, age: int) -> None:
    verified = prove(STANDARD, data.draw(standard_headers(body, NOW - age)), body)
    assert (verified.age, verified.aside) == (age, None)


@examples(100)
@given(st.data(), BODIES, OUT_OF_WINDOW)
def test_out_of_the_window_a_standard_webhook_is_kept_aside(
    data: st.DataObject, body: bytes, age: int
) -> None:
    assert prove(STANDARD, data.draw(standard_headers(body, NOW - age)), body).aside in {"stale", "future"}


@examples(400)
@given(
    MESSAGE_IDS, BODIES, st.sampled_from((*STANDARD_HEADERS, "body")), st.integers(0, 10_000), st.booleans()
)
def test_no_bit_of_a_standard_webhook_may_be_turned(
    delivery_id: str, body: bytes, where: str, bit: int, symmetric: bool
) -> None:
    signature = (
        sign_symmetric(SECRETS[0], delivery_id, NOW, body)
        if symmetric
        else "v1a," + base64.b64encode(KEYS[0].sign(message(delivery_id, NOW, body)).signature).decode()
    )
    headers = dict(zip(STANDARD_HEADERS, (delivery_id, str(NOW), signature), strict=True))
    if where == "body":
        assume(body)
        changed = bytearray(body)
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
        assert refused(STANDARD, headers, bytes(changed)) == "bad_signature"
        return
    headers[where] = flipped(headers[where], bit)
    assert refused(STANDARD, headers, body) in {"bad_signature", "malformed_header"}


@examples(200)
@given(st.fixed_dictionaries(dict.fromkeys(STANDARD_HEADERS, HEADER_TEXTS)), BODIES)
def test_garbage_of_a_standard_webhook_is_refused_with_a_reason(
    headers: dict[str, str | None], body: bytes
) -> None:
    assert refused(STANDARD, headers, body) in {"missing_header", "malformed_header", "bad_signature"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=10,
)


DOCUMENTS = st.binary(max_size=300) | (JSON | JSON.map(lambda found: {"keys": found})).map(
    lambda document: json.dumps(document).encode()
)


@examples(200)
@given(DOCUMENTS)
def test_a_key_set_is_read_or_refused(document: bytes) -> None:
    try:
        assert parse_jwks(document)
    except KeySourceError as error:
        assert error.reason in {"not_jwks", "no_keys"}  # noqa: PT017


FIELDS = st.sampled_from(["scheme", "shape", "secrets", "public_keys", "x"])


@examples(200)
@given(st.text(max_size=100) | JSON.map(json.dumps) | st.dictionaries(
    st.sampled_from(["replicate", "fal", "r", ""]), st.dictionaries(FIELDS, JSON | st.just("standard"), max_size=4),
    max_size=3).map(json.dumps))  # fmt: skip
def test_a_table_of_senders_is_read_or_its_faults_are_named(text: str) -> None:
    found, faults = sources.read(text, with_keys=True, plain_secrets=True)
    assert all(fault.startswith("WEBHOOK_SOURCES") for fault in faults)
    assert all(sender.secrets or sender.public_keys for sender in found)
