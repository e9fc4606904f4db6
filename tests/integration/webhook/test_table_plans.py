"""No question that workers, console, metrics or retention ask reads a big table: counted, not guessed from plans.

`python -m bench.table` measures the same questions at ten million rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from bench.table.fill import fill
from bench.table.measure import question, session
from bench.table.queries import QUERIES, Known, Query, know
from tests.support.databases import migrated_database

pytestmark = pytest.mark.backends

ROWS = 200_000
BOUND = ROWS * 3 // 20
"""Index entries and rows together. The biggest question fetches a few thousand; a scan would be 200,000 and more."""


@pytest.fixture(scope="module")
def table(database_url: str) -> Iterator[tuple[str, Known]]:
    """A table of 200,000 deliveries."""
    with migrated_database(database_url) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("set synchronous_commit = off")
            fill(connection, ROWS, lambda _: None, effects=("raw_archive", "stream"))
            known = know(connection)
            connection.execute("analyze webhook.deliveries")
        yield url, known


@pytest.mark.parametrize("query", QUERIES, ids=[query.name for query in QUERIES])
def test_a_question_reads_few_rows(table: tuple[str, Known], query: Query) -> None:
    url, known = table
    with session(url) as connection:
        answer = question(connection, query, known, times=2)
    assert None not in answer["seconds"], "it was not answered in 30 s"
    assert answer["rows_read"] < BOUND


def test_the_count_sees_a_scan(table: tuple[str, Known]) -> None:
    url, known = table
    scan = Query(
        "scan", lambda c, _: c.execute("select count(*) from webhook.deliveries where body = ''").fetchone()
    )
    with session(url) as connection:
        assert question(connection, scan, known, times=1)["rows_read"] >= ROWS


def test_the_migrated_table_has_no_index_that_is_not_valid(table: tuple[str, Known]) -> None:
    with psycopg.connect(table[0]) as connection:
        broken = connection.execute(
            "select indexrelid::regclass::text from pg_index where not indisvalid"
        ).fetchall()
    assert broken == []
