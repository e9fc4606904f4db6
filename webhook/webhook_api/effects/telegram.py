"""A message to one Telegram chat: `telegram` says how a training ended, `telegram_alarm` that an effect was given up.

Bot API (core.telegram.org/bots/api#sendmessage) over HTTPS. The token is part of the path, so no path is ever shown.
Telegram has no idempotency key. A message is announced in the effect's record before it is sent; when an attempt ends
without an answer, the next one sends it again and says that it may be a repetition (docs/decisions/0440).
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import psycopg

from webhook_api.bodies import clean_text
from webhook_api.db import DatabaseUnavailable
from webhook_api.effects import avatar
from webhook_api.effects.base import Job, Outcome, Record, Result, Tools, record
from webhook_api.outbound import MAX_RETRY_AFTER, Answer, NotSent, Outbound
from webhook_api.states import EffectError, EffectState, Failure

NAME: Final = "telegram"
ALARM: Final = "telegram_alarm"
GIVEN_UP: Final = "given_up"
_ALWAYS: Final = frozenset({"avatar", "raw_archive", "archive", "stream"})
MAX_VALUE: Final = 500
"""Characters of a value in a message: a message has 4,096."""
_TITLES: Final = {
    "completed": "✅ Training completed",
    "failed": "❌ Training failed",
    "cancelled": "⏹ Training cancelled",
}
_REPEATED: Final = "<i>This message may be a repetition: an earlier attempt ended without an answer.</i>"


def text(title: str, lines: Iterable[tuple[str, str | None]], *, repeated: bool) -> str:
    """The message as Telegram's HTML. Everything from outside is cut and escaped; empty values are left out."""
    shown = [f"<b>{html.escape(title)}</b>"]
    shown += [f"{html.escape(name)}: {escaped(value)}" for name, value in lines if value]
    if repeated:
        shown.append(_REPEATED)
    return "\n".join(shown)


def escaped(value: str) -> str:
    """`value` as one line of text in HTML, with what Telegram would read as markup made plain."""
    line = " ".join(clean_text(value).split())
    return html.escape(line if len(line) <= MAX_VALUE else f"{line[: MAX_VALUE - 1]}…", quote=False)


def many(jobs: Sequence[Job]) -> dict[int, Result]:
    """What needs no message, or gets none now. The others are to be run alone."""
    return _many(jobs, quick, _after_the_avatar)


def many_alarms(jobs: Sequence[Job]) -> dict[int, Result]:
    """The same for alarms."""
    return _many(jobs, quick_alarm, _given_up)


def _many(
    jobs: Sequence[Job], known: Callable[[Job], Outcome | None], check: Callable[[Job], object]
) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for job in jobs:
        try:
            outcome = known(job)
            if outcome is not None:
                found[job.delivery.id] = outcome
            elif job.tools.telegram is not None:
                check(job)
                job.tools.telegram.admit(job)
        except EffectError as error:
            found[job.delivery.id] = error
    return found


def _after_the_avatar(job: Job) -> None:
    before = job.records.get(avatar.NAME)
    if before is not None and not before.final:
        raise EffectError(Failure.WAITING, "avatar_pending", "the avatar comes first")


def _given_up(job: Job) -> dict[str, Record]:
    """The effects that were given up. Raises `EffectError` (waiting) while another may still end well."""
    others = {name: entry for name, entry in job.records.items() if name != ALARM}
    waiting = sorted(name for name, entry in others.items() if not entry.final)
    if waiting:
        raise EffectError(Failure.WAITING, "others_pending", f"not ended yet: {', '.join(waiting)}")
    return {name: entry for name, entry in others.items() if not entry.settled}


def run(job: Job) -> Outcome:
    """Say how the training ended."""
    known = quick(job)
    if known is not None:
        return known
    _after_the_avatar(job)
    row = job.detail(avatar.NAME)
    delivery, event = job.delivery, job.event
    title = _TITLES[delivery.status]
    if delivery.status == "completed" and row.get("after") == "error":
        title = "⚠ Training completed, but its result cannot be used"
    lines = [
        ("Request", delivery.request_id),
        ("Avatar", str(row.get("avatar_id") or "")),
        ("Type", str(row.get("training_type") or "")),
        ("Error", row.get("training_error") or (event.error if event else job.unreadable)),
        ("Delivery", str(delivery.id)),
    ]
    return _send(job, NAME, title, lines)


def run_alarm(job: Job) -> Outcome:
    """Say which effects were given up, once all others have ended."""
    known = quick_alarm(job)
    if known is not None:
        return known
    given_up = _given_up(job)
    if not given_up:
        return Outcome.skipped("nothing was given up")
    lines: list[tuple[str, str | None]] = [("Request", job.delivery.request_id)]
    lines += [
        (name, f"{entry.detail.get('reason', '')}: {entry.detail.get('message', '')}")
        for name, entry in sorted(given_up.items())
    ]
    lines.append(("Delivery", str(job.delivery.id)))
    return _send(job, ALARM, "🚨 Given up on a delivery", lines)


def quick(job: Job) -> Outcome | None:
    """What needs no message."""
    if job.delivery.probe:
        return Outcome.skipped("a probe")
    outlet = job.tools.telegram
    if outlet is None or job.delivery.status not in outlet.notify:
        return Outcome.skipped("not asked for in TELEGRAM_NOTIFY")
    return None


