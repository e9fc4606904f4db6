"""Filter options that all lists and bulk actions share, read into one :class:`~webhook_api.console.Filter`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

_AGO: Final = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_REASON: Final = re.compile(r"[A-Za-z0-9_]{1,64}")
STATES: Final = ("pending", "leased", "retry", "parked", "done", "dead")
STATUSES: Final = ("queued", "in_progress", "completed", "failed", "cancelled", "unknown")

Command = Callable[..., Any]


class Moment(click.ParamType[datetime]):
    """A time: RFC 3339, a date, or how long ago (90s, 15m, 2h, 7d, 1w). Without an offset it is the site's (TZ)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Read it."""
        if isinstance(value, datetime):
            return value
        ago = _AGO.fullmatch(value.strip())
        try:
            if ago:
                return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
            return datetime.fromisoformat(value.strip()).astimezone()
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is no time: 2026-11-23T10:00:00+05:00, 2026-11-23, or 15m, 2h, 7d ago", param, ctx
            )


def _word(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not _REASON.fullmatch(value):
        raise click.BadParameter("a reason is one word of letters, digits and _", ctx, param)
    return value


def _text(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and (not value or "\x00" in value):
        raise click.BadParameter("give some text, without NUL", ctx, param)
    return value


def _texts(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in (_text(ctx, param, item) for item in value) if text)


_TIMES: Final = (
    click.option(
        "--since", type=Moment(), help="First seen at this time or later: 2h, 7d, 2026-11-23, RFC 3339."
    ),
    click.option("--until", type=Moment(), help="First seen before this time."),
)
_FIELDS: Final = (
    click.option(
        "--source", metavar="NAME", callback=_text, help="Of this sender (fal, manual, reconcile, …)."
    ),
    click.option("--status", type=click.Choice(STATUSES), help="What the delivery reports."),
    click.option(
        "--request-id", "request_ids", multiple=True, callback=_texts, help="Of this request (repeatable)."
    ),
    click.option("--avatar-id", callback=_text, help="Of this avatar."),
    click.option(
        "--reason", callback=_word, help="With this reason in its error or of an effect: object_refused, …"
    ),
    click.option(
        "--text", callback=_text, help="With this text in its error or body. Reads bodies: give --since too."
    ),
    click.option(
        "--aside", callback=_word, help="Kept aside for this reason (stale, future, malformed, …), or any."
    ),
    click.option("--probe/--no-probe", default=None, help="Only probes, or none."),
)
_STATE: Final = click.option(
    "--state", "states", type=click.Choice(STATES), multiple=True, help="In this state (repeatable)."
)
_IDS: Final = click.argument("ids", type=click.IntRange(1, 2**63 - 1), nargs=-1, metavar="[ID]...")


def filters(*, states: bool = True, ids: bool = True) -> Callable[[Command], Command]:
    """Add the options; the command gets them as one argument ``wanted``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**given: Any) -> Any:
            from webhook_api.console import Filter

            names = ("ids", "since", "until", "source", "status", "states", "request_ids", "avatar_id", "reason",
                     "text", "aside", "probe")  # fmt: skip
            values = {name: given.pop(name) for name in names if name in given}
            return command(wanted=Filter(**values), **given)

        chosen = (*_TIMES, *_FIELDS, *((_STATE,) if states else ()), *((_IDS,) if ids else ()))
        decorated: Command = call
        for option in reversed(chosen):
            decorated = option(decorated)
        return decorated

    return decorate
