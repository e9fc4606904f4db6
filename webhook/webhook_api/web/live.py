"""Live: what arrives, as server-sent events that go on after a reconnect where they stopped (Last-Event-ID).

A stream ends by itself after a while, so that a session that has ended is noticed and a stopping process waits for
nobody; the browser comes again. Numbers are not committed in their order, so a look goes back a few seconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final

from flask import Blueprint, Response, abort, g, render_template, request

from webhook_api.console import Filter, listed
from webhook_api.db import Connection, DatabaseUnavailable
from webhook_api.web import gate, lists
from webhook_api.web.words import Words, harmless

SECONDS: Final = 50.0
EVERY: Final = 1.0
ALIVE: Final = 10.0
BACK: Final = 5.0
"""Seconds that a delivery may have been on its way to its commit."""
AT_ONCE: Final = 100

blueprint = Blueprint("live", __name__)


@blueprint.get("/live")
@gate.page
def show() -> str:
    """The page: the newest deliveries, and a script that adds to them."""
    with gate.services().read() as connection:
        page = lists.page(connection, Filter(), limit=25)
    return render_template(
        "live.html", at="live", rows=page.rows, last=page.rows[0]["id"] if page.rows else 0
    )


@blueprint.get("/live/events")
@gate.page
def events() -> Response:
    """The stream."""
    try:
        last = lists.key_of(request.headers.get("Last-Event-ID") or request.args.get("after")) or 0
    except lists.FilterInvalid:
        abort(400, "filter")
    services, words = gate.services(), g.words
    if not services.streams.acquire(blocking=False):
        abort(503, "streams")
    try:
        stream = Tail(services.read, last, lambda row: event(row, words))
    except BaseException:
        services.streams.release()
        raise
    response = Response(stream.run(), mimetype="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(services.streams.release)
    return response


def event(row: dict[str, Any], words: Words) -> bytes:
    """One delivery as an event. Text of others is made harmless here: the script only sets text."""
    shown = {
        "id": row["id"], "url": f"/deliveries/{row['id']}", "at": row["first_seen_at"].isoformat(),
        "time": row["first_seen_at"].astimezone(words.zone).strftime("%Y-%m-%d %H:%M:%S"),
        "source": harmless(row["source"]), "request": harmless(row["request_id"]),
        "status": row["status"], "status_word": words.named("status", row["status"]),
        "state": row["state"], "state_word": words.named("state", row["state"]),
    }  # fmt: skip
    return f"id: {row['id']}\ndata: {json.dumps(shown)}\n\n".encode()


class Tail:
    """Follows the table by its key."""

    def __init__(
        self,
        read: Callable[[], AbstractContextManager[Connection]],
        last: int,
        write: Callable[[dict[str, Any]], bytes],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._read = read
        self._write = write
        self._clock = clock
        self._sleep = sleep
        self._sent: dict[int, float] = {}
        self._floor = last
        """Everything up to it was sent, or will never come."""

    def run(self) -> Iterator[bytes]:
        """Bytes of the stream, for SECONDS."""
        yield b"retry: 1000\n\n"
        ends, spoken = self._clock() + SECONDS, self._clock()
        while self._clock() < ends:
            for row in self.look():
                yield self._write(row)
                spoken = self._clock()
            if self._clock() - spoken >= ALIVE:
                yield b": alive\n\n"
                spoken = self._clock()
            self._sleep(EVERY)

    def look(self) -> list[dict[str, Any]]:
        """What has come since the last look, the oldest first; the newest AT_ONCE of it when it is more."""
        try:
            with self._read() as connection:
                found = listed(connection, Filter(), limit=AT_ONCE)
        except DatabaseUnavailable:
            return []
        now = self._clock()
        fresh = [row for row in reversed(found) if row["id"] > self._floor and row["id"] not in self._sent]
        self._sent |= {row["id"]: now for row in fresh}
        settled = [number for number, at in self._sent.items() if now - at > BACK]
        self._floor = max([self._floor, *settled])
        self._sent = {number: at for number, at in self._sent.items() if number > self._floor}
        return fresh
