"""Every command: described, documented, with --json, quick to start, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import psycopg
import pytest
from click.testing import CliRunner
from webhook_api import audit
from webhook_api.cli import COMMANDS, main
from webhook_api.cli.common import Failed, echo_table, explain, line, printable
from webhook_api.cli.filters import Moment
from webhook_api.console import Filter

from tests.support.console import typed

REPO = Path(__file__).resolve().parents[3]
GUIDE = REPO / "docs" / "receiver" / "cli.md"
PLAIN_WORDS = {"heartbeat", "count", "concurrency", "limit"}
"""Options whose name says it all."""
PROCESSES = {"serve", "worker", "console"}
"""Processes, not questions: they log JSON and answer nothing."""


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by the words that call it."""
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            for inner, leaf in command.commands.items():
                yield f"{name} {inner}", leaf
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield name, command


LEAVES = dict(commands())


def test_all_names_are_there() -> None:
    context = click.Context(main)
    assert set(main.list_commands(context)) <= set(COMMANDS)
    for name in (
        "send",
        "trace",
        "events",
        "dead-letters",
        "parked",
        "keys",
        "verify",
        "doctor",
        "migrate",
        "audit",
    ):
        assert name in main.list_commands(context)


@pytest.mark.parametrize("name", LEAVES)
def test_each_says_what_it_does(name: str) -> None:
    command = LEAVES[name]
    assert command.help, name
    result = typed({}, *name.split(), "--help")
    assert result.exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in PLAIN_WORDS:
            assert parameter.help, f"{name} {parameter.opts[0]} says nothing about itself"


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in PROCESSES])
def test_each_has_json(name: str) -> None:
    assert "--json" in {option for parameter in LEAVES[name].params for option in parameter.opts}


@pytest.mark.parametrize("name", LEAVES)
def test_each_is_documented(name: str) -> None:
    assert f"`{name}`" in GUIDE.read_text(encoding="utf-8"), f"{GUIDE.name} does not name `{name}`"


def test_exit_codes_are_documented() -> None:
    from webhook_api.cli import common

    text = GUIDE.read_text(encoding="utf-8")
    for name, code in vars(common).items():
        if name.startswith("EX_"):
            assert re.search(rf"^\| {code} \|", text, re.MULTILINE), f"{code} ({name}) is not in the table"


def test_a_command_whose_file_is_missing_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "ghost", "ghost")
    assert "ghost" not in typed({}, "--help").stdout
    assert typed({}, "ghost").exit_code == 2


def test_an_unknown_command_is_2() -> None:
    assert typed({}, "nonsense").exit_code == 2
    assert typed({}, "events", "nonsense").exit_code == 2


def imported(arguments: list[str], names: set[str], **environment: str) -> set[str]:
    """Which of `names` a command has imported when it has ended, in a process of its own."""
    program = (
        "import sys; from webhook_api.cli import main\n"
        f"try: main({arguments!r}, prog_name='x')\n"
        "except SystemExit: pass\n"
        # None stands there for what was kept out.
        "print(*(name for name, module in sys.modules.items() if module))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPO / "webhook"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return names & set(done.stdout.splitlines()[-1].split())


def test_the_health_check_imports_next_to_nothing() -> None:
    """It runs every few seconds in each container."""
    heavy = {"psycopg", "flask", "redis", "minio", "nacl", "urllib3"}
    assert imported(["health", "--url", "http://127.0.0.1:1/"], heavy) == set()


def test_trace_imports_the_clients_of_the_backends_and_nothing_of_the_processes() -> None:
    """It is started by every probe, which waits for it."""
    clients = {"psycopg", "redis", "minio"}
    others = {"flask", "nacl", "opentelemetry", "prometheus_client", "webhook_api.auth"}
    found = imported(
        ["trace", "probe-1", "--json"],
        clients | others,
        DATABASE_URL="postgresql://u@127.0.0.1:1/d",
        REDIS_URL="redis://127.0.0.1:1/0",
        MINIO_ENDPOINT="127.0.0.1:1",
        MINIO_ACCESS_KEY="access",
        MINIO_SECRET_KEY="secret-of-the-test",
        WEBHOOK_SOURCES='{"r": {"scheme": "standard", "shape": "replicate", "secrets": [{"file": "/nowhere"}]}}',
        OTEL_EXPORTER_OTLP_ENDPOINT="",
    )
    assert found == clients


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (psycopg.OperationalError("no route"), 69),
        (psycopg.errors.UndefinedTable("relation"), 1),
        (psycopg.errors.InsufficientPrivilege("denied"), 1),
        (psycopg.errors.LockNotAvailable("held"), 75),
        (psycopg.errors.DeadlockDetected("held by each other"), 75),
        (psycopg.errors.QueryCanceled("slow"), 75),
        (psycopg.errors.SyntaxError("of ours"), 70),
        (ValueError("of ours"), 70),
    ],
)
def test_every_exception_has_a_meaning(error: Exception, code: int) -> None:
    failed = explain(error)
    assert failed is not None
    assert failed.exit_code == code


