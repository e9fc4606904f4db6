"""Reading requests: however the bytes are cut into pieces, they amount to the same, and nothing grows without bound."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webhook_api.server import request as module
from webhook_api.server.request import Fault, Headers, Reader

from tests.support.properties import examples

LIMIT = 1000


def gate(method: str, target: str, headers: Headers) -> int | Fault | None:
    if target == "/turned-away":
        return None
    return Fault("length_required", "no length") if target == "/fault" else LIMIT


def outcome(pieces: list[bytes]) -> Any:
    """What a reader makes of pieces, fed as the worker feeds them: no further after a fault or a refusal."""
    reader = Reader(gate)
    for piece in pieces:
        if reader.fault is None and not reader.turned_away:
            reader.feed(piece)
    requests = [
        (
            r.method,
            r.target,
            r.version,
            r.headers.values,
            b"" if r.refused else r.body,
            r.keep_alive,
            r.refused,
        )
        for r in reader.ready
    ]
    return requests, reader.fault.reason if reader.fault else None


SIMPLE = b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nX-One: 1\r\nX-ONE: 2\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"POST /c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;ext=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: forged\r\n\r\n"
)
MESSAGES = {
    "simple": SIMPLE,
    "chunked": CHUNKED,
    "several": SIMPLE + CHUNKED + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + SIMPLE,
    "old": b"GET / HTTP/1.0\r\n\r\n",
    "closing": SIMPLE.replace(b"Host: x", b"Host: x\r\nConnection: close"),
    "at the limit": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"x" * LIMIT,
    "over the limit": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3E9\r\n"
    + b"x" * 1001,
    "a chunk that announces too much": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2;a=b\r\nab\r\n3E7;ext\r\nabc",
    "chunks up to the limit": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n\r\n\r\n3E6;a=b\r\n" + b"\n" * 998 + b"\r\n0\r\n\r\n",
    "turned away": b"POST /turned-away HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    "a fault of the gate": b"POST /fault HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "both ways": b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad chunk": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two types": b"POST / HTTP/1.1\r\nContent-Type: a\r\nContent-Type: b\r\nContent-Length: 0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "an upgrade": b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    "a long target": b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 61 + b"\r\n",
}


@pytest.mark.parametrize("name", MESSAGES)
@examples(60)
@given(data=st.data())
def test_pieces_amount_to_the_whole(name: str, data: st.DataObject) -> None:
    message = MESSAGES[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(message)), max_size=12)))
    pieces = [message[a:b] for a, b in zip([0, *cuts], [*cuts, len(message)], strict=True) if a < b]
    assert outcome(pieces) == outcome([message])


def test_what_the_messages_amount_to() -> None:
    requests, fault = outcome([MESSAGES["several"]])
    assert fault is None
    assert [r[1] for r in requests] == ["/a?b=c", "/c", "/", "/a?b=c"]
    assert requests[0][3]["x-one"] == "1,2"
    assert requests[1][4] == b"abc0123456789"
    assert "x-trailer" not in requests[1][3]
    assert [r[5] for r in requests] == [True] * 4
    assert outcome([MESSAGES["old"]])[0][0][5] is False
    assert outcome([MESSAGES["closing"]])[0][0][5] is False
    assert len(outcome([MESSAGES["at the limit"]])[0][0][4]) == LIMIT
    assert outcome([MESSAGES["turned away"]])[0][0][6] is True
    faults = {name: outcome([message])[1] for name, message in MESSAGES.items()}
    assert {name: fault for name, fault in faults.items() if fault} == {
        "over the limit": "too_large", "a chunk that announces too much": "too_large",
            "a fault of the gate": "length_required", "two lengths": "bad_request",
        "both ways": "bad_request", "a bad chunk": "bad_request", "two types": "bad_request", "no HTTP": "bad_request",
        "an upgrade": "bad_request", "a long target": "uri_too_long", "many headers": "headers_too_large",
    }  # fmt: skip


@examples(300)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_are_a_defect(pieces: list[bytes]) -> None:
    assert outcome(pieces)[1] != "internal"


@examples(200)
@given(st.binary(max_size=60), st.integers(0, len(SIMPLE) + len(CHUNKED)))
def test_no_bytes_in_the_middle_are_a_defect(noise: bytes, at: int) -> None:
    message = SIMPLE + CHUNKED
    assert outcome([message[:at], noise, message[at:]])[1] != "internal"


@pytest.mark.parametrize("piece", [b"X: " + b"y" * 997 + b"\r\n", b"y" * 1000])
def test_a_head_that_does_not_end_is_not_kept(piece: bytes) -> None:
    reader = Reader(gate)
    reader.feed(b"GET / HTTP/1.1\r\nX-Long: ")
    fed = 0
    while reader.fault is None:
        reader.feed(piece)
        fed += len(piece)
        assert fed <= 2 * module.MAX_HEAD
    assert reader.fault.reason == "headers_too_large"


def test_a_body_that_does_not_end_is_not_kept() -> None:
    reader = Reader(gate)
    reader.feed(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(20):
        if reader.fault is None:
            reader.feed(b"64\r\n" + b"x" * 100 + b"\r\n")
            assert reader.buffered <= LIMIT + 100
    assert reader.fault is not None
    assert reader.fault.reason == "too_large"


@pytest.mark.parametrize("cut", range(61, 75))
def test_a_chunk_is_refused_for_what_it_announces(cut: int) -> None:
    """Its bytes never come: without this its sender was waited for, and told that it had been too slow."""
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0003E7;x=y\r\nb"
    reader = Reader(gate)
    for piece in (data[:cut], data[cut:]):
        reader.feed(piece)
    assert reader.fault is not None
    assert reader.fault.reason == "too_large"
    assert not reader.ready


def test_the_name_of_a_request_stands_in_its_fault() -> None:
    reader = Reader(gate)
    reader.feed(b"POST / HTTP/1.1\r\nX-Request-Id: edge-7\r\nContent-Length: zwei\r\n\r\n")
    assert reader.fault is not None
    assert reader.fault.request_id == "edge-7"


@pytest.mark.parametrize("refused_by", ["the worker", "the limit", "the parser"])
def test_what_a_refused_sender_had_sent_is_let_go(refused_by: str) -> None:
    """It would take the room of others for as long as its sender is told."""
    reader = Reader(gate)
    reader.feed(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1F4\r\n" + b"x" * 500 + b"\r\n"
    )
    assert reader.buffered == 500
    if refused_by == "the worker":
        reader.refuse(Fault("busy", "come again"))
    else:
        reader.feed(b"1F5\r\n" + b"x" * 501 if refused_by == "the limit" else b"no chunk\r\n")
    assert reader.fault is not None
    assert reader.buffered == 0
    reader.feed(b"x" * 100)
    assert reader.buffered == 0
