"""The quick way of ordinary deliveries: past Flask, and in batches to the inbox.

It takes what the ordinary way would accept, by the same functions, and gives the same answer, metrics and log line. It
refuses nothing: whatever it does not take at once goes the ordinary way, which decides. So both can differ only in
speed (tests/unit/webhook/test_quick.py compares them).

``take``, ``flush`` and ``finished`` belong to the loop's thread and never wait; one thread commits what was taken.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from webhook_api import acceptance, errors, intake, tracing
from webhook_api.auth import AuthError, Headers
from webhook_api.bodies import BodyError
from webhook_api.db import INTAKE_DEADLINE, DatabaseUnavailable
from webhook_api.errors import Refusal
from webhook_api.inbox import Delivery, Stored
from webhook_api.jsonlog import REQUEST_ID, request_id_of
from webhook_api.metrics import REQUESTS, STORE
from webhook_api.server import answers
from webhook_api.server.request import Fault, Request

LOG: Final = logging.getLogger(__name__)
INLINE_BYTES: Final = 65_536
"""Bodies up to this size are read by the loop itself. Larger ones would hold up the other connections."""
OTHER_BYTES: Final = 65_536
"""Body of a request that is no delivery."""
BATCH: Final = 64
BATCH_BYTES: Final = 1024 * 1024
"""A batch's bodies together: 64 of the largest would not be committed in a batch's time on a busy machine."""
WAITING: Final = 1024
"""Deliveries that wait for their commit. More are answered 503 at once."""
STORES: Final = 6
"""Threads for what a batch cannot decide: fewer than the inbox has connections, so that none waits for one."""
STATUS_UPDATE: Final = "/api/v1/avatar/status_update"
TEST: Final = "/api/v1/avatar/test_webhook"
SOURCES: Final = "/api/v1/sources/"
_SOURCE: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(slots=True)
class Taken:
    """A delivery on its way to the inbox."""

    ticket: Any
    delivery: Delivery
    age: float | None
    request_id: str
    endpoint: str
    keep_alive: bool
    started: float
    until: float
    verified: float = 0.0
    result: Stored | BaseException | None = None


class Quick:
    """The quick way of one process. ``start`` it after the fork."""

    def __init__(self, taking: intake.Intake) -> None:
        self._intake = taking
        self._batch: list[Taken] = []
        self._waiting = 0
        self._queue: queue.SimpleQueue[list[Taken] | None] = queue.SimpleQueue()
        self._finished: deque[Taken] = deque()
        self._stores: ThreadPoolExecutor | None = None
        self.bell: Callable[[], None] = lambda: None
        """Called from any thread when ``finished`` has something to give."""

    def start(self) -> None:
        """Start the thread that commits."""
        self._stores = ThreadPoolExecutor(STORES, thread_name_prefix="store")
        threading.Thread(target=self._commit_batches, name="commit", daemon=True).start()

    def stop(self) -> None:
        """End it. What was not committed is not answered."""
        self._queue.put(None)
        if self._stores is not None:
            self._stores.shutdown(wait=False)

    # The loop's thread

    def gate(self, method: str, target: str, headers: Headers) -> int | Fault | None:
        """Say how large a body may be, or None when it need not be read: the headers alone get it refused."""
        path = unquote(target.partition("?")[0])
        delivery = method == "POST" and (path in {STATUS_UPDATE, TEST} or path.startswith(SOURCES))
        limit = self._intake.body_limit_bytes if delivery else OTHER_BYTES
        length = headers.get("Content-Length")
        if length is not None and len(length) < 6 and int(length) <= min(INLINE_BYTES, limit):
            return limit
        if length is None and headers.get("Transfer-Encoding") is None:
            if delivery:
                return Fault(
                    "length_required", "a delivery has a body: send Content-Length, or send it in chunks"
                )
            return limit
        try:
            intake.refuse_unread(headers, limit)
            if delivery:
                self._claims(path, headers)
        except (Refusal, AuthError):
            return None
        return limit

    def _claims(self, path: str, headers: Headers) -> Any:
        authenticator = self._intake.authenticator
        if path.startswith(SOURCES):
            return authenticator.claims_of(path[len(SOURCES) :], headers)
        return authenticator.claims(headers)

    def take(self, request: Request, keep_alive: bool, ticket: Any) -> bytes | bool:
        """Return True when the delivery is on its way, an answer, or False: the ordinary way decides."""
        started = time.perf_counter()
        path, _, query = request.target.partition("?")
        endpoint = self._endpoint(request, path)
        if endpoint is None:
            return False
        headers = request.headers
        try:
            claims = self._claims(path, headers)
            verified = self._intake.authenticator.admit_now(claims, request.body)
            if verified is None:
                return False
            request_id = request_id_of(headers.get("X-Request-Id"))
            REQUEST_ID.set(request_id)
            delivery = acceptance.delivery(
                verified,
                request.body,
                headers,
                edge_request_id=request_id,
                training_type=_training_type(query),
            )
        except (AuthError, BodyError):
            return False
        if self._waiting >= WAITING:
            return self._refuse(
                Refusal("busy", "too many deliveries wait for the database: come again"), request_id, endpoint,
                started, keep_alive,
            )  # fmt: skip
        self._waiting += 1
        until = time.monotonic() + INTAKE_DEADLINE
        self._batch.append(
            Taken(
                ticket,
                delivery,
                verified.age,
                request_id,
                endpoint,
                keep_alive,
                started,
                until,
                time.perf_counter(),
            )
        )
        return True

    def _endpoint(self, request: Request, path: str) -> str | None:
        """Name of Flask's view that would take it, as the metrics know it; None: not for the quick way."""
        body = request.body
        if (
            request.method != "POST"
            or not body
            or len(body) > min(INLINE_BYTES, self._intake.body_limit_bytes)
        ):
            return None
        headers = request.headers
        if headers.get("Content-Encoding") is not None or headers.get("Content-Length") is None:
            return None
        if path == STATUS_UPDATE:
            return "intake.status_update"
        if path.startswith(SOURCES) and _SOURCE.fullmatch(path, len(SOURCES)):
            return "intake.source_delivery"
        return None

    def flush(self) -> None:
        """Hand what was taken to the thread that commits."""
        if self._batch:
            self._queue.put(self._batch)
            self._batch = []

    def finished(self) -> list[tuple[Any, bytes]]:
        """Return the tickets whose deliveries are decided, with their answers."""
        done = []
        while self._finished:
            taken = self._finished.popleft()
            self._waiting -= 1
            done.append((taken.ticket, self._answer(taken)))
        return done

    def refuse(self, fault: Fault) -> bytes:
        """Count, log and answer what could not be read."""
        request_id = request_id_of(fault.request_id)
        REQUEST_ID.set(request_id)
        errors.account(fault.reason, fault.message)
        return answers.of_fault(fault, request_id)

    def _answer(self, taken: Taken) -> bytes:
        REQUEST_ID.set(taken.request_id)
        seconds = time.perf_counter() - taken.started
        stored = taken.result
        if not isinstance(stored, Stored):
            tracing.received(
                taken.request_id, taken.endpoint, 503, taken.started, taken.verified, taken.delivery, None
            )
            if not isinstance(stored, DatabaseUnavailable):
                status = errors.account_defect(stored)
                _observe(taken.endpoint, status, seconds)
                return answers.refused(
                    "internal", errors.DEFECT, taken.request_id, keep_alive=taken.keep_alive
                )
            return self._refuse(stored, taken.request_id, taken.endpoint, taken.started, taken.keep_alive)
        intake.account(taken.delivery, stored, taken.age, seconds)
        _observe(taken.endpoint, 200, seconds)
        tracing.received(
            taken.request_id, taken.endpoint, 200, taken.started, taken.verified, taken.delivery, stored
        )
        document = json.dumps(intake.received(taken.delivery, stored), separators=(",", ":"))
        return answers.taken(taken.request_id.encode(), f"{document}\n".encode(), keep_alive=taken.keep_alive)

    def _refuse(self, error: Any, request_id: str, endpoint: str, started: float, keep_alive: bool) -> bytes:
        status = errors.account(error.reason, str(error))
        _observe(endpoint, status, time.perf_counter() - started)
        return answers.refused(error.reason, str(error), request_id, keep_alive=keep_alive)

    # The thread that commits

    def _commit_batches(self) -> None:
        while (batch := self._queue.get()) is not None:
            while len(batch) < BATCH and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    return
                batch += more
            for part in _parts(batch):
                self._commit(part)

    def _commit(self, batch: list[Taken]) -> None:
        batch = self._in_time(batch)
        if not batch:
            return
        started = time.perf_counter()
        try:
            results: Sequence[Stored | BaseException | None] = self._intake.inbox.store_many(
                [taken.delivery for taken in batch], min(taken.until for taken in batch)
            )
        except BaseException as error:
            # This thread must not end with it. Everyone is answered 500, and the log says why.
            results = [error] * len(batch)
        seconds = time.perf_counter() - started
        for taken, result in zip(batch, results, strict=True):
            if result is None:
                assert self._stores is not None  # noqa: S101  (for the type checker; start sets it)
                self._stores.submit(self._store_alone, taken)
                continue
            STORE.observe(seconds)
            taken.result = result
            self._finished.append(taken)
        self.bell()

    def _in_time(self, batch: list[Taken]) -> list[Taken]:
        """Refuse those whose time went by before their turn: tried now, they would keep the next ones waiting as well."""
        now = time.monotonic()
        late = [taken for taken in batch if taken.until <= now]
        for taken in late:
            taken.result = DatabaseUnavailable(
                "timeout", "the deadline came before the commit: come again", attempted=False
            )
            self._finished.append(taken)
        if not late:
            return batch
        self.bell()
        return [taken for taken in batch if taken.result is None]

    def _store_alone(self, taken: Taken) -> None:
        REQUEST_ID.set(taken.request_id)
        try:
            with STORE.time():
                taken.result = self._intake.inbox.store(taken.delivery, until=taken.until)
        except BaseException as error:
            taken.result = error
        self._finished.append(taken)
        self.bell()


def _parts(batch: list[Taken]) -> Iterator[list[Taken]]:
    """Split what was gathered into batches that are committed one by one."""
    part: list[Taken] = []
    size = 0
    for taken in batch:
        length = len(taken.delivery.body)
        if part and (len(part) >= BATCH or size + length > BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(taken)
        size += length
    if part:
        yield part


def _training_type(query: str) -> str | None:
    if not query:
        return None
    values = parse_qs(query[:2000], max_num_fields=50).get("training_type")
    return values[0] if values else None


def _observe(endpoint: str, code: int, seconds: float) -> None:
    REQUESTS.labels(endpoint=endpoint, code=code).observe(seconds)
