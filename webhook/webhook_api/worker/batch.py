"""One attempt at many deliveries: the same effects, states and verdicts as `attempt`, by a few statements for all.

A batch holds no two deliveries of one request. Every effect that can be brought about for many at once is; an effect
that takes its time (a download) or that went wrong for one delivery alone sends that delivery on to `attempt`, which
finds recorded what was done here. Nothing is recorded of a delivery whose lease is no longer ours.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import psycopg

from webhook_api import tracing
from webhook_api.db import DatabaseUnavailable
from webhook_api.effects.base import Delivery, Effect, Entry, Job, Outcome, Result, Tools
from webhook_api.states import EffectError, Failure, Policy, Setback, Uniform, Verdict, decide
from webhook_api.worker import metrics, queue
from webhook_api.worker.attempt import NotRecorded, failed, from_record, log_failure, read_event, succeeded

LARGE: Final = 256 * 1024
"""Bytes of a body that is handled alone: a parsed one takes up to a hundred times its size."""

log = logging.getLogger(__name__)

#: Whether the attempt at a delivery should be given up: the worker stops, or has lost its lease.
Stop = Callable[[Delivery], bool]


@dataclass(slots=True)
class Handled:
    """What became of a batch. Every delivery stands in exactly one of the two."""

    ended: list[tuple[Delivery, Verdict]] = field(default_factory=list)
    alone: list[Delivery] = field(default_factory=list)
    """To be handed to `attempt`; still leased."""


@dataclass(slots=True)
class _Member:
    job: Job
    setbacks: list[Setback] = field(default_factory=list)
    alone: bool = False
    interrupted: bool = False

    @property
    def open(self) -> bool:
        return not self.alone and not self.interrupted


def suits(claim: queue.Claim) -> bool:
    """Whether a claimed delivery may share a batch."""
    return claim.crashes <= queue.MAX_CRASHES and len(claim.delivery.body) <= LARGE


def split(claims: Sequence[queue.Claim]) -> tuple[list[Delivery], list[Delivery]]:
    """Those for one batch, the first of each request, and those that are handled alone after it."""
    together: dict[str, Delivery] = {}
    alone: list[Delivery] = []
    for claim in claims:
        if suits(claim) and claim.delivery.request_id not in together:
            together[claim.delivery.request_id] = claim.delivery
        else:
            alone.append(claim.delivery)
    return list(together.values()), alone


def attempt_many(
    deliveries: Sequence[Delivery],
    effects: Sequence[Effect],
    tools: Tools,
    policy: Policy,
    stop: Stop,
    uniform: Uniform = random.uniform,
) -> Handled:
    """Run what is open and record it all. Raises `NotRecorded` when the database went away."""
    members = _read(deliveries, tools, stop)
    entries: list[Entry] = []
    with tracing.attempts([member.job for member in members]):
        for effect in effects:
            if effect.wanted(tools):
                entries += _effect(effect, members, policy)
    endings = [
        queue.Ending(
            each.job.delivery,
            None
            if each.alone
            else decide(each.setbacks, each.job.delivery.tries, each.job.delivery.age, policy, uniform),
        )
        for each in members
    ]
    try:
        with tools.borrow() as connection:
            held = queue.finish_many(connection, endings, entries)
    except psycopg.DataError:  # of one of them; alone, nobody else loses by it
        log.exception("batch_refused", extra={"deliveries": len(deliveries)})
        held = frozenset()
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise NotRecorded(str(error)) from error
    handled = Handled()
    for ending in endings:
        if ending.verdict is None or ending.delivery.id not in held:
            handled.alone.append(ending.delivery)
        else:
            handled.ended.append((ending.delivery, ending.verdict))
    return handled


def _read(deliveries: Sequence[Delivery], tools: Tools, stop: Stop) -> list[_Member]:
    try:
        with tools.borrow() as connection:
            known = queue.records(connection, [delivery.id for delivery in deliveries])
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise NotRecorded(str(error)) from error
    members = []
    for delivery in deliveries:
        event, unreadable = read_event(delivery, tools)
        halt = _halt(stop, delivery)
        members.append(_Member(Job(delivery, event, unreadable, known[delivery.id], tools, halt)))
    return members


def _halt(stop: Stop, delivery: Delivery) -> Callable[[], bool]:
    return lambda: stop(delivery)


def _effect(effect: Effect, members: Sequence[_Member], policy: Policy) -> list[Entry]:
    """Bring one effect about for all for which it is open; returns what is to be recorded."""
    due = [member for member in members if member.open and _is_due(member, effect.name)]
    if not due:
        return []
    jobs = [member.job for member in due]
    with metrics.EFFECT_SECONDS.labels(effect.name, "batch").time(), tracing.effect(effect.name, jobs):
        results = _results(effect, jobs)
    entries = [_note(effect.name, member, results.get(member.job.delivery.id), policy) for member in due]
    return [entry for entry in entries if entry is not None]


def _is_due(member: _Member, name: str) -> bool:
    if member.job.stop():
        member.interrupted = True
        stopping = EffectError(
            Failure.INTERRUPTED, "stopping", "the worker is stopping or has lost the lease"
        )
        member.setbacks.append(Setback(name, stopping.kind, stopping.reason, str(stopping)))
        return False
    setback, answered = from_record(member.job, name)
    if setback is not None:
        member.setbacks.append(setback)
    return not answered


def _results(effect: Effect, jobs: Sequence[Job]) -> Mapping[int, Result]:
    try:
        if effect.many is not None:
            return effect.many(jobs)
        quick = {job.delivery.id: effect.quick(job) for job in jobs}
        return {identifier: outcome for identifier, outcome in quick.items() if outcome is not None}
    except EffectError as error:
        return {job.delivery.id: error for job in jobs}
    except (
        Exception
    ):  # a defect may concern one of them: each is tried alone, where it is told from the others
        log.exception("effect_defect", extra={"effect": effect.name, "deliveries": len(jobs)})
        return {}


def _note(name: str, member: _Member, result: Result | None, policy: Policy) -> Entry | None:
    """Take an effect's result over; returns what is still to be recorded."""
    if result is None:
        member.alone = True
        return None
    if isinstance(result, Outcome):
        entry = succeeded(member.job, name, result)
        metrics.EFFECTS.labels(name, str(result.state)).inc()
        return None if result.recorded else entry
    setback, failure = failed(member.job, name, result, policy, time.time())
    log_failure(member.job, setback, failure)
    member.setbacks.append(setback)
    member.interrupted = setback.kind is Failure.INTERRUPTED
    return failure
