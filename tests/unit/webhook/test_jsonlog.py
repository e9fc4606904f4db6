"""Logs: one JSON object a line, whatever is logged, and nothing that must not stand in it."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from webhook_api.jsonlog import REQUEST_ID, JsonFormatter


def line(
    message: str = "event", level: int = logging.INFO, exc_info: Any = None, **extra: Any
) -> dict[str, Any]:
    logger = logging.getLogger("test")
    record = logger.makeRecord("test", level, "f", 1, message, (), exc_info, extra=extra)
    text = JsonFormatter(instance="i-1").format(record)
    assert "\n" not in text
    document: dict[str, Any] = json.loads(text)
    return document


def test_the_fields_of_a_line() -> None:
    token = REQUEST_ID.set("req-1")
    try:
        entry = line("delivery_stored", delivery_id=7)
    finally:
        REQUEST_ID.reset(token)
    assert entry["event"] == "delivery_stored"
    assert (entry["level"], entry["logger"], entry["instance"]) == ("info", "test", "i-1")
    assert (entry["request_id"], entry["delivery_id"]) == ("req-1", 7)
    assert entry["ts"].endswith("+00:00")


@pytest.mark.parametrize("name", ["secret", "X_Webhook_Secret", "db_password", "body", "payload", "Authorization",
                                  "minio_access_key", "database_url"])  # fmt: skip
def test_what_a_name_gives_away_is_withheld(name: str) -> None:
    assert line(**{name: "hunter2"})[name] == "[withheld]"


def test_sizes_and_digests_are_no_secrets() -> None:
    assert line(body_bytes=7, body_sha256="ab")["body_bytes"] == 7


def test_bytes_and_long_texts_are_cut() -> None:
    assert line(raw=b"x" * 9)["raw"] == "[9 bytes withheld]"
    assert len(line("x" * 100_000)["event"]) < 5000


def test_an_exception_is_one_field() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        entry = line(exc_info=(type(error), error, error.__traceback__))
    assert "ValueError" in entry["exception"]


def test_line_breaks_cannot_forge_a_line() -> None:
    assert line('a\n{"level":"info"}')["event"].startswith("a\n")
