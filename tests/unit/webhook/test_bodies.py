"""Bodies of fal and of the bot, and what must not break on the way to a row."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from typing import Any

import pytest
from webhook_api import bodies
from webhook_api.shapes import SEED, SHAPES


def parse(document: Any) -> bodies.Event:
    return bodies.parse(json.dumps(document).encode())


def reason(body: bytes) -> str:
    with pytest.raises(bodies.BodyError) as caught:
        bodies.parse(body)
    return caught.value.reason


def test_fals_portrait_result() -> None:
    event = bodies.parse(SHAPES["portrait-ok"].build("r-1", "https://v3.fal.media/x"))
    assert (event.request_id, event.status, event.shape, event.final) == ("r-1", "completed", "fal", True)
    assert event.payload["diffusers_lora_file"]["url"].startswith("https://v3.fal.media/x/")
    assert event.error is None
    assert not event.anomalies


def test_seeds_beyond_2_to_the_53_keep_every_digit() -> None:
    event = bodies.parse(SHAPES["portrait-ok"].build("r-1", "https://m"))
    assert event.payload["seed"] == SEED


def test_fals_error_says_what_was_wrong() -> None:
    event = bodies.parse(SHAPES["error-422"].build("r-1", ""))
    assert event.status == "failed"
    assert event.error == "Invalid status code: 422: body.prompt: field required"
    event = bodies.parse(SHAPES["error-text"].build("r-1", ""))
    assert event.error == "Invalid status code: 500: out of memory"


def test_success_without_a_payload_says_where_the_result_is() -> None:
    event = bodies.parse(SHAPES["ok-null-payload"].build("r-1", ""))
    assert event.status == "completed"
    assert event.payload is None
    assert event.payload_error is not None
    assert "not JSON serializable" in event.payload_error


@pytest.mark.parametrize(
    ("written", "status"),
    [
        ("OK", "completed"), ("ERROR", "failed"), ("COMPLETED", "completed"), ("completed", "completed"),
        ("FAILED", "failed"), ("CANCELLED", "cancelled"), ("cancelled", "cancelled"), ("IN_QUEUE", "queued"),
        ("queued", "queued"), ("IN_PROGRESS", "in_progress"), ("in_progress", "in_progress"),
    ],
)  # fmt: skip
def test_each_status_under_one_name(written: str, status: str) -> None:
    assert parse({"request_id": "r", "status": written}).status == status


def test_the_bots_body() -> None:
    event = parse(
        {"finetune_id": "ft-1", "status": "completed", "progress": 100, "message": "done", "user_id": 7,
         "avatar_id": "a-1", "training_type": "STYLE", "result": {"finetune_id": "ft-1"}, "error": None}
    )  # fmt: skip
    assert (event.request_id, event.shape, event.progress, event.message) == ("ft-1", "legacy", 100, "done")
    assert event.hints == bodies.Hints("7", "a-1", "style", "ft-1")
    assert event.payload == {"finetune_id": "ft-1"}


def test_the_comment_gives_what_the_body_does_not() -> None:
    comment = "user_id=123;avatar_id=abc;training_type=portrait"
    assert parse({"request_id": "r", "status": "queued", "comment": comment}).hints == bodies.Hints(
        "123", "abc", "portrait"
    )
    event = parse({"request_id": "r", "status": "queued", "comment": comment, "user_id": "9"})
    assert event.hints.user_id == "9"


@pytest.mark.parametrize("comment", ["", ";;;", "user_id", "user_id=;avatar_id= x", "drop=table", "=" * 5000])
def test_an_odd_comment_gives_nothing(comment: str) -> None:
    assert bodies.parse_comment(comment) == {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"\xff\xfe{}", "not_utf8"),
        (b"{", "not_json"),
        (b'{"request_id": "r"} x', "not_json"),
        (b"[1]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b'{"status":"OK"}', "missing_id"),
        (b'{"request_id":"","status":"OK"}', "missing_id"),
        (b'{"request_id":7,"status":"OK"}', "invalid_id"),
        (b'{"request_id":["r"],"status":"OK"}', "invalid_id"),
        (b'{"request_id":"r\\u0000","status":"OK"}', "invalid_id"),
        (b'{"request_id":"' + b"r" * 256 + b'","status":"OK"}', "invalid_id"),
        (b'{"request_id":"a b","status":"OK"}', "invalid_id"),
        (b'{"request_id":"r"}', "invalid_status"),
        (b'{"request_id":"r","status":"DONE"}', "invalid_status"),
        (b'{"request_id":"r","status":null}', "invalid_status"),
        (b'{"request_id":"r","status":{"a":1}}', "invalid_status"),
        (b"[" * 100_000, "too_deep"),
        (b'{"a":' * 100_000, "too_deep"),
        (b'{"request_id":"r","status":"OK","payload":' + b"[" * 101 + b"]" * 101 + b"}", "too_deep"),
    ],
)
def test_what_cannot_be_read_is_named(body: bytes, expected: str) -> None:
    assert reason(body) == expected


def test_a_malformed_body_still_gives_its_id() -> None:
    with pytest.raises(bodies.BodyError) as caught:
        bodies.parse(b'{"request_id":"r-1","status":"DONE"}')
    assert caught.value.request_id == "r-1"


def test_what_postgresql_cannot_hold_is_replaced_and_named() -> None:
    event = bodies.parse(
        b'{"request_id":"r","status":"OK","payload":{"a\\u0000":"\\ud800x","n":[NaN,-Infinity,1e999]},"error":null}'
    )
    assert event.payload == {"a\ufffd": "\ufffdx", "n": [None, None, None]}
    assert event.anomalies == {"control_text", "not_a_number"}
    json.dumps(event.payload, allow_nan=False).encode("utf-8")


def test_a_number_of_5000_digits_is_no_exception() -> None:
    event = bodies.parse(b'{"request_id":"r","status":"OK","payload":{"n":' + b"9" * 5000 + b"}}")
    assert event.payload["n"].startswith("999")
    assert event.anomalies == {"huge_number"}
    json.dumps(event.payload)


def test_text_beyond_ascii_is_left_alone() -> None:
    event = parse({"request_id": "r", "status": "failed", "error": "Қате 😀"})
    assert event.error == "Қате 😀"
    assert not event.anomalies


def test_duplicate_keys_do_not_pass_silently() -> None:
    assert "duplicate_key" in bodies.parse(b'{"request_id":"r","status":"OK","status":"ERROR"}').anomalies


@pytest.mark.parametrize(
    ("error", "expected"),
    [("boom", "boom"), ({"message": "boom"}, "boom"), ({"code": 7}, '{"code": 7}'), ([], None), ("", None),
     ("x" * 9000, "x" * 2000)],
)  # fmt: skip
def test_errors_of_any_shape_become_one_line(error: Any, expected: str | None) -> None:
    assert parse({"request_id": "r", "status": "failed", "error": error}).error == expected


@pytest.mark.parametrize("detail", [[{"loc": "x"}, 7, None, {}], [[]], {"a": 1}, "", [{"loc": [1, None]}]])
def test_details_of_any_shape_are_no_exception(detail: Any) -> None:
    parse({"request_id": "r", "status": "ERROR", "payload": {"detail": detail}})


@pytest.mark.parametrize(("progress", "kept"), [(0, 0), (40.7, 40), (100, 100), (101, None), (-1, None), ("5", None),
                                                (True, None), ([], None)])  # fmt: skip
def test_progress_is_a_percentage_or_nothing(progress: Any, kept: int | None) -> None:
    assert parse({"request_id": "r", "status": "in_progress", "progress": progress}).progress == kept


def test_the_same_report_is_the_same_event_whatever_try_of_fals_it_names() -> None:
    first, again, other = (
        b'{"request_id":"r","gateway_request_id":"%s","status":"OK","payload":%s}' % parts
        for parts in ((b"g-1", b"null"), (b"g-2", b"null"), (b"g-1", b'{"finetune_id":"ft"}'))
    )
    assert bodies.identity(first) == bodies.identity(again)
    assert bodies.dedup_key("completed", bodies.identity(first)) != bodies.dedup_key(
        "completed", bodies.identity(other)
    )
    assert bodies.dedup_key("completed", "a" * 64) != bodies.dedup_key("failed", "a" * 64)


@pytest.mark.parametrize("item", [b"{}", b"[]", b'""', b"1"])
def test_a_tree_that_would_not_fit_into_memory_is_not_built(item: bytes) -> None:
    body = b'{"request_id":"r","status":"OK","payload":[' + b",".join([item] * 300_000) + b"]}"
    with pytest.raises(bodies.BodyError) as caught:
        bodies.parse(body)
    assert caught.value.reason == "too_complex"


def test_commas_in_a_text_are_no_items() -> None:
    body = json.dumps({"request_id": "r", "status": "OK", "payload": {"text": ',{[\\"' * 300_000}}).encode()
    assert bodies.parse(body).payload["text"].startswith(",{[")


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"request_id": "r", "status": "OK", "payload": {"log": "a," * 4_900_000}}).encode(),
        b"[" * 250_001 + b'\\"' * 150_000,
        b"," * 100_001 + b'"' * 5_000_000,
    ],
    ids=["commas in a long text", "quotes that end nothing", "nothing but quotes"],
)
def test_what_is_counted_costs_neither_time_nor_memory(body: bytes) -> None:
    """Reading a body must not take an instance down: every arrival of it would, and it would never be stored."""
    tracemalloc.start()
    try:
        started = time.process_time()
        with contextlib.suppress(bodies.BodyError):
            bodies.parse(body)
        assert time.process_time() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 12 * len(body) + 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", ["O\u212a", "\u212a", "QUEUE\u0130D", "o\u006b\u0301", "ＯＫ"])
def test_only_ascii_is_a_status(status: str) -> None:
    # "OK" with the Kelvin sign in it becomes "ok" in lower case.
    assert reason(json.dumps({"request_id": "r", "status": status}).encode()) == "invalid_status"


def test_a_byte_order_mark_is_named() -> None:
    with pytest.raises(bodies.BodyError, match="byte order mark") as caught:
        bodies.parse(b'\xef\xbb\xbf{"request_id":"r","status":"OK"}')
    assert caught.value.reason == "not_json"


@pytest.mark.parametrize(
    ("written", "status"),
    [("starting", "queued"), ("processing", "in_progress"), ("succeeded", "completed"), ("failed", "failed"),
     ("canceled", "cancelled"), ("aborted", "cancelled")],
)  # fmt: skip
def test_a_prediction_of_replicate(written: str, status: str) -> None:
    document = {"id": "p-1", "status": written, "output": ["https://x/y.png"], "error": None, "logs": "…"}
    event = bodies.parse(json.dumps(document).encode(), "replicate")
    assert (event.request_id, event.status, event.shape) == ("p-1", status, "replicate")
    assert (event.payload, event.error) == (["https://x/y.png"], None)


def test_a_failed_prediction_says_why() -> None:
    body = b'{"id": "p-1", "status": "failed", "error": "CUDA out of memory", "output": null}'
    assert bodies.parse(body, "replicate").error == "CUDA out of memory"


@pytest.mark.parametrize(
    ("document", "expected"),
    [({"request_id": "p", "status": "succeeded"}, "missing_id"), ({"id": 7, "status": "succeeded"}, "invalid_id"),
     ({"id": "p", "status": "OK"}, "invalid_status"), ({"id": "p"}, "invalid_status")],
)  # fmt: skip
def test_what_is_no_prediction(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(bodies.BodyError) as caught:
        bodies.parse(json.dumps(document).encode(), "replicate")
    assert caught.value.reason == expected
