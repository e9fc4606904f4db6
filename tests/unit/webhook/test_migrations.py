"""Migrations: their numbering, their checksums, and what is pending."""

from __future__ import annotations

from pathlib import Path

import pytest
from webhook_api.migrate import Migration, MigrationError, packaged, pending, read


def reason(call: object) -> str:
    with pytest.raises(MigrationError) as caught:
        call()  # type: ignore[operator]
    return caught.value.reason


def test_the_packaged_ones_are_numbered_without_gaps() -> None:
    assert [migration.version for migration in packaged()] == list(range(1, len(packaged()) + 1))


@pytest.mark.parametrize("names", [["0002_b.sql"], ["0001_a.sql", "0003_c.sql"], ["0001_a.sql", "0001_b.sql"],
                                   ["1_a.sql"], ["0001-a.sql"], ["0001_A.sql"]])  # fmt: skip
def test_odd_numbering_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("select 1")
    assert reason(lambda: read(tmp_path)) == "numbering"


def test_other_files_are_no_migrations(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / "0001_a.sql").write_text("select 1")
    assert [migration.name for migration in read(tmp_path)] == ["0001_a"]


def test_an_applied_file_must_not_change() -> None:
    migration = Migration(1, "0001_a", "select 1")
    assert pending([migration], {1: migration.checksum}) == []
    assert reason(lambda: pending([migration], {1: "other"})) == "checksum"


def test_a_database_that_is_ahead_is_left_alone() -> None:
    migration = Migration(1, "0001_a", "select 1")
    assert pending([migration], {1: migration.checksum, 2: "of a newer release"}) == []


def test_statements_of_a_file_outside_a_transaction() -> None:
    text = "-- outside a transaction\n-- a; comment\ncreate index i on t (a);\ncreate index j\n  on t (b);\n-- end\n"
    migration = Migration(1, "0001_a", text)
    assert migration.outside
    assert [part.split("\n")[-1].strip() for part in migration.statements] == [
        "create index i on t (a)",
        "on t (b)",
    ]
    assert not Migration(1, "0001_a", "create index i on t (a);").outside


def test_only_files_outside_a_transaction_build_indexes_concurrently() -> None:
    for migration in packaged():
        sql = "\n".join(line for line in migration.sql.splitlines() if not line.startswith("--"))
        assert ("concurrently" in sql) == migration.outside, migration.name
