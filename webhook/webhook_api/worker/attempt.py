"""One attempt at one delivery: every effect that is still open is tried, each on its own."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import psycopg

from webhook_api import tracing
from webhook_api.bodies import BodyError, Event, clean_text, parse
from webhook_api.db import DatabaseUnavailable
from webhook_api.effects.base import Delivery, Effect, Entry, Job, Outcome, Record, Tools, as_json, record
from webhook_api.states import (
    EffectError,
    EffectState,
    Failure,
    Policy,
    Setback,
    Uniform,
    Verdict,
    counts_as_try,
    decide,
)
from webhook_api.worker import metrics, queue

log = logging.getLogger(__name__)


class NotRecorded(Exception):
    """The database went away in the middle: the attempt has no verdict, its lease must be given back."""

    reason = "database_unavailable"


def read_event(delivery: Delivery, tools: Tools) -> tuple[Event | None, str | None]:
    """The event in the body, or why there is none."""
    try:
        return parse(delivery.body, tools.shapes.get(delivery.source, "fal")), None
    except BodyError as error:
        return None, f"{error.reason}: {error}"


def attempt(
    delivery: Delivery,
    effects: Sequence[Effect],
    tools: Tools,
    policy: Policy,
    stop: Callable[[], bool],
    uniform: Uniform = random.uniform,
) -> Verdict:
    """Run what is open and say what becomes of the delivery. Raises `NotRecorded`."""
    event, unreadable = read_event(delivery, tools)
    try:
        with tools.borrow() as connection:
            known = queue.records(connection, [delivery.id])[delivery.id]
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise NotRecorded(str(error)) from error
    job = Job(delivery, event, unreadable, known, tools, stop)
    setbacks: list[Setback] = []
    with tracing.attempts([job]):
        for effect in effects:
            if not effect.wanted(tools):
                continue
            setback = _one(job, effect, policy)
            if setback is not None:
                setbacks.append(setback)
            if setback is not None and setback.kind is Failure.INTERRUPTED:
                break
    return decide(setbacks, delivery.tries, delivery.age, policy, uniform)


def _one(job: Job, effect: Effect, policy: Policy) -> Setback | None:
    """Try one effect unless it is final already, and record how it went."""
    known, answered = from_record(job, effect.name)
    if answered:
        return known
    try:
        if job.stop():
            raise EffectError(Failure.INTERRUPTED, "stopping", "the worker is stopping")
        with metrics.EFFECT_SECONDS.labels(effect.name, "one").time(), tracing.effect(effect.name, [job]):
            outcome = effect.run(job)
    except EffectError as error:
        return _failed(job, effect.name, error, policy)
    except Exception as error:  # a defect of ours must neither kill the worker nor be retried for ever
        log.exception("effect_defect", extra={"delivery_id": job.delivery.id, "effect": effect.name})
        defect = EffectError(Failure.THEIRS, "defect", f"{type(error).__name__}: {error}")
        return _failed(job, effect.name, defect, policy)
    return _succeeded(job, effect.name, outcome, policy)


def from_record(job: Job, name: str) -> tuple[Setback | None, bool]:
    """What the record of an effect says already; False: it is to be run."""
    before = job.records.get(name)
    if before is not None and before.final:
        return (None if before.settled else _given_up(name, before)), True
    if before is not None and before.not_before > time.time():
        return _left_alone(name, before), True
    return None, False


def _given_up(name: str, before: Record) -> Setback:
    reason = str(before.detail.get("reason", "given_up"))
    return Setback(
        name, Failure.PERMANENT, reason, str(before.detail.get("message", before.last_error)), before.tries
    )


def _left_alone(name: str, before: Record) -> Setback:
    """Whoever answered last asked for a pause, and it isn't over: other effects may be tried meanwhile."""
    now = time.time()
    return Setback(
        name,
        Failure(before.detail.get("kind", Failure.THEIRS)),
        str(before.detail.get("reason", "not_yet")),
        str(before.detail.get("message", before.last_error)),
        before.tries,
        wait=before.not_before - now,
        lasting=before.lasting(now),
    )


