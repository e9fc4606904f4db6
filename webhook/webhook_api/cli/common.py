"""What all commands share: exit codes, messages, output for people and for programs. Imports nothing heavy.

Exit codes: 0 as wanted; 1 not as wanted (unhealthy, not found, another answer than expected, a failed migration);
2 wrong usage; 69 a backend or the service cannot be reached; 70 a defect of this program; 75 not now, but the same
command may succeed later (somebody holds what it needs); 78 the configuration cannot be used.
"""

from __future__ import annotations

import errno
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from webhook_api.config import Need, Settings

EX_OK: Final = 0
EX_FAILED: Final = 1
EX_USAGE: Final = 2
EX_UNAVAILABLE: Final = 69
EX_DEFECT: Final = 70
EX_LATER: Final = 75
EX_CONFIG: Final = 78

READABLE: Final = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
WRITABLE: Final = click.Path(dir_okay=False, path_type=Path)

_CELL: Final = 60
"""Characters of one cell of a table; the rest is cut."""

_UNSEEN: Final = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164),
        (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(first, last + 1)
)  # fmt: skip
"""Fillers, joiners, variation selectors and the empty Braille cell: letters, marks or symbols by their category."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Failed(click.ClickException):
    """The command ends with a message on standard error and an exit code."""

    exit_code: int  # type: ignore[misc]  # click has one a class; here each has its own

    def __init__(self, message: str, code: int = EX_FAILED) -> None:
        super().__init__(message)
        self.exit_code = code

    def show(self, file: Any = None) -> None:
        """Write the message, one line for each of its own, safe for a terminal."""
        lines = [printable(line) for line in self.message.splitlines()] or [""]
        click.echo("webhook-api: " + "\n".join(lines), err=True, file=file)


def fail(message: str, code: int = EX_FAILED) -> NoReturn:
    """End the command."""
    raise Failed(message, code)


def settings(needs: frozenset[Need]) -> Settings:
    """Read the settings that a command needs. Ends the command with 78 when they cannot be used."""
    from webhook_api.config import ConfigError, load_settings

    try:
        return load_settings(needs=needs)
    except ConfigError as error:
        fail(str(error), error.exit_code)


def json_option(command: Decorated) -> Decorated:
    """Add ``--json``, handed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Output for programs: JSON.")(command)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def printable(text: str) -> str:
    """Escape what could drive a terminal, turn text around or hide in it: controls, format characters, what is unseen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character == " " or (unicodedata.category(character)[0] not in "CZ" and character not in _UNSEEN):
        return character
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
    code = ord(character)
    return short or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def plain(value: Any) -> Any:
    """A value as JSON can hold it: times as RFC 3339, sets as sorted lists, bytes as their number."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    return str(value)


def line(document: Any) -> str:
    """One line of JSON, in ASCII: nothing in it can drive a terminal."""
    return json.dumps(document, default=plain, ensure_ascii=True)


def echo_json(document: Any) -> None:
    """Print one JSON document over several lines."""
    click.echo(json.dumps(document, indent=2, default=plain, ensure_ascii=True))


def echo_lines(documents: Iterable[Any]) -> None:
    """Print one JSON object a line, as they come."""
    for document in documents:
        click.echo(line(document))


def echo_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows for people: a header, aligned columns, nothing that could harm a terminal."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    for row in [list(columns), *cells]:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if hasattr(value, "astimezone"):
        # Everywhere in the operator's zone (TZ), with its offset.
        value = value.astimezone().isoformat(sep=" ", timespec="seconds")
    text = printable(str(value))
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def read_text(path: Path) -> str:
    """A file's text without the space around it."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")


def explain(error: Exception) -> Failed | None:
    """What an unexpected exception means to an operator. None: it is click's or the pipe's own business."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return None
    return _database(error) or _backend(error) or _defect(error)


def _database(error: Exception) -> Failed | None:
    psycopg = sys.modules.get("psycopg")
    if psycopg is None or not isinstance(error, psycopg.Error):
        return None
    errors = psycopg.errors
    text = first_line(error)
    if isinstance(error, errors.UndefinedTable | errors.UndefinedColumn | errors.InvalidSchemaName):
        return Failed(f"the database's schema does not fit this version ({text}): run webhook-api migrate")
    if isinstance(error, errors.InsufficientPrivilege):
        return Failed(f"the database refuses it ({text}): see webhook-api doctor")
    if isinstance(error, errors.LockNotAvailable | errors.DeadlockDetected | errors.SerializationFailure):
        return Failed("somebody else holds these rows just now: try again", EX_LATER)
    if isinstance(error, errors.QueryCanceled):
        return Failed(
            "the database did not finish in time: narrow the filter, with --since for instance", EX_LATER
        )
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return Failed(f"the database cannot be reached: {text}", EX_UNAVAILABLE)
    return None


def _backend(error: Exception) -> Failed | None:
    names = {kind.__module__ + "." + kind.__name__ for kind in type(error).__mro__}
    away = {
        "webhook_api.db.DatabaseUnavailable",
        "webhook_api.states.EffectError",
        "redis.exceptions.RedisError",
        "minio.error.MinioException",
        "urllib3.exceptions.HTTPError",
    }
    return Failed(first_line(error), EX_UNAVAILABLE) if names & away else None


def _defect(error: Exception) -> Failed:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" at {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
    return Failed(f"a defect of this program: {type(error).__name__}: {first_line(error)}{where}", EX_DEFECT)
