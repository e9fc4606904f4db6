"""What holds for every body: it is an event or a BodyError, what is handed on is clean, its identity is stable."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webhook_api import acceptance, bodies
from webhook_api.auth.model import Verified

from tests.support.properties import examples

REASONS = {
    "empty", "not_utf8", "not_json", "too_deep", "too_complex", "not_an_object", "missing_id", "invalid_id",
    "invalid_status",
}  # fmt: skip
PARTS = {
    "fal": (
        "request_id",
        ["payload", "result"],
        ["OK", "ERROR", "COMPLETED", "queued", "in_progress", "CANCELED"],
    ),
    "replicate": ("id", ["output"], ["starting", "processing", "succeeded", "failed", "canceled"]),
}
"""Of each shape: the member that names the request, those that hold a result, and its statuses."""
STRANGE = ["O\u212a", "", "ok "]
IDS = st.from_regex(r"[\x21-\x7e]{1,60}", fullmatch=True)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["\x00", "\ud800", "\udfff\ud800", "\ufeff", "training_type=portrait"]
)
ODD = st.sampled_from(
    ["NaN", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 70, "9007199254740993", "-0", '"\\u0000"', '"\\ud800"', "[[[]]]",
     "[" * 120 + "]" * 120, '{"a":1,"a":2}', "0.1e-400"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
).map(json.dumps)
NAMES = st.sampled_from(
    ["request_id", "id", "finetune_id", "gateway_request_id", "status", "payload", "result", "output", "error",
     "payload_error", "progress", "message", "user_id", "avatar_id", "training_type", "comment", "logs", "\x00"]
)  # fmt: skip


@st.composite
def documents(draw: st.DrawFn, shape: str = "fal") -> bytes:
    """An object as text, member by member: with doubles, odd numbers and texts, mostly with an id and a status."""
    members = [(draw(NAMES), draw(VALUES | ODD)) for _ in range(draw(st.integers(0, 4)))]
    id_name, result, statuses = PARTS[shape]
    members.append((draw(st.sampled_from(result)), draw(ODD | VALUES)))
    right = [
        (id_name, json.dumps(draw(IDS))),
        ("status", json.dumps(draw(st.sampled_from(statuses + STRANGE)))),
    ]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        members = draw(st.permutations([*members, *right]))
    elif kind > 1:
        # The last one of a name counts.
        members = [*members, *right]
    text = ",".join(f"{json.dumps(name)}:{value}" for name, value in members)
    space = draw(st.sampled_from(["", " ", "\n\t"]))
    return f"{space}{{{space}{text}{space}}}{space}".encode("utf-8", "surrogatepass")


ANY_BODY = (
    documents() | st.binary(max_size=300) | VALUES.map(lambda text: text.encode("utf-8", "surrogatepass"))
)
SHAPES = st.sampled_from(sorted(bodies.SHAPES))
DELIVERIES = (
    st.tuples(documents("fal"), st.just("fal"))
    | st.tuples(documents("replicate"), st.just("replicate"))
    | st.tuples(ANY_BODY, SHAPES)
)
"""Bodies, and the shape they are read in: mostly their own."""


def test_every_shape_is_tried() -> None:
    assert set(PARTS) == set(bodies.SHAPES)


def event_of(body: bytes, shape: str) -> bodies.Event | None:
    try:
        return bodies.parse(body, shape)
    except bodies.BodyError as error:
        assert error.reason in REASONS  # noqa: PT017
        assert str(error)  # noqa: PT017
        return None


def clean(text: str | None) -> bool:
    return text is None or ("\x00" not in text and text.encode("utf-8") is not None)


@examples(600)
@given(DELIVERIES)
def test_a_body_is_an_event_or_a_body_error(arrived: tuple[bytes, str]) -> None:
    body, shape = arrived
    event = event_of(body, shape)
    if event is None:
        return
    assert re.fullmatch(r"[\x21-\x7e]{1,255}", event.request_id)
    assert event.status in bodies.STATUSES
    assert event.status != "unknown"
    texts = (event.error, event.payload_error, event.message, event.gateway_request_id, event.hints.avatar_id)
    assert all(map(clean, texts))
    assert all(len(text) <= bodies.MAX_TEXT for text in texts if text)
    # What PostgreSQL's jsonb, Redis and the bot get: valid UTF-8 without NUL, no NaN, printable numbers.
    handed_on = json.dumps(event.payload, allow_nan=False, ensure_ascii=False)
    assert clean(handed_on)
    assert "\\u0000" not in handed_on
    assert event.progress is None or 0 <= event.progress <= 100


@examples(300)
@given(DELIVERIES)
def test_the_same_bytes_are_the_same_event(arrived: tuple[bytes, str]) -> None:
    body, shape = arrived
    first, second = event_of(body, shape), event_of(bytes(bytearray(body)), shape)
    assert repr(first) == repr(second)
    assert bodies.identity(body) == bodies.identity(bytes(bytearray(body)))


@examples(300)
@given(IDS, IDS, IDS, VALUES, st.sampled_from(["OK", "ERROR"]))
def test_the_last_internal_try_does_not_change_the_identity(
    request_id: str, one: str, other: str, payload: str, status: str
) -> None:
    def body(gateway: str) -> bytes:
        head = f'{{"request_id":{json.dumps(request_id)},"gateway_request_id":{json.dumps(gateway)},'
        return f'{head}"status":"{status}","payload":{payload}}}'.encode()

    # An id that JSON must escape is none of fal's.
    if json.dumps(one)[1:-1] == one and json.dumps(other)[1:-1] == other:
        assert bodies.identity(body(one)) == bodies.identity(body(other))


@examples(300)
@given(IDS, st.integers(), st.integers(), st.sampled_from(["OK", "ERROR"]))
def test_another_result_is_another_identity(request_id: str, one: int, other: int, status: str) -> None:
    def body(seed: int) -> bytes:
        document = {"request_id": request_id, "status": status, "payload": {"seed": seed}}
        return json.dumps(document).encode()

    assert (bodies.identity(body(one)) == bodies.identity(body(other))) == (one == other)


@examples(200)
@given(st.sampled_from(["stale", "future", "account", "malformed"]), st.text(max_size=80))
def test_the_key_of_what_is_kept_aside_leads_back(reason: str, key: str) -> None:
    aside = bodies.aside_key(reason, key)
    assert bodies.normal_key(aside) == key
    assert aside != key


@examples(200)
@given(ANY_BODY)
def test_a_normal_identity_never_looks_like_one_kept_aside(body: bytes) -> None:
    key = bodies.dedup_key("completed", bodies.identity(body))
    assert bodies.normal_key(key) == key


HEADERS = st.dictionaries(
    st.sampled_from([*acceptance.KEPT_HEADERS, "X-Webhook-Secret", "Cookie"]),
    st.text(st.characters(max_codepoint=255), max_size=600),
)


@examples(500)
@given(
    DELIVERIES,
    HEADERS,
    st.sampled_from([None, "stale", "future", "account"]),
    IDS,
    st.integers(1, 999_999_999_999),
)
def test_whatever_is_signed_becomes_a_row(
    arrived: tuple[bytes, str], headers: dict[str, str], aside: str | None, request_id: str, signed_at: int
) -> None:
    body, shape = arrived
    verified = Verified("fal", request_id, "user-1", 17.0, signed_at, aside, shape=shape)
    row = acceptance.delivery(verified, body, headers, edge_request_id="e", training_type="x")
    assert row.body == body
    assert re.fullmatch(r"[\x21-\x7e]{1,255}", row.request_id)
    assert row.status in bodies.STATUSES
    assert re.fullmatch(r"[0-9a-f]{64}", row.body_sha256)
    assert (row.state == "dead") == (row.aside is not None)
    assert row.aside in ({"malformed", aside} if aside else {None, "malformed"})
    assert row.dedup_key.startswith(f"aside:{row.aside}:") == (row.aside is not None)
    assert all(map(clean, (row.last_error, row.gateway_request_id, row.training_type_hint, row.dedup_key)))
    assert set(row.headers) <= {name.lower() for name in acceptance.KEPT_HEADERS}
    assert all(clean(value) for value in row.headers.values())


@examples(300)
@given(ANY_BODY, HEADERS)
def test_what_is_not_signed_becomes_a_row_or_a_refusal(body: bytes, headers: dict[str, Any]) -> None:
    verified = Verified("manual", signed=False)
    try:
        row = acceptance.delivery(verified, body, headers, edge_request_id=None)
    except bodies.BodyError as error:
        assert error.reason in REASONS  # noqa: PT017
        return
    assert (row.state, row.aside) == ("pending", None)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"":'])
def test_any_depth_is_refused_and_none_is_a_crash(opening: bytes) -> None:
    for depth in (90, 99, 101, 1000, 20_000, 100_000):
        document = b'{"request_id":"r","status":"OK","payload":' + opening * depth
        assert event_of(document, "fal") is None
