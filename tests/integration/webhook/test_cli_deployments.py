"""Deployment records in the database: imported once however often, listed, shown, and never spoiled by a bad line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.console import document, good, lines, typed
from tests.support.databases import migrated_database

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def database(database_url: str) -> Iterator[str]:
    with migrated_database(database_url) as url:
        yield url


@pytest.fixture
def env(database: str) -> dict[str, str]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("truncate webhook.deployments")
    return {"DATABASE_URL": database, "ENVIRONMENT": "test", "INSTANCE_ID": "api-9"}


def record(number: int, **changes: Any) -> dict[str, Any]:
    whole = {
        "id": f"d-20261123T0400{number:02}-aaaaaa", "host": "webhook-1", "kind": "deploy",
        "started": f"2026-11-23T04:00:{number:02}Z", "ended": f"2026-11-23T04:01:{number:02}Z", "seconds": 60.0,
        "who": "aida", "controller": "laptop", "from": None, "to": "r-0123456789ab", "images": {"webhook-api": "x@sha256:1"},
        "result": "done", "reason": None, "failed_at": None, "changed": ["api-1"], "version": "4f2c1aa",
        "steps": [{"step": "replace", "service": "api-1", "seconds": 3.1}],
    }  # fmt: skip
    return whole | changes


def write(path: Path, *records: Any) -> Path:
    path.write_text(
        "".join(f"{found if isinstance(found, str) else json.dumps(found)}\n" for found in records)
    )
    return path


def test_an_import_can_be_repeated_and_goes_on_where_it_ended(env: dict[str, str], tmp_path: Path) -> None:
    file = write(tmp_path / "r", *(record(number) for number in range(3)))
    assert document(env, "deployments", "import", file) == {"new": 3, "known": 0, "invalid": []}
    more = write(tmp_path / "m", *(record(number) for number in range(5)), record(0, host="webhook-2"))
    assert document(env, "deployments", "import", more) == {"new": 3, "known": 3, "invalid": []}
    listed = lines(env, "deployments", "list")
    assert listed[0] == record(4)
    assert [found["host"] for found in listed[-2:]] == ["webhook-1", "webhook-2"]


def test_records_come_by_standard_input(env: dict[str, str]) -> None:
    result = typed(env, "deployments", "import", answer=json.dumps(record(1)) + "\n")
    assert (result.exit_code, result.stdout) == (0, "1 new, 0 known already\n")


def test_lines_that_are_no_records_are_named_and_the_others_come_in(
    env: dict[str, str], tmp_path: Path
) -> None:
    bad = ["{", "[]", record(1, id=""), record(1, kind="x"), record(1, result=None), record(1, started="today"),
           record(1, started="2026-11-23T04:00:00"), record(1, who=3), record(1, reason="\x00"),
           record(1, host=None)]  # fmt: skip
    result = typed(env, "deployments", "import", write(tmp_path / "r", *bad, "", record(2)), "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["new"], len(found["invalid"])) == (1, 10)
    assert found["invalid"][0].startswith("line 1: ")
    assert "were left out" in result.stderr


def test_runs_are_found_by_host_kind_result_and_time(env: dict[str, str], tmp_path: Path) -> None:
    records = [
        record(1),
        record(2, host="webhook-2", kind="rollback"),
        record(3, result="interrupted", ended=None, started="2030-01-01T00:00:00Z", reason="killed \x1b[2J"),
    ]
    good(env, "deployments", "import", write(tmp_path / "r", *records))
    for option, value, expected in (("--host", "webhook-2", 1), ("--kind", "deploy", 2), ("--result", "interrupted", 1),
                                    ("--since", "2029-01-01", 1), ("--limit", 2, 2)):  # fmt: skip
        assert len(lines(env, "deployments", "list", option, value)) == expected
    table = good(env, "deployments", "list").stdout
    assert "interrupted" in table
    assert "\x1b" not in table


def test_one_run_is_shown_in_full_on_each_host(env: dict[str, str], tmp_path: Path) -> None:
    good(
        env, "deployments", "import", write(tmp_path / "r", record(1), record(2), record(2, host="webhook-2"))
    )
    shown = good(env, "deployments", "show", "last").stdout
    for part in (
        record(2)["id"],
        "webhook-1",
        "webhook-2",
        "replace api-1: 3.1 s",
        "image webhook-api: x@sha256:1",
    ):
        assert part in shown
    assert document(env, "deployments", "show", record(1)["id"]) == record(1)
    missing = typed(env, "deployments", "show", "d-none")
    assert missing.exit_code == 1
    assert "deployments list" in missing.stderr


def test_a_clock_that_was_set_back_makes_no_record_impossible(env: dict[str, str], tmp_path: Path) -> None:
    good(env, "deployments", "import", write(tmp_path / "r", record(9, ended="2026-11-23T03:00:00Z")))
    assert lines(env, "deployments", "list")[0]["ended"] == "2026-11-23T03:00:00Z"
