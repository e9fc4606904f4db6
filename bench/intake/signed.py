"""Requests that are signed before a run: unique ids, valid signatures, as the bytes that go over the wire."""

from __future__ import annotations

import struct
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nacl.signing import SigningKey
from webhook_api.auth.signing import sign
from webhook_api.shapes import SHAPES

ACCOUNT = "aisha-dev"
"""The account of a development site."""
PATH = "/api/v1/avatar/status_update"
_LENGTH = struct.Struct("<I")


def write(path: Path, key: SigningKey, count: int, headers: dict[str, str]) -> None:
    """Write `count` requests, each behind its length."""
    build = SHAPES["portrait-ok"].build
    with path.open("wb") as stream:
        for _ in range(count):
            request_id = str(uuid.uuid4())
            request = one(key, build(request_id, "https://v3.fal.media"), request_id, headers)
            stream.write(_LENGTH.pack(len(request)) + request)


def one(key: SigningKey, body: bytes, request_id: str, headers: dict[str, str]) -> bytes:
    """The bytes of one signed request."""
    named = {
        **headers,
        "User-Agent": "python-httpx/0.28.1",
        "Accept": "*/*",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **sign(key, request_id, ACCOUNT, int(time.time()), body),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + body


def read(path: Path) -> Iterator[bytes]:
    """The requests of a file."""
    data = path.read_bytes()
    position = 0
    while position < len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        yield data[position : position + length]
        position += length
