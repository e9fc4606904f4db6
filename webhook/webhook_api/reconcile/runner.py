"""One run of the reconciler, and the worker's thread that repeats it."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import psycopg

from webhook_api.config import Settings
from webhook_api.config_upkeep import ReconcileSettings
from webhook_api.db import Connection, DatabaseUnavailable, connect, sole
from webhook_api.inbox import DatabaseInbox, Delivery, Stored, intake_pool
from webhook_api.metrics_upkeep import (
    RECONCILE_ANSWERS,
    RECONCILE_CLOSED,
    RECONCILE_ERRORS,
    RECONCILE_OLDEST,
    RECONCILE_PAUSED,
    RECONCILE_RUNS,
    RECONCILE_WAITING,
)
from webhook_api.reconcile import ledger
from webhook_api.reconcile.answers import NOTHING_LEARNED, REQUEST_ID, Answer, Kind, delivery
from webhook_api.reconcile.fal_queue import FalQueue
from webhook_api.reconcile.ledger import Request

LOG: Final = logging.getLogger(__name__)
STATEMENT_SECONDS: Final = 10.0
RUN_SECONDS: Final = 600.0
"""Longest run; what is left is due in the next one."""
WORKING_FIRST: Final = 60.0
WORKING_CAP: Final = 300.0
"""Longest time between two questions for a running job: fal keeps a result of 10 KB or more for about 6 minutes."""
TROUBLE_FIRST: Final = 30.0
TROUBLE_CAP: Final = 600.0
NOT_FOUND_TIMES: Final = 3
"""So often fal must not know a request before it is closed: an id may be known a moment later."""
FORBIDDEN_TIMES: Final = 5
FAILURES_IN_A_ROW: Final = 3
"""After so many useless answers in a row, of any requests, fal is left alone for a while."""
KEY_PAUSE: Final = 900.0


class Inbox(Protocol):
    """Where deliveries go."""

    def store(self, delivery: Delivery) -> Stored:
        """Return when it is durable."""
        ...


class Asked(Protocol):
    """fal's queue."""

    def ask(self, model: str, request_id: str, pace: Callable[[], None]) -> Answer:
        """Ask for one request."""
        ...


class Stopped(Exception):
    """The process is stopping."""


@dataclass(slots=True)
class Report:
    """What a run did."""

    outcome: str
    """done, busy (another one runs), paused, stopped, or failed."""
    found: dict[str, int] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    detail: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"outcome": self.outcome, "found": self.found, "asked": self.asked, "detail": self.detail}