def test_a_defect_is_a_line_and_70(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("doctor")
    def broken() -> None:
        raise RuntimeError("first line\nsecond \x1b[31m line")

    monkeypatch.setattr("webhook_api.cli.doctor.command", broken)
    result = typed({}, "doctor")
    assert result.exit_code == 70
    assert "RuntimeError: first line at test_cli_commands.py:" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_closed_pipe_is_no_defect() -> None:
    assert explain(BrokenPipeError(32, "Broken pipe")) is None


UNSEEN = (
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x2800, 0x3164, *range(0xFE00, 0xFE10), 0xFFA0,
)  # fmt: skip
"""Letters and marks by their category that nobody sees."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("\u1100\u1161", "\u1100\u1161"),
        ("Жанна ✓", "Жанна ✓"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\ud800", "\\ud800"),
        ("\u2028", "\\u2028"),
        ("\U000e0001", "\\U000e0001"),
        *((chr(code), f"\\u{code:04x}") for code in UNSEEN),
        *((chr(code), f"\\U{code:08x}") for code in (0xE0100, 0xE01EF)),
    ],
)
def test_nothing_drives_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert line({"a": text}).isascii()
    assert json.loads(line({"a": text})) == {"a": text}


def test_tables_are_aligned_and_cut(capsys: pytest.CaptureFixture[str]) -> None:
    runner = CliRunner()

    @click.command()
    def show() -> None:
        echo_table(("id", "text"), [(1, "x" * 500), (None, "two\nlines")])

    lines = runner.invoke(show).stdout.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 80
    assert lines[2].startswith("-   two\\nlines")


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("1w", 604_800)]
)
def test_times_ago(text: str, ago: int) -> None:
    found = Moment().convert(text, None, None)
    assert abs(found - (datetime.now(UTC) - timedelta(seconds=ago))) < timedelta(seconds=5)


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-11-23T10:00:00+05:00", "2026-11-23T05:00:00+00:00"),
        ("2026-11-23T10:00:00Z", "2026-11-23T10:00:00+00:00"),
    ],
)
def test_times_of_the_clock(text: str, utc: str) -> None:
    assert Moment().convert(text, None, None).astimezone(UTC).isoformat() == utc


@pytest.mark.parametrize(
    "arguments",
    [
        ("events", "list", "--since", "yesterday"),
        ("events", "list", "--since", "999999w"),
        ("events", "list", "--state", "lost"),
        ("events", "list", "--reason", "a'b"),
        ("events", "list", "--text", ""),
        ("events", "list", "--text", "a\0b"),
        ("events", "list", "--limit", "0"),
        ("events", "replay", "0"),
        ("events", "replay", "x"),
        ("events", "replay", "99999999999999999999"),
        ("dead-letters", "discard"),
        ("parked", "retry"),
        ("audit", "list", "--after", "-1"),
    ],
)
def test_wrong_usage_is_2_before_anything_is_connected(arguments: tuple[str, ...]) -> None:
    assert typed({"DATABASE_URL": "postgresql://u@127.0.0.1:1/d"}, *arguments).exit_code == 2


def test_no_condition_holds_what_was_typed() -> None:
    evil = "'); drop table x; --"
    wanted = Filter(
        source=evil, status=evil, request_ids=(evil,), text=evil, aside=evil, reason="word", ids=(1,)
    )
    assert evil not in wanted.where()
    assert "drop" not in wanted.where()
    assert not wanted.empty
    assert Filter().empty
    assert Filter().where() == "true"
    assert not Filter(probe=False).empty


def test_who_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WEBHOOK_OPERATOR", "SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert audit.whoami("  Aida  ") == "Aida"
    assert audit.whoami(None)
    monkeypatch.setenv("SUDO_USER", "aida")
    assert audit.whoami(" ") == "aida"
    assert len(audit.whoami("x" * 1000)) == audit.MAX_WHO


def test_a_message_of_ours_is_one_safe_line(capsys: pytest.CaptureFixture[str]) -> None:
    Failed("no\x1b[2J delivery").show()
    assert capsys.readouterr().err == "webhook-api: no\\x1b[2J delivery\n"


def typed_in_docs() -> list[tuple[str, str]]:
    """Every command line of the guides' code blocks, with the file that it stands in."""
    found = []
    for path in sorted((REPO / "docs").rglob("*.md")):
        fenced = False
        for text in path.read_text(encoding="utf-8").splitlines():
            if text.startswith("```"):
                fenced = not fenced
                continue
            match = re.match(r"(?:\$ )?(?:docker exec (?:-it? )?aisha-webhook-\S+ )?webhook-api (.+)", text)
            if fenced and match:
                found.append((path.name, match[1]))
    return found


@pytest.mark.parametrize(("guide", "words"), typed_in_docs())
def test_every_command_of_the_guides_can_be_typed(guide: str, words: str) -> None:
    arguments = shlex.split(re.split(r"\s[|>]\s?", words, maxsplit=1)[0], comments=True)
    context, command = click.Context(main), click.Command("none")
    name, rest = arguments[0], arguments[1:]
    found = main.get_command(context, name)
    assert found is not None, f"{guide}: there is no command {name}"
    command = found
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    assert not isinstance(command, click.Group) or command.invoke_without_command, f"{guide}: {words}"
    said = ""
    try:
        command.make_context(name, rest)
    except click.BadParameter as error:
        said = str(error)
    except click.exceptions.Exit:
        pass  # --help
    # The files that a guide names are not here.
    assert not said or "does not exist" in said or "No such file" in said, f"{guide}: {words}: {said}"


def test_the_guides_show_commands() -> None:
    assert len(typed_in_docs()) > 20
