"""What people read: messages in their language, times in the reader's zone, and text of others made harmless."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any, Final
from zoneinfo import ZoneInfo, available_timezones

from markupsafe import Markup, escape

from webhook_api.cli.common import printable
from webhook_api.config_console import LANGUAGES

_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@cache
def catalogue(language: str) -> dict[str, str]:
    """All messages of a language."""
    text = files("webhook_api.web").joinpath("catalogue", f"{language}.json").read_text(encoding="utf-8")
    messages: dict[str, str] = json.loads(text)
    return messages


@cache
def zones() -> frozenset[str]:
    """All zones that there are."""
    return frozenset(available_timezones())


def harmless(value: Any) -> Any:
    """Text of whoever wrote it: controls and what turns text around stand as escapes. What is not text stays."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def lines(text: str) -> Markup:
    """Text over several lines, each made harmless."""
    return Markup("\n").join(escape(printable(line.replace("\t", "    "))) for line in text.split("\n"))


class Words:
    """Messages and times for one reader."""

    def __init__(self, language: str, zone: str) -> None:
        self.language = language if language in LANGUAGES else "en"
        self.zone = ZoneInfo(zone)
        self.zone_name = zone

    def say(self, key: str, **values: Any) -> str:
        """A message. Every key is in every catalogue (a test holds that)."""
        message = catalogue(self.language)[key]
        return message.format(**values) if values else message

    def named(self, group: str, value: Any) -> str:
        """The word for a value, such as a state; the value itself where there is none."""
        return catalogue(self.language).get(f"{group}.{value}", str(value))

    def time(self, value: datetime | None, *, day: bool = True) -> Markup | str:
        """A time in the zone, with all of it for programs."""
        if value is None:
            return "–"
        shown = value.astimezone(self.zone).strftime("%Y-%m-%d %H:%M:%S" if day else "%H:%M")
        exact = value.astimezone(UTC).isoformat(timespec="milliseconds")
        return Markup('<time datetime="{}" title="{}">{}</time>').format(exact, exact, shown)

    def offset(self) -> str:
        """The zone's distance from UTC now."""
        text = datetime.now(self.zone).strftime("%z")
        return f"UTC{text[:3]}:{text[3:]}"

    def span(self, seconds: float | None) -> str:
        """A length of time in its two largest units."""
        if seconds is None:
            return "–"
        if seconds < 1:
            return f"{seconds * 1000:.0f} {self.say('unit.ms')}"
        parts: list[str] = []
        left = int(seconds)
        for size, unit in _UNITS:
            if left >= size or (unit == "s" and not parts):
                parts.append(f"{left // size} {self.say(f'unit.{unit}')}")
                left %= size
        return " ".join(parts[:2])

    def since(self, value: datetime | None) -> str:
        """How long ago a time was."""
        return "–" if value is None else self.span(max(0.0, (datetime.now(UTC) - value).total_seconds()))

    def number(self, value: float | None) -> str:
        """A count, its thousands apart."""
        return "–" if value is None else f"{value:,}".replace(",", " ")


def preferred(header: str, default: str) -> str:
    """The first language of ours that a browser asks for."""
    for part in header.split(","):
        name = part.split(";")[0].strip().lower()[:2]
        if name in LANGUAGES:
            return name
    return default