def succeeded(job: Job, name: str, outcome: Outcome) -> Entry:
    """Note that an effect has ended, and what is to be recorded of it."""
    replay = job.detail(name).get("replay")
    detail = {**outcome.detail, "replay": replay} if replay else outcome.detail
    job.records[name] = Record(str(outcome.state), 1, detail)
    return Entry(job.delivery.id, name, outcome.state, as_json(detail))


def failed(
    job: Job, name: str, error: EffectError, policy: Policy, now: float
) -> tuple[Setback, Entry | None]:
    """What a failure means for the delivery, and what is to be recorded of it (nothing of an interruption)."""
    before = job.records.get(name)
    counted = 1 if counts_as_try(error.kind) else 0
    tries = (before.tries if before else 0) + counted
    failing = before is not None and before.detail.get("kind") == error.kind
    since = now - before.lasting(now) if before is not None and failing else now
    setback = Setback(name, error.kind, error.reason, str(error), tries, error.wait, now - since)
    if error.kind is Failure.INTERRUPTED:
        return setback, None
    final = setback.is_final(policy, job.delivery.age)
    reached = error.detail if error.detail is not None else before.detail if before else {}
    detail = {
        **reached,
        "kind": str(error.kind),
        "reason": error.reason,
        "message": str(error)[:2000],
        "final": final,
        "since": since,
        "not_before": now + error.wait,
    }
    job.records[name] = Record(str(EffectState.FAILED), tries, detail, str(error))
    metrics.EFFECT_FAILURES.labels(name, str(error.kind), error.reason).inc()
    text = clean_text(error.describe()[:4000])
    return setback, Entry(job.delivery.id, name, EffectState.FAILED, as_json(detail), text, counted)


def log_failure(job: Job, setback: Setback, entry: Entry | None) -> None:
    """One line for a failed effect."""
    if entry is None:
        return
    final = bool(job.records[setback.effect].detail.get("final"))
    log.log(
        logging.ERROR if final else logging.WARNING,
        "effect_failed",
        extra={
            "delivery_id": job.delivery.id,
            "effect": setback.effect,
            "kind": str(setback.kind),
            "reason": setback.reason,
            "error": setback.message[:500],
            "final": final,
        },
    )


def _succeeded(job: Job, name: str, outcome: Outcome, policy: Policy) -> Setback | None:
    before = job.records.get(name)
    entry = succeeded(job, name, outcome)
    if not outcome.recorded:
        try:
            _record(job, entry)
        except EffectError as error:
            _restore(job, name, before)
            return _failed(job, name, error, policy)
    metrics.EFFECTS.labels(name, str(outcome.state)).inc()
    log.info(
        "effect_done",
        extra={"delivery_id": job.delivery.id, "effect": name, "effect_state": str(outcome.state)},
    )
    return None


def _failed(job: Job, name: str, error: EffectError, policy: Policy) -> Setback:
    before = job.records.get(name)
    setback, entry = failed(job, name, error, policy, time.time())
    if entry is None:
        return setback
    log_failure(job, setback, entry)
    try:
        _record(job, entry)
    except EffectError as lost:
        _restore(job, name, before)
        return Setback(name, lost.kind, lost.reason, str(lost), setback.tries)
    return setback


def _restore(job: Job, name: str, before: Record | None) -> None:
    if before is None:
        job.records.pop(name, None)
    else:
        job.records[name] = before


def _record(job: Job, entry: Entry) -> None:
    """Record in a transaction of its own. Raises `EffectError` (lease lost) or `NotRecorded`."""
    try:
        with job.tools.borrow() as connection, connection.transaction():
            record(
                connection,
                job.delivery,
                entry.name,
                entry.state,
                entry.detail,
                entry.last_error,
                tries=entry.tries,
            )
    except (DatabaseUnavailable, psycopg.Error) as problem:
        raise NotRecorded(str(problem)) from problem
