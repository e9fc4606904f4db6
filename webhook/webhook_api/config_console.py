"""Settings of the console: its sessions, its cookies, its zone, and whom it asks how the service is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

ZONE: Final = "Asia/Almaty"
"""Where the operators are, unless CONSOLE_TIMEZONE or TZ says otherwise."""
LANGUAGES: Final = ("en", "ru")


class Reader(Protocol):
    """What of the settings' reader is needed here."""

    faults: list[str]

    def text(self, name: str, default: str = "") -> str:
        """Value of a setting."""
        ...

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Whole number within bounds."""
        ...

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        ...


@dataclass(frozen=True, slots=True)
class ConsoleSettings:
    """How the console behaves. Durations are seconds."""

    zone: str = ZONE
    language: str = "en"
    """Of who has chosen none and whose browser asks for none of ours."""
    idle: int = 1800
    """A session that was not used for so long has ended."""
    longest: int = 43_200
    """A session ends so long after its login, however much it is used."""
    secure_cookies: bool = True
    """Cookies go over TLS (or to this very machine) alone. False: for a browser that refuses them over a tunnel."""
    behind_edge: bool = False
    """Whether nginx stands in front and X-Real-IP is its word for the client's address."""
    instances: tuple[str, ...] = ()
    """Addresses of the API instances, whose /health the Overview shows."""
    edge: str = ""
    """``host:port`` whose certificate the Overview shows."""


def read_console(reader: Reader) -> ConsoleSettings:
    """Read the settings of the console."""
    return ConsoleSettings(
        zone=_zone(reader),
        language=_language(reader),
        idle=reader.integer("CONSOLE_IDLE_SECONDS", 1800, 60, 86_400),
        longest=reader.integer("CONSOLE_SESSION_SECONDS", 43_200, 300, 30 * 86_400),
        secure_cookies=reader.boolean("CONSOLE_SECURE_COOKIES", True),
        behind_edge=reader.boolean("CONSOLE_BEHIND_EDGE", False),
        instances=_instances(reader),
        edge=_edge(reader),
    )


def _zone(reader: Reader) -> str:
    name = reader.text("CONSOLE_TIMEZONE") or reader.text("TZ", ZONE)
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        if reader.text("CONSOLE_TIMEZONE"):
            reader.faults.append(f"CONSOLE_TIMEZONE is {name!r}: give a zone such as {ZONE}")
        return "UTC"
    return name


def _language(reader: Reader) -> str:
    language = reader.text("CONSOLE_LANGUAGE", "en").lower()
    if language not in LANGUAGES:
        reader.faults.append(f"CONSOLE_LANGUAGE is {language!r}: give one of {', '.join(LANGUAGES)}")
        return "en"
    return language


def _instances(reader: Reader) -> tuple[str, ...]:
    found = tuple(
        item.strip().rstrip("/") for item in reader.text("CONSOLE_INSTANCES").split(",") if item.strip()
    )
    for item in found:
        parts = urlsplit(item)
        if parts.scheme != "http" or not parts.hostname or parts.path or "@" in item:
            reader.faults.append("CONSOLE_INSTANCES is no list of addresses such as http://192.0.2.11:8000")
            return ()
    return found


def _edge(reader: Reader) -> str:
    edge = reader.text("CONSOLE_EDGE")
    if edge and not re.fullmatch(r"[A-Za-z0-9.-]+:[0-9]{1,5}", edge):
        reader.faults.append("CONSOLE_EDGE is not host:port")
        return ""
    return edge
