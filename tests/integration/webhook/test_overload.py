"""The API under senders that are slow, silent, many, or speak HTTP badly, over raw sockets."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from webhook_api.server import connection as limits

from tests.integration.webhook.test_intake_service import (
    IN_TIME,
    LIMIT,
    Lab,
    Parts,
    bucket,
    chunked,
    made_parts,
    parts,
    raw,
)
from tests.support.apiservice import BUSY, PATH, PATIENCE, running
from tests.support.falfake import SECRET, delivery
from tests.support.mediahost import media_host

__all__ = ["bucket", "parts"]
pytestmark = pytest.mark.backends
WAIT = 2.0
"""Seconds that a valid delivery may wait because of others, beside what this machine takes for it anyway."""
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-Webhook-Secret: {SECRET}\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def shared(
    database_url: str, redis_url: str, s3: Any, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("overload")
    with (
        made_parts(database_url, redis_url, s3, bucket, directory) as made,
        running(made.environment, directory / "api.log") as service,
    ):
        service.wait_health("healthy")
        yield made.lab(service)


@pytest.fixture
def lab(shared: Lab) -> Lab:
    """One service for all tests but those that change or end it: a busy one is the better test."""
    with psycopg.connect(shared.url) as connection:
        connection.execute("truncate webhook.deliveries cascade")
    return shared


def connect(lab: Lab, timeout: float = 30) -> socket.socket:
    return socket.create_connection(("127.0.0.1", lab.service.port), timeout=timeout)


def manual(request_id: str) -> bytes:
    body = json.dumps({"request_id": request_id, "status": "queued"}).encode()
    return f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def answers(connection: socket.socket, count: int = 1) -> list[tuple[int, dict[str, str], Any]]:
    """That many answers of a connection: status, headers in lower case, document."""
    found, data = [], b""
    while len(found) < count:
        while b"\r\n\r\n" not in data:
            data += _more(connection)
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        while len(data) < length:
            data += _more(connection)
        document = json.loads(data[:length]) if length else None
        data = data[length:]
        found.append((int(lines[0].split()[1]), headers, document))
    return found


def _more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise AssertionError("the connection ended without an answer")
    return part


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def refusal(lab: Lab, request: bytes) -> tuple[int, dict[str, str], Any]:
    with connect(lab) as connection:
        connection.sendall(request)
        return answers(connection)[0]


def slow(lab: Lab, stack: ExitStack, count: int, start: bytes) -> list[socket.socket]:
    connections = []
    for _ in range(count):
        connection = stack.enter_context(connect(lab))
        connection.sendall(start)
        connections.append(connection)
    return connections


def sent(lab: Lab) -> float:
    """Send a valid delivery until it is taken, as fal does; the seconds of the slowest answer."""
    deadline, slowest = time.monotonic() + PATIENCE, 0.0
    while True:
        status, document, seconds = lab.send()
        slowest = max(slowest, seconds)
        if status == 200:
            return slowest
        # Too many at once is what must not be said here.
        assert document["error"] in BUSY - {"busy"}, document
        assert time.monotonic() < deadline, document


def usual(lab: Lab) -> float:
    """Seconds of the slowest delivery while nobody is in the way."""
    return max(sent(lab) for _ in range(5))


def in_time(lab: Lab, alone: float, count: int = 20) -> None:
    for _ in range(count):
        assert sent(lab) < WAIT + alone


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"POST ",
        f"{HEAD}X-Slow: ".encode(),
        f"{HEAD}Content-Length: 500\r\n\r\n".encode() + b'{"request_id":',
        f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1f4\r\n".encode(),
        f"{HEAD}Content-Length: {LIMIT}\r\n\r\n".encode() + b" " * (LIMIT - 1),
    ],
    ids=["silent", "in the method", "in a header", "in the body", "in a chunk", "at the last byte"],
)
def test_slow_senders_keep_nobody_waiting(lab: Lab, start: bytes) -> None:
    alone = usual(lab)
    with ExitStack() as stack:
        connections = slow(lab, stack, 100, start)
        stop = threading.Event()

        def drip() -> None:
            while start and not stop.wait(0.2):
                for connection in connections[:50]:
                    # A head has its time, and on a busy machine this test may take longer.
                    with contextlib.suppress(OSError):
                        connection.send(
                            b"\r" if b"chunked" in start else b" "
                        ) if b"\r\n\r\n" not in start else None

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            in_time(lab, alone)
            assert lab.service.get("/health")[0] == 200
        finally:
            stop.set()
            dripping.join()


def test_slow_senders_are_given_up_in_time(lab: Lab) -> None:
    """Each of the ways to be slow ends with an answer or a closed connection, and no later than its limit."""
    starts = {
        "silent from the start": b"",
        "half a head": HEAD.encode(),
        "half a body": f"{HEAD}Content-Length: 500\r\n\r\n{{".encode(),
        "half a chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1f4\r\nabc".encode(),
    }
    began = time.monotonic()
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        dripping = pool.submit(_drip_a_head, lab)
        refused = pool.submit(_send_on_after_a_refusal, lab)
        connections = {name: slow(lab, stack, 1, start)[0] for name, start in starts.items()}
        assert ended(connections.pop("silent from the start"))
        for name, connection in connections.items():
            status, headers, document = answers(connection)[0]
            assert (status, document["error"], headers["connection"]) == (408, "read_timeout", "close"), name
            assert ended(connection)
        assert limits.HEAD_SECONDS - 1 < time.monotonic() - began < limits.HEAD_SECONDS + 8
        assert dripping.result() < limits.HEAD_SECONDS + 8
        assert refused.result() < limits.LINGER_SECONDS + 8
    assert lab.rows() == []


def _drip_a_head(lab: Lab) -> float:
    """Send a header that does not end; the seconds until nobody listens any more."""
    began = time.monotonic()
    with connect(lab) as connection:
        connection.sendall(HEAD.encode() + b"X-Slow: ")
        connection.settimeout(0.5)
        while time.monotonic() - began < 60:
            try:
                connection.sendall(b"x")
                if connection.recv(65536):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    return time.monotonic() - began


def _send_on_after_a_refusal(lab: Lab) -> float:
    """fal.md, body over the limit: 413 is heard although the body is still on its way; and not for ever."""
    with connect(lab) as connection:
        connection.sendall(f"{HEAD}Content-Length: 900000000\r\n\r\n".encode())
        assert answers(connection)[0][0] == 413
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 60:
                connection.sendall(b"x" * 65536)
                time.sleep(0.01)
    return time.monotonic() - began


def test_a_client_that_reads_no_answers_holds_nobody(lab: Lab) -> None:
    alone = usual(lab)
    with connect(lab) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(3)
        request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
        try:
            for _ in range(400):
                connection.sendall(request)
        except TimeoutError:
            pass
        in_time(lab, alone)


def test_more_connections_than_are_held_push_out_the_slowest(parts: Parts, tmp_path: Path) -> None:
    with running(parts.environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        lab.recovers()
        alone = usual(lab)
        with ExitStack() as stack:
            slow(lab, stack, 1100, HEAD.encode())
            # An idle connection goes first, and the client's may be going just now; a new one comes after all of these.
            lab.service.http.clear()
            in_time(lab, alone)


def test_too_much_at_once_is_a_fast_503(parts: Parts, tmp_path: Path) -> None:
    """The table is locked, so nothing gets stored: whoever comes has an answer in time, whatever it is."""
    with running(parts.environment | {"WEBHOOK_THREADS": "4"}, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        lab.recovers()
        with psycopg.connect(lab.url) as blocker, ThreadPoolExecutor(200) as pool:
            blocker.execute("lock table webhook.deliveries in access exclusive mode")
            for status, document, _ in pool.map(lambda _: lab.send(), range(200)):
                assert status == 503, document
            service.answered_within(IN_TIME)
            assert service.get("/health")[1]["status"] in {"healthy", "degraded", "unhealthy"}
            service.answered_within(IN_TIME, "status.health")
        lab.recovers()


def test_requests_in_one_piece_are_answered_in_order(lab: Lab) -> None:
    with connect(lab) as connection:
        connection.sendall(
            manual("one") + manual("two") + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + manual("three")
        )
        found = answers(connection, 4)
    assert [document.get("request_id", "page") for _, _, document in found] == ["one", "two", "page", "three"]
    assert sorted(lab.rows()) == ["one", "three", "two"]


def test_a_request_in_single_bytes_is_taken(lab: Lab) -> None:
    with connect(lab) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in manual("single"):
            connection.send(bytes([byte]))
        assert answers(connection)[0][0] == 200
    assert lab.rows() == ["single"]


def test_a_connection_is_kept_or_ended_as_the_sender_says(lab: Lab) -> None:
    with connect(lab) as connection:
        for number in range(3):
            connection.sendall(manual(f"kept-{number}"))
            status, headers, _ = answers(connection)[0]
            assert (status, headers["connection"]) == (200, "keep-alive")
        connection.sendall(manual("last").replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n"))
        status, headers, _ = answers(connection)[0]
        assert (status, headers["connection"]) == (200, "close")
        assert ended(connection)
    with connect(lab) as connection:
        connection.sendall(manual("old").replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert answers(connection)[0][1]["connection"] == "close"
        assert ended(connection)
    assert len(lab.rows()) == 5


def test_a_sender_that_asks_first_hears_continue_or_the_refusal(lab: Lab) -> None:
    body = b'{"request_id":"asked","status":"queued"}'
    with connect(lab) as connection:
        connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answers(connection)[0][0] == 200
    with connect(lab) as connection:
        connection.sendall(f"{HEAD}Expect: 100-continue\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
        status, headers, document = answers(connection)[0]
        assert (status, document["error"], headers["connection"]) == (413, "too_large", "close")


def _chunks(text: str) -> bytes:
    return f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{text}".encode()


MALFORMED: list[tuple[str, bytes, int, str]] = [
    ("no length", f"{HEAD}\r\n".encode(), 411, "length_required"),
    ("over the limit", f"{HEAD}Content-Length: {LIMIT + 1}\r\n\r\n".encode(), 413, "too_large"),
    ("gzip", f"{HEAD}Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{{}}".encode(), 415, "content_encoding"),
    ("two lengths", f"{HEAD}Content-Length: 2\r\nContent-Length: 3\r\n\r\n{{}}".encode(), 400, "bad_request"),
    ("negative length", f"{HEAD}Content-Length: -2\r\n\r\n{{}}".encode(), 400, "bad_request"),
    ("signed length", f"{HEAD}Content-Length: +2\r\n\r\n{{}}".encode(), 400, "bad_request"),
    ("endless length", f"{HEAD}Content-Length: {'9' * 40}\r\n\r\n{{}}".encode(), 400, "bad_request"),
    ("length and chunks",
     f"{HEAD}Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), 400, "bad_request"),
    ("another coding", f"{HEAD}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".encode(), 501, "transfer_coding"),
    ("a chunk without a size", _chunks("zz\r\nab\r\n0\r\n\r\n"), 400, "bad_request"),
    ("a chunk that is longer", _chunks("2\r\nabcd\r\n0\r\n\r\n"), 400, "bad_request"),
    ("a negative chunk", _chunks("-2\r\nab\r\n0\r\n\r\n"), 400, "bad_request"),
    ("an endless chunk", _chunks(f"{'f' * 40}\r\nab"), 400, "bad_request"),
    ("chunks over the limit", _chunks(f"{LIMIT:x}\r\n{'x' * LIMIT}\r\n1\r\nx\r\n0\r\n\r\n"), 413, "too_large"),
    ("a long target", b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
    ("many headers", HEAD.encode() + b"X: y\r\n" * 80 + b"\r\n", 431, "headers_too_large"),
    ("a large header", HEAD.encode() + b"X: " + b"y" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
    ("endless headers", HEAD.encode() + b"X: " + b"y" * 100_000, 431, "headers_too_large"),
    ("an expectation", f"{HEAD}Expect: wonders\r\nContent-Length: 2\r\n\r\n{{}}".encode(), 417, "expectation"),
    ("another method", b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request"),
    ("another version", b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 400, "bad_request"),
    ("the next protocol", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
    ("an upgrade",
     f"{HEAD}Upgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 2\r\n\r\n{{}}".encode(), 400, "bad_request"),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request"),
    ("bare line feeds", b"GET / HTTP/1.1\nHost: x\n\n", 400, "bad_request"),
    ("a folded header", b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", 400, "bad_request"),
    ("a space in a name", b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400, "bad_request"),
    ("NUL in a header", b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400, "bad_request"),
    ("two hosts", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "bad_request"),
    ("not ASCII in the target", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request"),
]  # fmt: skip


def test_what_is_not_http_is_refused_in_the_one_shape(lab: Lab) -> None:
    for name, request, status, reason in MALFORMED:
        found, headers, document = refusal(lab, request)
        assert (found, document["error"]) == (status, reason), (name, document)
        assert set(document) == {"error", "message", "request_id"}, name
        assert headers["content-type"] == "application/json", name
        assert headers["x-request-id"] == document["request_id"], name
    assert lab.rows() == []
    lab.accept()


def test_a_chunked_body_up_to_the_limit_is_taken_whole(lab: Lab) -> None:
    """fal.md 12: a chunked body is never cut off, and the limit holds to the byte."""
    start = b'{"request_id":"whole","status":"queued","x":"'
    body = start + b"x" * (LIMIT - len(start) - 2) + b'"}'
    assert raw(lab, chunked(body)).startswith(b"HTTP/1.1 200")
    assert raw(lab, chunked(body.replace(b"whole", b"wider") + b" ")).startswith(b"HTTP/1.1 413")
    with psycopg.connect(lab.url) as connection:
        stored = connection.execute("select request_id, body from webhook.deliveries").fetchall()
    assert stored == [("whole", body)]


def test_a_sender_that_ends_too_early_hears_so_and_leaves_nothing(lab: Lab) -> None:
    for start in (f"{HEAD}Content-Length: 500\r\n\r\n", f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1f4\r\n"):
        with connect(lab) as connection:
            connection.sendall(start.encode() + b'{"request_id":"half","status":"queued"}')
            connection.shutdown(socket.SHUT_WR)
            status, _, document = answers(connection)[0]
            assert (status, document["error"]) == (400, "incomplete_body")
    assert lab.rows() == []


def test_nothing_is_downloaded_before_the_answer(lab: Lab) -> None:
    """fal.md 9: a media host that hangs keeps no delivery waiting, because nobody asks it."""
    alone = usual(lab)
    with media_host() as media:
        made = delivery("portrait-ok", lab.key, media=f"http://{media.address}")
        status, document, seconds, _ = lab.service.deliver(made.body, made.headers)
        assert status == 200, document
        assert seconds < WAIT + alone
        assert media.requests == []


def test_trailers_say_nothing_about_a_request(lab: Lab) -> None:
    body = b'{"request_id":"t","status":"queued"}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    request = head.encode() + b"%x\r\n%s\r\n0\r\nX-Webhook-Secret: %s\r\n\r\n" % (
        len(body),
        body,
        SECRET.encode(),
    )
    assert refusal(lab, request)[2]["error"] == "missing_credentials"
    assert lab.rows() == []


def test_a_header_with_an_underscore_stands_for_no_other(lab: Lab) -> None:
    body = b'{"request_id":"u","status":"queued"}'
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX_Webhook_Secret: {SECRET}\r\nContent-Length: {len(body)}\r\n\r\n"
    assert refusal(lab, head.encode() + body)[2]["error"] == "missing_credentials"


def test_bodies_that_do_not_fit_together_are_refused_at_once(parts: Parts, tmp_path: Path) -> None:
    """Thirty senders hold 3 MB each without ending: the room is 64 MB, so some hear 503 and the others wait on."""
    environment = parts.environment | {"WEBHOOK_BODY_LIMIT_BYTES": "4000000"}
    with running(environment, tmp_path / "api.log") as service:
        lab = parts.lab(service)
        lab.recovers()
        alone = usual(lab)
        start = f"{HEAD}Content-Length: 4000000\r\n\r\n".encode() + b" " * 3_000_000
        with ExitStack() as stack, ThreadPoolExecutor(30) as pool:
            connections = [stack.enter_context(connect(lab)) for _ in range(30)]
            # All at once: one after the other, the last one's turn may come after the first one was given up for silent.
            list(pool.map(lambda connection: connection.sendall(start), connections))
            answered: list[socket.socket] = []

            def refused() -> bool:
                answered[:] = select.select(connections, [], [], 0)[0]
                # Those that are not refused go on: what the refused ones had sent takes their room no more.
                for connection in set(connections) - set(answered):
                    with contextlib.suppress(OSError):
                        connection.sendall(b" ")
                return len(answered) >= 5

            service.wait_for(refused, "some are refused", 30)
            assert len(answered) <= 15
            assert {answers(connection)[0][2]["error"] for connection in answered} == {"busy"}
            in_time(lab, alone, 5)


def test_idle_connections_do_not_hold_up_a_stop(parts: Parts, tmp_path: Path) -> None:
    with running(parts.environment, tmp_path / "api.log") as service, ExitStack() as stack:
        lab = parts.lab(service)
        slow(lab, stack, 20, b"")
        kept = stack.enter_context(connect(lab))
        kept.sendall(manual("kept"))
        assert answers(kept)[0][0] == 200
        began = time.monotonic()
        stopping = ThreadPoolExecutor(1).submit(lab.service.stop)
        lab.service.wait_for(lambda: _closed_or_answered(kept), "a stopping service answers and then closes")
        assert stopping.result(30) == 0
        assert time.monotonic() - began < 15


def _closed_or_answered(connection: socket.socket) -> bool:
    try:
        connection.sendall(manual("late"))
        status, headers, _ = answers(connection)[0]
    except (OSError, AssertionError):
        return True
    assert status == 200
    return headers["connection"] == "close"


def test_signed_deliveries_come_through_while_a_thousand_requests_are_refused(lab: Lab) -> None:
    forged = delivery("forged", lab.key)
    alone = usual(lab)
    status: Callable[[Any], int] = lambda _: lab.service.post(forged.body, forged.headers)[0]  # noqa: E731
    with ThreadPoolExecutor(40) as pool:
        refused = pool.map(status, range(1000))
        in_time(lab, alone, 30)
        assert set(refused) <= {401, 503}
