"""The worker's process: claims, runs attempts in threads, keeps their leases, and stops in good order.

What is claimed at once is one batch (`batch`), and up to `BATCHES` of them run side by side, so that one works while
another waits for its backends. Deliveries that take their time go on alone in the `Lane`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import selectors
import signal
import socket
import threading
import time
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import psycopg

from webhook_api import gauges, gauges_site, tracing
from webhook_api.config import Settings
from webhook_api.db import Connection, Database, DatabaseUnavailable
from webhook_api.effects import ORDER
from webhook_api.effects.base import Delivery, Tools
from webhook_api.effects.outside import make_outlets
from webhook_api.jsonlog import REQUEST_ID
from webhook_api.media import MediaClient, MediaPolicy
from webhook_api.outlets import ObjectStore, RedisOutlet, minio_client, redis_client
from webhook_api.states import Policy, Verdict
from webhook_api.worker import batch, metrics, queue
from webhook_api.worker.attempt import NotRecorded, attempt
from webhook_api.worker.leases import Active, Lane
from webhook_api.worker.listener import Listener
from webhook_api.worker.upkeep import Upkeep

HEARTBEAT_FILE: Final = Path("/tmp/worker.heartbeat")  # noqa: S108  (the container's own tmpfs)
"""Touched by every turn of the main loop, at least every 10 s. Stale: the loop hangs."""
POLL_SECONDS: Final = 5.0
"""Longest sleep: what a lost notification costs."""
BATCHES: Final = 2
"""Batches that run at once."""
_ALIVE_SECONDS: Final = 30.0
"""A loop that has not turned for so long hangs."""
_NO_ROOM_SECONDS: Final = 5.0
"""When deliveries come again for which there was no room among those that take their time."""
_EXPIRE_SECONDS: Final = 1.0
_TALKATIVE: Final = 16
"""Up to so many deliveries of a batch have a log line each."""
_SHORTEST_SLEEP: Final = 0.05
_TURN_SECONDS: Final = (0.005, 0.02)
_MOST_TURNS_MISSED: Final = 40
"""A worker that hangs in the middle of a claim keeps the others from claiming for about half a second, and no longer."""
#: Each how-many-th claim what is tried again goes before what is new: a flood of new deliveries must not starve it.
_RETRY_TURN: Final = 4
_STATEMENT_SECONDS: Final = 10.0
_CLAIM_SECONDS: Final = 4.0

log = logging.getLogger(__name__)


def run(settings: Settings, heartbeat_file: Path = HEARTBEAT_FILE) -> int:
    """Work until SIGTERM or SIGINT. Returns the exit code: 0 after an orderly stop."""
    worker = Worker(settings, heartbeat_file)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    tracing.start(settings, "worker")
    try:
        worker.run()
    finally:
        tracing.stop()
    return 0


def policy(settings: Settings) -> Policy:
    """How patient the settings want the worker to be."""
    return Policy(
        max_attempts=settings.event_max_attempts, parked_patience=float(settings.parked_max_seconds)
    )


def media_policy(settings: Settings) -> MediaPolicy:
    """What the settings allow to be downloaded."""
    return MediaPolicy(
        https_hosts=settings.archive_allowed_hosts,
        http_hosts=settings.archive_allow_http_hosts,
        max_bytes=settings.archive_max_bytes,
        max_seconds=float(settings.archive_max_seconds),
    )


def _state_directory(settings: Settings) -> Path | None:
    """Where spool and cached keys are kept: what fills up there stops deliveries."""
    if settings.fal_jwks_cache_file is not None:
        return settings.fal_jwks_cache_file.parent
    return settings.spool_dir


class Worker:
    """One process. `run` blocks; `stop` may be called from a signal handler or another thread."""

    def __init__(self, settings: Settings, heartbeat_file: Path) -> None:
        name = f"webhook-worker {settings.instance_id}"
        self._settings = settings
        self._heartbeat_file = heartbeat_file
        self._owner = f"{settings.instance_id}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._serial = itertools.count(1)
        self._policy = policy(settings)
        self._database = Database(
            settings.database_url,
            name,
            max_size=settings.worker_concurrency + BATCHES + 3,
            statement_timeout=_STATEMENT_SECONDS,
        )
        self._listener = Listener(settings.database_url, f"{name} listener")
        self._redis = RedisOutlet(redis_client(settings))
        forward, telegram = make_outlets(settings)
        self._tools = Tools(
            borrow=self._borrow,
            redis=self._redis,
            store=ObjectStore(minio_client(settings), settings.minio_bucket),
            media=MediaClient(media_policy(settings)),
            stream=settings.redis_stream,
            stream_maxlen=settings.redis_stream_maxlen,
            forward=forward,
            telegram=telegram,
            shapes={sender.name: sender.shape for sender in settings.sources},
        )
        self._active = Active()
        self._lane = Lane(settings.worker_concurrency, self._alone)
        self._batches = 0
        self._turns_missed = 0
        self._suspects: set[str] = set()
        self._unanswered: str | None = None
        self._batches_lock = threading.Lock()
        self._beaten_at = time.monotonic()
        self._expired_at = float("-inf")
        self._stopping = threading.Event()
        self._aborting = threading.Event()
        self._ended = threading.Event()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._database_down = False

    def stop(self) -> None:
        """Ask for an orderly stop."""
        self._stopping.set()
        self._wake()

    def run(self) -> None:
        """Work until `stop`."""
        log.info("worker_started", extra={"owner": self._owner, "version": self._settings.version})
        self._database.open()
        keeper = threading.Thread(target=self._keep_leases, name="leases", daemon=True)
        keeper.start()
        inbox = gauges.InboxCollector(self._borrow)
        metrics.REGISTRY.register(inbox)
        site = gauges_site.SiteCollector(self._borrow, _state_directory(self._settings))
        metrics.REGISTRY.register(site)
        upkeep = Upkeep(self._settings, self._stopping)
        upkeep.start()
        http = metrics.Listener(self._settings.worker_metrics_port, self._is_alive)
        try:
            while not self._stopping.is_set():
                self._beat()
                self._sleep(self._turn())
            self._finish_attempts()
        finally:
            self._ended.set()
            http.close()
            metrics.REGISTRY.unregister(inbox)
            metrics.REGISTRY.unregister(site)
            keeper.join(timeout=2.0)
            upkeep.join(2.0)
            self._listener.close()
            self._redis.close()
            self._database.close()
            self._wake_in.close()
            self._wake_out.close()
        log.info("worker_stopped", extra={"owner": self._owner})

    def _borrow(self) -> AbstractContextManager[Connection]:
        return self._database.borrow(_STATEMENT_SECONDS)

    def _beat(self) -> None:
        self._beaten_at = time.monotonic()
        try:
            self._heartbeat_file.touch()
        except OSError as error:
            log.warning("heartbeat_failed", extra={"path": str(self._heartbeat_file), "error": str(error)})

    def _is_alive(self) -> bool:
        return time.monotonic() - self._beaten_at < _ALIVE_SECONDS

    def _turn(self) -> float:
        """Claim and start what is due; returns the seconds to sleep, unless something wakes the loop."""
        # Listen before looking: what comes in between wakes the loop again.
        self._listener.connection()
        self._listener.drain()
        limit = self._room()
        try:
            with self._database.borrow(_CLAIM_SECONDS) as connection:
                self._tidy(connection)
                claimed = self._claim(connection, limit) if limit else 0
                due = queue.next_due(connection) if claimed is not None and claimed < limit else None
        except (DatabaseUnavailable, psycopg.Error) as error:
            if not self._database_down:
                log.error("database_unavailable", extra={"error": str(error)[:300]})
            self._database_down = True
            return 1.0
        if self._database_down:
            log.info("database_back")
            self._database_down = False
        if claimed is None:
            return random.uniform(*_TURN_SECONDS)  # noqa: S311  (not a secret)
        if claimed and self._room():
            return 0.0
        return POLL_SECONDS if due is None else min(POLL_SECONDS, max(_SHORTEST_SLEEP, due))

    def _room(self) -> int:
        """How many deliveries may be claimed now."""
        with self._batches_lock:
            free = self._batches < BATCHES
        return self._settings.worker_batch_size if free else 0

    def _tidy(self, connection: Connection) -> None:
        """Give back what was left without a verdict, and take back what other workers left."""
        away = "the database went away during the attempt"
        self._abandon(connection, away)
        orphans = self._active.orphans()
        if orphans:
            self._active.adopt(queue.release(connection, orphans, away))
        if self._database_down and self._active.owners():
            # What kept running while the database was away may still hold its lease: not a crash.
            queue.renew(connection, self._active.owners(), float(self._settings.lease_seconds))
        if time.monotonic() - self._expired_at < _EXPIRE_SECONDS:
            return
        for gone in queue.expire(connection, self._policy.max_attempts):
            metrics.EXPIRED.inc()
            if gone["state"] == "dead":
                metrics.DEAD.inc()
            log.error("lease_expired", extra=gone)
        self._expired_at = time.monotonic()

    def _abandon(self, connection: Connection, why: str) -> None:
        """Give back what the last claim may have leased, if its answer never came."""
        if self._unanswered is not None:
            queue.abandon(connection, self._unanswered, why)
            self._unanswered = None

    def _claim(self, connection: Connection, limit: int) -> int | None:
        """How many were claimed, and started; None while it is another worker's turn."""
        serial = next(self._serial)
        self._unanswered = f"{self._owner}:{serial}"
        with metrics.CLAIM_SECONDS.time():
            claims = queue.claim(
                connection,
                self._unanswered,
                limit,
                float(self._settings.lease_seconds),
                fresh_first=serial % _RETRY_TURN != 0,
                suspects=0 if self._suspects & set(self._active.owners()) else 1,
                force=self._turns_missed >= _MOST_TURNS_MISSED,
            )
        self._unanswered = None
        if claims is None:
            self._turns_missed += 1
            return None
        self._turns_missed = 0
        if not claims:
            return 0
        metrics.CLAIMED.inc(len(claims))
        for claim in claims:
            self._active.start(claim.delivery.lease_owner)
        held = {claim.delivery.lease_owner for claim in claims if claim.crashes > queue.MAX_CRASHES}
        self._suspects = held | self._suspects & set(self._active.owners())
        together, alone = batch.split(claims)
        with self._batches_lock:
            self._batches += 1
        threading.Thread(
            target=self._batch, args=(together, alone), name=f"batch-{serial}", daemon=True
        ).start()
        return len(claims)

    def _batch(self, together: list[Delivery], alone: list[Delivery]) -> None:
        """One batch in its own thread, from leases to verdicts; what needs more goes on alone."""
        try:
            if together:
                metrics.BATCH.observe(len(together))
                with metrics.BATCH_SECONDS.time():
                    alone = self._together(together) + alone
            self._go_on_alone(alone)
        finally:
            with self._batches_lock:
                self._batches -= 1
            self._wake()

    def _go_on_alone(self, deliveries: list[Delivery]) -> None:
        """Let them wait for their turn. Those for which there is no room come again: they must hold up nobody else."""
        surplus: list[str] = []
        for delivery in deliveries:
            if not self._lane.has_room(self._settings.worker_batch_size):
                surplus.append(delivery.lease_owner)
            elif not self._lane.put(delivery):
                self._active.end(delivery.lease_owner, orphaned=True)
        if not surplus:
            return
        given: frozenset[str] = frozenset()
        try:
            with self._borrow() as connection:
                given = queue.release(
                    connection, surplus, "too many others take their time", delay=_NO_ROOM_SECONDS
                )
        except (DatabaseUnavailable, psycopg.Error) as error:
            log.warning("not_given_back", extra={"deliveries": len(surplus), "error": str(error)[:300]})
        for owner in surplus:
            self._active.end(owner, orphaned=owner not in given)

    def _together(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Attempt them as one batch; returns those that are to be attempted alone."""
        started = time.monotonic()
        try:
            handled = batch.attempt_many(deliveries, ORDER, self._tools, self._policy, self._given_up)
        except (NotRecorded, DatabaseUnavailable, psycopg.Error) as error:
            log.warning(
                "batch_not_recorded", extra={"deliveries": len(deliveries), "error": str(error)[:300]}
            )
            metrics.UNRECORDED.inc(len(deliveries))
            for delivery in deliveries:
                self._active.end(delivery.lease_owner, orphaned=True)
            return []
        except Exception:
            log.exception("batch_defect", extra={"deliveries": len(deliveries)})
            return deliveries
        seconds = time.monotonic() - started
        for delivery, verdict in handled.ended:
            self._active.end(delivery.lease_owner)
            self._note(delivery, verdict, seconds)
            if len(deliveries) <= _TALKATIVE or verdict.state == "dead":
                _log_end(delivery, verdict, seconds, held=True)
        if len(deliveries) > _TALKATIVE:
            extra = {"deliveries": len(deliveries), "first": deliveries[0].id, "last": deliveries[-1].id}
            extra |= {"alone": len(handled.alone), "duration_ms": round(seconds * 1000)}
            log.info("batch_ended", extra=extra)
        return handled.alone

    def _given_up(self, delivery: Delivery) -> bool:
        return self._aborting.is_set() or self._active.is_lost(delivery.lease_owner)

    def _note(self, delivery: Delivery, verdict: Verdict, seconds: float) -> None:
        metrics.ATTEMPTS.labels(str(verdict.state)).inc()
        if verdict.state == "done":
            metrics.AGE_AT_DONE.observe(delivery.age + seconds)
            metrics.TRIES_AT_DONE.observe(delivery.tries)
        elif verdict.state == "dead":
            metrics.DEAD.inc()

    def _alone(self, delivery: Delivery) -> None:
        """One attempt in a thread of its own, from lease to verdict."""
        token = REQUEST_ID.set(delivery.request_id)
        orphaned = True
        started = time.monotonic()
        try:
            verdict = attempt(delivery, ORDER, self._tools, self._policy, lambda: self._given_up(delivery))
            with self._borrow() as connection:
                held = queue.finish(connection, delivery, verdict)
            orphaned = False
            seconds = time.monotonic() - started
            if held:
                self._note(delivery, verdict, seconds)
            _log_end(delivery, verdict, seconds, held=held)
        except (NotRecorded, DatabaseUnavailable, psycopg.Error) as error:
            metrics.UNRECORDED.inc()
            log.warning("attempt_not_recorded", extra={"delivery_id": delivery.id, "error": str(error)[:300]})
        except Exception:
            log.exception("attempt_defect", extra={"delivery_id": delivery.id})
        finally:
            self._active.end(delivery.lease_owner, orphaned=orphaned)
            REQUEST_ID.reset(token)
            self._wake()

    def _keep_leases(self) -> None:
        """Renew the leases of running attempts, three times as often as they would end."""
        while not self._ended.wait(self._settings.lease_seconds / 3):
            owners = self._active.owners()
            if not owners:
                continue
            try:
                with self._database.borrow(_CLAIM_SECONDS) as connection:
                    held = queue.renew(connection, owners, float(self._settings.lease_seconds))
            except (DatabaseUnavailable, psycopg.Error) as error:
                log.warning("renew_failed", extra={"error": str(error)[:300]})
                continue
            for owner in self._active.keep_only(owners, held):
                metrics.LOST.inc()
                log.warning("lease_lost", extra={"owner": owner})

    def _finish_attempts(self) -> None:
        """Let attempts end by themselves, then interrupt them, then give back what is left."""
        seconds = float(self._settings.worker_stop_seconds)
        for delivery in self._lane.close():
            self._active.end(delivery.lease_owner, orphaned=True)
        log.info("worker_stopping", extra={"running": len(self._active), "seconds": seconds})
        self._wait_idle(seconds / 2)
        self._aborting.set()
        self._wait_idle(seconds / 4)
        self._give_back(time.monotonic() + seconds / 4)

    def _give_back(self, ends: float) -> None:
        """Give back every lease, so that none of them has to run out: that would count as a crash."""
        why = "the worker was stopped during the attempt"
        left = frozenset(self._active.owners() + self._active.orphans())
        while (left or self._unanswered is not None) and time.monotonic() < ends:
            try:
                with self._database.borrow(max(0.1, ends - time.monotonic())) as connection:
                    self._abandon(connection, why)
                    left -= queue.release(connection, list(left), why)
            except (DatabaseUnavailable, psycopg.Error) as error:
                log.warning("release_failed", extra={"error": str(error)[:300]})
            if left or self._unanswered is not None:
                time.sleep(_SHORTEST_SLEEP)
        log.info("leases_released", extra={"left": len(left)})

    def _wait_idle(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while len(self._active) and time.monotonic() < ends:
            self._beat()
            self._sleep(min(1.0, max(0.0, ends - time.monotonic())))

    def _sleep(self, seconds: float) -> None:
        """Sleep until something happens: a notification, an attempt's end, or `stop`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_in, selectors.EVENT_READ)
            listening = self._listener.connection()
            if listening is not None:
                selector.register(listening.fileno(), selectors.EVENT_READ)
            selector.select(seconds)
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._wake_out.send(b".")


def _log_end(delivery: Delivery, verdict: Verdict, seconds: float, *, held: bool) -> None:
    """The line that says how an attempt ended."""
    token = REQUEST_ID.set(delivery.request_id)
    log.log(
        logging.ERROR if verdict.state == "dead" else logging.INFO,
        "attempt_ended" if held else "lease_lost",
        extra={
            "delivery_id": delivery.id,
            "state": str(verdict.state),
            "tries": delivery.tries,
            "retry_in": round(verdict.delay, 1),
            "error": verdict.last_error,
            "duration_ms": round(seconds * 1000),
        },
    )
    REQUEST_ID.reset(token)