class Reconciler:
    """Looks for requests whose result never came, and asks fal for them, one after the other."""

    def __init__(
        self,
        settings: ReconcileSettings,
        queue: Asked,
        inbox: Inbox,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._inbox = inbox
        self._stop = stop or threading.Event()
        self._clock = clock
        self._uniform = uniform

    def run(self, connection: Connection, *, only: str | None = None) -> Report:
        """One run over an autocommitting connection. ``only``: this request alone, due or not.

        Raises psycopg.Error when the database goes away; what was stored stays stored, and is not asked for again.
        """
        with sole(connection, ledger.LOCK_KEY) as held:
            if not held:
                return Report("busy", detail="another process asks at this moment")
            report = Report("done")
            if only is None:
                report.found = self.discover(connection)
            reason, seconds, _ = ledger.paused(connection)
            if reason is not None:
                report.outcome, report.detail = "paused", f"{reason}, for {seconds:.0f} s more"
            else:
                self._ask_all(connection, report, only)
            ledger.ran(connection)
            return report

    def discover(self, connection: Connection) -> dict[str, int]:
        """Note what is to be asked for; returns how many by reason."""
        found = {}
        for reason, search in (("no_payload", ledger.without_payload), ("overdue", self._overdue)):
            names = ledger.add(connection, reason, search(connection))
            found[reason] = len(names)
            for name in names:
                LOG.warning("reconcile_found", extra={"delivery_request_id": name, "reason": reason})
        return found

    def _overdue(self, connection: Connection) -> list[tuple[str, str | None]]:
        return ledger.overdue(connection, self._settings)

    def _ask_all(self, connection: Connection, report: Report, only: str | None) -> None:
        ends = self._clock() + RUN_SECONDS
        seen: list[str] = []
        useless = 0
        while not self._stop.is_set() and self._clock() < ends:
            request = ledger.due(connection, only=only, everything=only is not None, seen=seen)
            if request is None:
                return
            seen.append(request.request_id)
            try:
                answer, became = self._one(connection, request)
            except Stopped:
                break
            report.asked.append(
                {"request_id": request.request_id, "reason": request.reason,
                 "answer": str(answer.kind) if answer else None, "became": became,
                 "detail": answer.detail if answer else ""}
            )  # fmt: skip
            if answer is None:
                continue
            useless = useless + 1 if answer.kind in NOTHING_LEARNED else 0
            if self._pause(connection, answer, useless):
                report.outcome = "paused"
                return
        if self._stop.is_set():
            report.outcome = "stopped"

    def _one(self, connection: Connection, request: Request) -> tuple[Answer | None, str]:
        """Ask for one request, unless its end is known; returns the answer and what became of the request."""
        settled = ledger.reported(connection, request.request_id)
        if settled is None and request.reason == "overdue" and _left_training(connection, request):
            settled = "its avatar is not in training any more"
        if settled is not None:
            return None, self._close(connection, request, "settled", settled)
        if not REQUEST_ID.fullmatch(request.request_id):
            return None, self._close(connection, request, "unusable", "this is no id of fal's queue")
        if request.tries and request.age > self._settings.give_up:
            return None, self._close(connection, request, "given_up", f"no end after {request.age:.0f} s")
        answer = self._ask(connection, request)
        return answer, self._record(connection, request, answer)

    def _ask(self, connection: Connection, request: Request) -> Answer:
        """Ask under each model that it may have been submitted to, until fal knows it."""
        interval = 60.0 / self._settings.requests_per_minute

        def pace() -> None:
            if self._stop.wait(ledger.turn(connection, interval)):
                raise Stopped

        answer = Answer(Kind.UNUSABLE, "no model is configured")
        for model in models_of(self._settings, request.training_type):
            answer = self._queue.ask(model, request.request_id, pace)
            RECONCILE_ANSWERS.labels(answer=str(answer.kind)).inc()
            if answer.kind is not Kind.NOT_FOUND:
                break
        return answer

    def _record(self, connection: Connection, request: Request, answer: Answer) -> str:
        """Note what was learned; returns what became of the request."""
        kind = answer.kind
        LOG.log(
            logging.WARNING if kind in NOTHING_LEARNED else logging.INFO,
            "reconcile_answer",
            extra={"delivery_request_id": request.request_id, "answer": str(kind), "detail": answer.detail,
                   "status": answer.http_status},
        )  # fmt: skip
        if kind in (Kind.RESULT, Kind.FAILED):
            return self._deliver(connection, request, answer)
        if kind is Kind.UNUSABLE:
            return self._close(connection, request, "unusable", answer.detail, str(kind))
        failures = request.failures + 1
        if kind is Kind.NOT_FOUND and request.result != kind:
            failures = 1
        if kind is Kind.NOT_FOUND and failures >= NOT_FOUND_TIMES:
            return self._close(connection, request, "gone", answer.detail, str(kind))
        if kind is Kind.FORBIDDEN and failures >= FORBIDDEN_TIMES:
            return self._close(connection, request, "unusable", answer.detail, str(kind))
        working = kind in (Kind.QUEUED, Kind.IN_PROGRESS)
        if working:
            failures = 0
            delay = min(WORKING_CAP, WORKING_FIRST * 1.5 ** min(request.tries, 16))
        else:
            delay = min(TROUBLE_CAP, TROUBLE_FIRST * 2 ** min(failures - 1, 16))
            RECONCILE_ERRORS.labels(reason=str(kind)).inc()
        ledger.again(
            connection,
            request,
            delay=delay * self._uniform(0.8, 1.0),
            result=str(kind),
            detail=answer.detail,
            failures=failures,
        )
        return "waiting"

    def _deliver(self, connection: Connection, request: Request, answer: Answer) -> str:
        """Put the result into the inbox. Not twice: asking again gives the same delivery."""
        asked_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        made = delivery(request.request_id, answer, asked_at, request.training_type)
        try:
            stored = self._inbox.store(made)
        except DatabaseUnavailable as error:
            detail = f"fal answered, and the inbox did not take it ({error.reason})"
            ledger.again(connection, request, delay=TROUBLE_FIRST, result=str(answer.kind), detail=detail,
                         failures=request.failures + 1)  # fmt: skip
            return "waiting"
        LOG.info(
            "delivery_stored",
            extra={"outcome": stored.outcome, "delivery_id": stored.id, "source": made.source,
                   "delivery_request_id": made.request_id, "status": made.status, "size_bytes": len(made.body)},
        )  # fmt: skip
        return self._close(
            connection, request, "delivered", f"{made.status}", str(answer.kind), delivery_id=stored.id
        )

    def _close(
        self,
        connection: Connection,
        request: Request,
        state: str,
        detail: str,
        result: str | None = None,
        delivery_id: int | None = None,
    ) -> str:
        ledger.close(connection, request, state, detail=detail, result=result, delivery_id=delivery_id)
        RECONCILE_CLOSED.labels(state=state).inc()
        if state in ("gone", "unusable", "given_up"):
            LOG.error(
                "reconcile_closed",
                extra={"delivery_request_id": request.request_id, "state": state, "detail": detail},
            )
        return state

    def _pause(self, connection: Connection, answer: Answer, useless: int) -> bool:
        """Leave fal alone for a while when it refuses the key, is asked too often or is in trouble."""
        if answer.kind not in NOTHING_LEARNED:
            ledger.resume(connection)
            return False
        _, _, pauses = ledger.paused(connection)
        if answer.kind is Kind.KEY_REFUSED:
            seconds, reason = KEY_PAUSE, "key_refused"
        elif answer.kind is Kind.THROTTLED or answer.retry_after is not None:
            seconds = max(answer.retry_after or 0.0, min(TROUBLE_CAP, 60.0 * 2 ** min(pauses, 8)))
            reason = str(answer.kind)
        elif useless >= FAILURES_IN_A_ROW:
            seconds, reason = min(TROUBLE_CAP, TROUBLE_FIRST * 2 ** min(pauses, 8)), str(answer.kind)
        else:
            return False
        ledger.pause(connection, min(seconds, 3600.0), reason)
        LOG.error("reconcile_paused", extra={"reason": reason, "seconds": seconds, "detail": answer.detail})
        return True


def models_of(settings: ReconcileSettings, kind: str | None) -> list[str]:
    """Models under which a request of a training type is asked for: all of them when its type is not known."""
    if kind is not None and kind in settings.models:
        return [settings.models[kind]]
    return list(dict.fromkeys(settings.models.values()))


def _left_training(connection: Connection, request: Request) -> bool:
    return ledger.in_training(connection, request.request_id) is False


class Runner:
    """A reconciler with connections of its own, for a process that needs it now and then."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        reconcile = settings.reconcile
        assert reconcile.key is not None  # noqa: S101  (callers look first)
        self._settings = settings
        self._name = f"webhook-reconcile {settings.instance_id}"
        self._queue = FalQueue(reconcile.key, reconcile.host, max_bytes=settings.body_limit_bytes)
        self._pool = intake_pool(settings.database_url, self._name, max_size=2)
        self._pool.open()
        self._reconciler = Reconciler(reconcile, self._queue, DatabaseInbox(self._pool), stop=stop)

    def run(self, *, only: str | None = None) -> Report:
        """One run. Raises psycopg.Error when the database is away."""
        with self._connect() as connection:
            return self._reconciler.run(connection, only=only)

    def show(self) -> None:
        """Bring the gauges up to date. Every worker shows the same: they are read from the table."""
        with contextlib.suppress(psycopg.Error), self._connect() as connection:
            now = ledger.summary(connection)
            RECONCILE_WAITING.set(now.waiting)
            RECONCILE_OLDEST.set(now.oldest)
            RECONCILE_PAUSED.set(1 if now.paused_for > 0 else 0)

    def close(self) -> None:
        """Close what was opened."""
        self._queue.close()
        self._pool.close()

    def _connect(self) -> Connection:
        return connect(self._settings.database_url, self._name, statement_timeout=STATEMENT_SECONDS)


def job(settings: Settings, stop: threading.Event) -> None:
    """Run again and again until ``stop`` is set; returns at once without a key. For a thread of the worker."""
    if settings.reconcile.key is None:
        LOG.info("reconcile_off", extra={"reason": "FAL_API_KEY is not set"})
        return
    runner = Runner(settings, stop)
    try:
        while not stop.is_set():
            RECONCILE_RUNS.labels(outcome=_attempt(runner)).inc()
            runner.show()
            stop.wait(settings.reconcile.every)
    finally:
        runner.close()


def _attempt(runner: Runner) -> str:
    try:
        report = runner.run()
    except psycopg.Error as error:
        LOG.warning("reconcile_failed", extra={"error": str(error)[:300]})
        return "failed"
    except Exception:  # a defect must not end the worker's other work
        LOG.exception("reconcile_defect")
        return "failed"
    if report.asked:
        LOG.info("reconcile_ran", extra={"outcome": report.outcome, "asked": len(report.asked)})
    return report.outcome
