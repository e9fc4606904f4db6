"""What answers of fal's queue mean, and the deliveries that they become."""

from __future__ import annotations

import json
from typing import Any

import pytest
from webhook_api.bodies import parse
from webhook_api.reconcile.answers import Answer, Kind, Response, delivery, of_result, of_status

ID = "024ca5b1-45d3-4afd-883e-ad3abe2a1c4d"
ENDED = {"status": "COMPLETED", "logs": None}


def response(status: int, document: Any, **headers: str) -> Response:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return Response("https://queue.test/x", status, headers, body)


def status(code: int, document: Any, **headers: str) -> Answer:
    found = of_status(response(code, document, **headers))
    assert isinstance(found, Answer)
    return found


@pytest.mark.parametrize(("document", "kind"), [
    ({"status": "IN_QUEUE", "queue_position": 2}, Kind.QUEUED),
    ({"status": "IN_PROGRESS", "logs": []}, Kind.IN_PROGRESS),
    ({"status": "WHATEVER"}, Kind.UNAVAILABLE),
    ({"status": None}, Kind.UNAVAILABLE),
    ([], Kind.UNAVAILABLE),
    (b"<html>", Kind.UNAVAILABLE),
    (b"[" * 100_000, Kind.UNAVAILABLE),
])  # fmt: skip
def test_a_status_that_is_no_end(document: Any, kind: Kind) -> None:
    assert status(202, document).kind is kind


@pytest.mark.parametrize("name", ["COMPLETED", "FAILED", "CANCELED"])
def test_the_end_is_known_by_its_result_alone(name: str) -> None:
    """fal.md: the queue has no FAILED status; whatever else it may say, only the result tells how it ended."""
    assert of_status(response(200, {"status": name})) == {"status": name}


@pytest.mark.parametrize(("code", "kind"), [
    (401, Kind.KEY_REFUSED), (403, Kind.FORBIDDEN), (404, Kind.NOT_FOUND), (410, Kind.NOT_FOUND),
    (408, Kind.THROTTLED), (429, Kind.THROTTLED), (500, Kind.UNAVAILABLE), (503, Kind.UNAVAILABLE),
    (302, Kind.UNAVAILABLE), (405, Kind.UNUSABLE), (422, Kind.UNUSABLE),
])  # fmt: skip
def test_an_error_of_the_status_is_no_failure_of_the_job(code: int, kind: Kind) -> None:
    assert status(code, {"detail": "why"}).kind is kind
    assert "why" in status(code, {"detail": "why"}).detail


def test_retry_after_in_both_forms() -> None:
    assert status(429, {}, **{"retry-after": "17"}).retry_after == 17
    dates = {"retry-after": "Mon, 23 Nov 2026 00:01:00 GMT", "date": "Mon, 23 Nov 2026 00:00:20 GMT"}
    assert status(503, {}, **dates).retry_after == 40
    assert status(429, {}, **{"retry-after": "soon"}).retry_after is None


def test_a_result_keeps_its_own_bytes() -> None:
    """fal.md: seeds exceed 2^53. What was read and written again may be another number."""
    raw = b' {"seed": 12345678901234567890, "x": 1.10, "diffusers_lora_file": {"url": "https://v3.fal.media/a"}} '
    answer = of_result(ID, ENDED, response(200, raw))
    assert answer.kind is Kind.RESULT
    assert answer.body is not None
    assert raw.strip() in answer.body
    event = parse(answer.body)
    assert (event.status, event.shape, event.payload["seed"]) == ("completed", "fal", 12345678901234567890)
    made = delivery(ID, answer, "2026-11-23T00:00:00Z", "PORTRAIT")
    assert (made.source, made.request_id, made.status, made.state) == (
        "reconcile",
        ID,
        "completed",
        "pending",
    )
    assert made.training_type_hint == "portrait"
    assert made.headers["x-reconcile-url"] == "https://queue.test/x"
    later = delivery(ID, of_result(ID, ENDED, response(200, raw)), "2026-11-23T01:00:00Z", None)
    assert made.identity == later.identity


@pytest.mark.parametrize("raw", [
    b"", b"null", b" null ", b"\xff\xfe", b'{"a":1', b'{"a":1},"status":"ERROR"', b"[" * 100_000, b'{"a":1}{"b":2}',
], ids=["empty", "null", "null with space", "no text", "cut off", "breaks out", "too deep", "two"])  # fmt: skip
def test_a_result_that_no_delivery_can_be_made_of(raw: bytes) -> None:
    answer = of_result(ID, ENDED, response(200, raw))
    assert (answer.kind, answer.body) == (Kind.UNUSABLE, None)


def test_a_result_that_tries_to_be_more_stays_a_payload() -> None:
    answer = of_result(ID, ENDED, response(200, {"status": "ERROR", "request_id": "another"}))
    event = parse(answer.body or b"")
    assert (event.request_id, event.status) == (ID, "completed")


@pytest.mark.parametrize("code", [400, 402, 409, 422])
def test_a_result_that_is_an_error_is_a_failure_with_its_details(code: int) -> None:
    """fal.md: a failed job polls as COMPLETED and fetching its result answers 4xx."""
    detail = [{"loc": ["body", "images_data_url"], "msg": "not enough images", "type": "value_error"}]
    answer = of_result(ID, ENDED, response(code, {"detail": detail}))
    assert answer.kind is Kind.FAILED
    assert json.loads(answer.body or b"") == {
        "request_id": ID, "gateway_request_id": ID, "status": "ERROR",
        "error": f"Invalid status code: {code}", "payload": {"detail": detail},
    }  # fmt: skip
    event = parse(answer.body or b"")
    assert event.status == "failed"
    assert event.error == f"Invalid status code: {code}: body.images_data_url: not enough images"


def test_an_error_that_is_no_json_is_told_in_its_words() -> None:
    answer = of_result(ID, {**ENDED, "error": "The runner was lost"}, response(500, b"<html>oops</html>"))
    assert answer.kind is Kind.FAILED
    assert json.loads(answer.body or b"")["payload"] == {"detail": "The runner was lost"}


@pytest.mark.parametrize("code", [404, 410])
def test_an_ended_job_whose_result_is_gone_is_not_a_failure(code: int) -> None:
    assert of_result(ID, ENDED, response(code, {"detail": "Not Found"})).kind is Kind.NOT_FOUND


@pytest.mark.parametrize("code", [404, 429, 500, 504])
def test_a_model_that_itself_answers_so_has_failed(code: int) -> None:
    by_status = of_result(
        ID, {**ENDED, "error": "x", "error_type": "y"}, response(code, {"detail": "gone wrong"})
    )
    by_header = of_result(
        ID, ENDED, response(code, {"detail": "x"}, **{"x-fal-error-type": "request_timeout"})
    )
    assert by_status.kind is by_header.kind is Kind.FAILED


@pytest.mark.parametrize("code", [500, 502, 503, 504])
def test_trouble_of_fal_is_not_a_failure_of_the_job(code: int) -> None:
    assert of_result(ID, ENDED, response(code, b"upstream connect error")).kind is Kind.UNAVAILABLE
