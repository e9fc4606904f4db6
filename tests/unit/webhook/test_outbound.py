"""Calls to servers of others: where they go, how long they take, what they leave behind, and what they say of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from webhook_api.outbound import MAX_ANSWER, NotSent, Outbound, Place, read_place, read_retry_after
from webhook_api.states import EffectError, Failure

from tests.support.recorded_server import Answer, Recorded, Route, serve

SECRET = "/bot12345:hunter2/sendMessage"


def recorded(routes: dict[str, Route]) -> AbstractContextManager[Recorded]:
    return serve(Recorded(routes))


def outbound(url: str, seconds: float = 10.0, slots: int = 1, **more: object) -> Outbound:
    place = read_place(url, frozenset({url.split("/")[2]}))
    return Outbound("forward", place, threading.BoundedSemaphore(slots), seconds=seconds, **more)  # type: ignore[arg-type]


def failed(call: Callable[[], object]) -> EffectError:
    with pytest.raises(EffectError) as caught:
        call()
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def test_it_posts_what_it_was_given_and_nothing_else() -> None:
    with recorded({"POST /in?a=b": Answer(202, b"thanks")}) as server:
        place = read_place(f"{server.url}/in?a=b", frozenset({server.url[7:]}))
        answer = outbound(server.url).post(place.path, b"body", {"Content-Type": "text/plain", "X-Own": "1"})
    assert (answer.status, answer.body, answer.good) == (202, b"thanks", True)
    (asked,) = server.asked
    assert asked.body == b"body"
    assert {name.lower() for name in asked.headers} == {
        "host", "content-length", "accept-encoding", "connection", "content-type", "x-own",
    }  # fmt: skip


@pytest.mark.parametrize("status", [301, 307, 308, 400, 410, 500])
def test_every_answer_is_an_answer_and_no_redirect_is_followed(status: int) -> None:
    with recorded({"POST /": Answer(status, b"no", {"Location": "/elsewhere"})}) as server:
        answer = outbound(server.url).post("/", b"", {})
    assert (answer.status, answer.good) == (status, False)
    assert [asked.path for asked in server.asked] == ["/"]


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:10.0.0.1"], ["100.64.0.1"], ["169.254.169.254"]],
)
def test_an_inner_address_is_refused_unless_it_is_listed(addresses: list[str]) -> None:
    place = read_place("https://hooks.example/hunter2", frozenset())
    sender = Outbound("forward", place, threading.BoundedSemaphore(), resolver=lambda _host, _port: addresses)
    error = failed(lambda: sender.post(place.path, b"", {}))
    assert isinstance(error, NotSent)
    assert (error.kind, error.reason) == (Failure.UNREACHABLE, "forward_address_refused")
    assert "hooks.example:443" in str(error)


def test_a_server_that_hangs_costs_its_timeout_and_then_nothing() -> None:
    gate = threading.Event()

    def hang(_asked: object) -> Answer:
        gate.wait(60)
        return Answer()

    with recorded({f"POST {SECRET}": hang}) as server:
        sender = outbound(server.url, seconds=1, clock=lambda: 0.0)
        started = time.monotonic()
        error = failed(lambda: sender.post(SECRET, b"x", {}))
        assert time.monotonic() - started < 40
        gate.set()
    assert error.reason == "forward_timeout"
    assert not isinstance(error, NotSent), "it may have been taken"
    assert error.kind is Failure.UNREACHABLE
    refused = failed(lambda: sender.post(SECRET, b"x", {}))
    assert (refused.reason, isinstance(refused, NotSent)) == ("forward_unavailable", True)


def test_a_closed_port_and_an_unknown_name_were_never_reached() -> None:
    for url in ("http://127.0.0.1:9", "http://nowhere.invalid:80"):
        error = failed(lambda at=url: outbound(at).post(SECRET, b"x", {}))  # type: ignore[misc]
        assert isinstance(error, NotSent)
        assert error.kind is Failure.UNREACHABLE


def test_who_finds_no_slot_does_not_wait_for_long() -> None:
    slots = threading.BoundedSemaphore(1)
    place = Place(False, "127.0.0.1", 9, "/", True)
    sender = Outbound("forward", place, slots)
    assert slots.acquire(blocking=False)
    started = time.monotonic()
    assert failed(lambda: sender.post("/", b"", {})).reason == "forward_busy"
    assert time.monotonic() - started < 10
    slots.release()
    assert failed(lambda: sender.post("/", b"", {})).reason == "forward_unreachable"
    assert slots.acquire(blocking=False), "the slot was given back"


def test_a_stopping_worker_waits_for_nobody() -> None:
    stop, gate = threading.Event(), threading.Event()

    def hang(_asked: object) -> Answer:
        stop.set()
        gate.wait(60)
        return Answer()

    with recorded({"POST /": hang}) as server:
        started = time.monotonic()
        error = failed(lambda: outbound(server.url, seconds=60).post("/", b"", {}, stop.is_set))
        assert time.monotonic() - started < 40
        gate.set()
    assert error.kind is Failure.INTERRUPTED


def test_a_server_that_asks_to_be_left_alone_is_by_every_delivery() -> None:
    now = 100.0
    with recorded({"POST /": Answer(429, b"", {"Retry-After": "60"})}) as server:
        sender = outbound(server.url, clock=lambda: now)
        assert sender.post("/", b"", {}).retry_after == 60
        error = failed(lambda: sender.post("/", b"", {}))
        assert (error.reason, error.wait) == ("forward_asked_to_wait", 60)
        now += 61
        sender.post("/", b"", {})
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0), ("120", 120), ("999999999999", 3600), ("-1", None), ("1.5", None), ("soon", None), ("", None),
        (None, None), ("Thu, 01 Jan 1970 00:16:50 GMT", 10), ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600), ("²", None),
    ],
)  # fmt: skip
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert read_retry_after(value, 1000.0) == seconds


def test_an_endless_answer_is_not_read_to_its_end() -> None:
    with recorded({"POST /": Answer(200, b"x" * (MAX_ANSWER * 4))}) as server:
        assert len(outbound(server.url).post("/", b"", {}).body) == MAX_ANSWER


def test_an_answer_before_the_body_was_read_counts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                client.shutdown(socket.SHUT_WR)
                while client.recv(1_000_000):
                    pass

        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        sender = outbound(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert sender.post("/", b"x" * 20_000_000, {}).status == 401
        thread.join(30)


def test_a_place_shows_no_path() -> None:
    place = read_place("https://example.net/hunter2?hunter2", frozenset())
    assert "hunter2" not in f"{place} {place!r}"
    assert str(read_place("https://example.net:8443/x", frozenset())) == "https://example.net:8443"
