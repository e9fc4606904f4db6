"""Sends deliveries for ``webhook-api send``: many at once, one JSON object a result."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, dataclass
from http import client as http_client
from pathlib import Path
from typing import Any, Final

import urllib3

from webhook_api.shapes import Credentials, Outgoing, Shape, outgoing

TIMEOUT = urllib3.Timeout(connect=5.0, read=15.0)
"""fal gives a receiver 15 s as well."""
CHUNK: Final = 65_536
MAX_ANSWER: Final = 1_048_576
"""Bytes of an answer that are read."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one request."""

    shape: str
    request_id: str
    http_status: int | None
    """None: no answer came."""
    as_expected: bool
    milliseconds: float
    answer: Any = None
    error: str | None = None

    def as_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=True)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send and where."""

    url: str
    shape: Shape
    credentials: Credentials
    media: str
    request_id: str | None = None
    """None: each request gets an id of its own."""
    request_id_prefix: str = "send-"
    count: int = 1
    concurrency: int = 1
    expect: int | None = None
    """None: what the shape says."""


def http_pool(concurrency: int, *, insecure: bool, ca: Path | None) -> urllib3.PoolManager:
    """Return a pool that trusts the system's CAs, or ``ca``, or (``insecure``) anyone."""
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return urllib3.PoolManager(maxsize=concurrency, ssl_context=context, timeout=TIMEOUT)


def send_all(plan: Plan, http: urllib3.PoolManager) -> Iterator[Result]:
    """Send and yield results as they come. Raises ShapeError before anything is sent."""
    shared = plan.request_id or (_new_id(plan) if plan.shape.same_id else None)
    first = _prepare(plan, shared)
    # Only a few at a time are built: a thousand large bodies would not fit into memory. Signed just before it is sent,
    # none grows stale in the queue either.
    todo = itertools.chain([first], (None for _ in range(plan.count - 1)))
    with ThreadPoolExecutor(plan.concurrency) as pool:
        running: set[Future[Result]] = set()
        for request in todo:
            running.add(pool.submit(_send, plan, http, request, shared))
            if len(running) >= 2 * plan.concurrency:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in as_completed(running):
            yield future.result()


def _new_id(plan: Plan) -> str:
    return f"{plan.request_id_prefix}{uuid.uuid4()}"


def _prepare(plan: Plan, shared: str | None) -> Outgoing:
    return outgoing(plan.shape, plan.credentials, shared or _new_id(plan), plan.media)


def _send(plan: Plan, http: urllib3.PoolManager, given: Outgoing | None, shared: str | None) -> Result:
    request = given or _prepare(plan, shared)
    started = time.perf_counter()
    status, answer, error = None, None, None
    try:
        status, data = _TRANSPORTS[request.transport](plan.url, http, request)
        answer = _read(data)
    except (urllib3.exceptions.HTTPError, http_client.HTTPException, OSError) as fault:
        error = f"{type(fault).__name__}: {fault}"[:300]
    expected = (plan.expect,) if plan.expect is not None else (plan.shape.expect, *plan.shape.also)
    milliseconds = round((time.perf_counter() - started) * 1000, 1)
    return Result(
        plan.shape.name, request.request_id, status, status in expected, milliseconds, answer, error
    )


def _plain(url: str, http: urllib3.PoolManager, request: Outgoing) -> tuple[int, bytes]:
    response = http.request(
        "POST", url, body=request.body, headers=request.headers, retries=False, redirect=False
    )
    return response.status, response.data


def _chunked(url: str, http: urllib3.PoolManager, request: Outgoing) -> tuple[int, bytes]:
    """As fal never does it, but a proxy may: no length, pieces instead."""
    size = max(1, min(CHUNK, len(request.body) // 3))
    pieces = (request.body[start : start + size] for start in range(0, len(request.body), size))
    response = http.request(
        "POST", url, body=pieces, headers=request.headers, retries=False, redirect=False, chunked=True
    )
    return response.status, response.data


def _truncated(url: str, http: urllib3.PoolManager, request: Outgoing) -> tuple[int | None, bytes]:
    """Declare the whole length, send half of it, and end: the sender died in the middle."""
    with contextlib.closing(_connect(url, http)) as connection:
        connection.putrequest("POST", urllib3.util.parse_url(url).request_uri)
        for name, value in {**request.headers, "Content-Length": str(len(request.body))}.items():
            connection.putheader(name, value)
        connection.endheaders(request.body[: len(request.body) // 2])
        assert connection.sock is not None  # noqa: S101  (endheaders has connected)
        # Below TLS as well: no close_notify, as when a process is killed.
        socket.socket.shutdown(connection.sock, socket.SHUT_WR)
        try:
            response = connection.getresponse()
            return response.status, response.read(MAX_ANSWER)
        except (http_client.HTTPException, OSError):
            return None, b""


def _connect(url: str, http: urllib3.PoolManager) -> http_client.HTTPConnection:
    parts = urllib3.util.parse_url(url)
    host, timeout = (parts.host or "").strip("[]"), TIMEOUT.read_timeout
    if parts.scheme == "https":
        context = http.connection_pool_kw["ssl_context"]
        return http_client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)
    return http_client.HTTPConnection(host, parts.port, timeout=timeout)


_TRANSPORTS: Final = {"plain": _plain, "huge": _plain, "chunked": _chunked, "truncated": _truncated}


def _read(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data[:300].decode("utf-8", "replace")
