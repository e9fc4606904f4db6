"""Logs into a pipe that nobody reads for a while: no line waits, none is torn, and what is lost is told."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator

import pytest
from webhook_api import logpipe
from webhook_api.logpipe import PipeHandler, handler_for

TEXT = "x" * 990


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def log(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.LogRecord("test", logging.INFO, "f", 1, text, (), None))


def read(descriptor: int) -> bytes:
    found = b""
    try:
        while part := os.read(descriptor, 1 << 20):
            found += part
    except BlockingIOError:
        pass
    return found


def numbered(first: int, last: int) -> list[str]:
    return [f"{number:06d} {TEXT}" for number in range(first, last)]


def test_nothing_waits_and_nothing_is_lost_within_the_bound(pipe: tuple[int, int]) -> None:
    """A second of a busy instance is 1,000 lines; a pipe as it is made holds 64."""
    handler = PipeHandler(pipe[1])
    lines = numbered(0, 1800)
    for line in lines:
        log(handler, line)  # the test's own timeout is what would tell that one waited
    found = read(pipe[0]).decode()
    handler.flush()
    found += read(pipe[0]).decode()
    assert found.splitlines() == lines


def test_beyond_the_bound_the_oldest_go_and_that_is_told(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logpipe, "PIPE_BYTES", 65536)
    monkeypatch.setattr(logpipe, "KEPT_BYTES", 100_000)
    handler = PipeHandler(pipe[1])
    lines = numbered(0, 500)
    for line in lines:
        log(handler, line)
    found = b""
    while part := read(pipe[0]):
        found += part
        handler.flush()
    *arrived, told = found.decode().splitlines()
    assert json.loads(told) == {
        "level": "warning",
        "logger": "webhook_api.logpipe",
        "event": "log_lines_dropped",
        "lines": len(lines) - len(arrived),
    }
    assert 0 < len(arrived) < len(lines)
    assert arrived == [line for line in lines if line in arrived], "in order, and none of them torn"
    assert arrived[-1] == lines[-1]


def test_a_long_line_is_whole(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logpipe, "PIPE_BYTES", 4096)
    handler = PipeHandler(pipe[1])
    line = "".join(chr(97 + number % 26) for number in range(50_000))
    log(handler, line)
    found = b""
    for _ in range(100):
        found += read(pipe[0])
        handler.flush()
    assert found.decode() == line + "\n"


def test_a_file_or_a_stream_without_descriptor_gets_the_usual_handler(pipe: tuple[int, int]) -> None:
    assert type(handler_for(io.StringIO())) is logging.StreamHandler
    with open(os.devnull, "w") as null:
        assert type(handler_for(null)) is logging.StreamHandler
    with os.fdopen(os.dup(pipe[1]), "w") as stream:
        assert isinstance(handler_for(stream), PipeHandler)