def quick_alarm(job: Job) -> Outcome | None:
    """What needs no message: a probe, and a delivery for which everything has gone well already."""
    if job.delivery.probe:
        return Outcome.skipped("a probe")
    others = {name: entry for name, entry in job.records.items() if name != ALARM}
    if others.keys() >= _ALWAYS and all(entry.settled for entry in others.values()):
        return Outcome.skipped("nothing was given up")
    return None


def wanted(tools: Tools) -> bool:
    """Whether the settings ask for messages about endings."""
    return tools.telegram is not None and bool(tools.telegram.notify - {GIVEN_UP})


def wanted_alarm(tools: Tools) -> bool:
    """Whether the settings ask for messages about what was given up."""
    return tools.telegram is not None and GIVEN_UP in tools.telegram.notify


def _send(job: Job, name: str, title: str, lines: Iterable[tuple[str, str | None]]) -> Outcome:
    outlet = job.tools.telegram
    assert outlet is not None  # noqa: S101  (for the type checker; see `wanted`)
    repeated = bool(job.detail(name).get("announced"))
    outlet.refuse_early()
    _announce(job, name)
    try:
        message_id = outlet.send(text(title, lines, repeated=repeated), job)
    except EffectError as error:
        # Where Telegram said no, or heard nothing at all, the next attempt is no repetition.
        kept: dict[str, object] = {
            **job.detail(name),
            "announced": repeated or not isinstance(error, Refused | NotSent),
        }
        raise EffectError(error.kind, error.reason, str(error), kept, wait=error.wait) from None
    return Outcome(EffectState.DONE, {"message_id": message_id, "repeated": repeated})


def _announce(job: Job, name: str) -> None:
    """Record that a message is about to be sent."""
    before = job.detail(name)
    detail = {**before, "announced": True, "announced_at": time.time()}
    try:
        with job.tools.borrow() as connection, connection.transaction():
            record(
                connection,
                job.delivery,
                name,
                EffectState.FAILED,
                json.dumps(detail),
                "not finished",
                tries=0,
            )
    except (DatabaseUnavailable, psycopg.Error) as error:
        raise EffectError(Failure.OUTAGE, "database_unavailable", str(error), dict(before)) from error


class Refused(EffectError):
    """Telegram answered, and took no message."""


class TelegramOutlet:
    """One bot and one chat."""

    def __init__(self, outbound: Outbound, token: str, chat_id: str, notify: frozenset[str]) -> None:
        self._outbound = outbound
        self._path = f"{outbound.place.path.rstrip('/')}/bot{token}/sendMessage"
        self._chat_id = chat_id
        self.notify = notify

    def admit(self, job: Job) -> None:
        """Raise `EffectError` when no call would be made for it now."""
        self._outbound.admit(job.delivery.id)

    def refuse_early(self) -> None:
        """Raise `EffectError` when no call would be made now anyway: nothing is announced then."""
        self._outbound.refuse_early()

    def send(self, message: str, job: Job) -> int:
        """Send the message; returns its id in the chat. Raises `EffectError`, `Refused` when Telegram said no."""
        return self.say(message, job.stop, job.delivery.id)

    def say(self, message: str, stop: Callable[[], bool], delivery_id: int | None = None) -> int:
        """The same for what is no delivery's own."""
        document = {
            "chat_id": self._chat_id,
            "text": message,
            "parse_mode": "HTML",
            "link_preview_options": {"is_disabled": True},
        }
        headers = {"Content-Type": "application/json", "User-Agent": "aisha-webhook-telegram/1"}
        body = json.dumps(document).encode()
        answer = self._outbound.post(self._path, body, headers, stop, delivery_id)
        said = _read(answer)
        if answer.good and said.get("ok") is True:
            result = said.get("result")
            found = result.get("message_id") if isinstance(result, dict) else None
            return found if isinstance(found, int) else 0
        raise self._refused(answer, said)

    def _refused(self, answer: Answer, said: dict[str, Any]) -> EffectError:
        status = answer.status
        description = " ".join(clean_text(str(said.get("description", ""))).split())[:200]
        message = (
            f"Telegram answered {status}: {description}" if description else f"Telegram answered {status}"
        )
        if status == 429:
            wait = _retry_after(said) or answer.retry_after or 1.0
            self._outbound.leave_alone(wait)
            return Refused(Failure.UNREACHABLE, "telegram_http_429", message, wait=wait)
        if status in (401, 404):
            message += "; is TELEGRAM_BOT_TOKEN right?"
            return Refused(Failure.UNREACHABLE, f"telegram_http_{status}", message)
        if status >= 500:
            # A gateway's answer: the message may have been sent all the same.
            return EffectError(
                Failure.UNREACHABLE, f"telegram_http_{status}", message, wait=answer.retry_after or 0.0
            )
        if answer.good:
            return EffectError(
                Failure.THEIRS, "telegram_answer_unreadable", "Telegram's answer cannot be read"
            )
        return Refused(Failure.THEIRS, f"telegram_http_{status}", message)


def _read(answer: Answer) -> dict[str, Any]:
    try:
        said = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _retry_after(said: dict[str, Any]) -> float | None:
    parameters = said.get("parameters")
    value = parameters.get("retry_after") if isinstance(parameters, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return None
    return min(float(value), MAX_RETRY_AFTER)
