"""What several files of tests stand on: a database, stream and bucket of a test's own, a media host, a migrated database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.databases import migrated_database
from tests.support.mediahost import MediaHost
from tests.support.workerlab import Bucket, Lab, lab


@pytest.fixture
def bare_bench(database_url: str, redis_url: str, s3: Bucket, tmp_path: Path) -> Iterator[Lab]:
    """Without the bot's tables."""
    with lab(database_url, redis_url, s3, tmp_path) as made:
        yield made


@pytest.fixture
def bench(bare_bench: Lab) -> Lab:
    """With the bot's tables."""
    bare_bench.make_bot_tables()
    return bare_bench


@pytest.fixture
def media() -> Iterator[MediaHost]:
    """A host of artifacts."""
    with MediaHost() as host:
        yield host


@pytest.fixture(scope="module")
def url(database_url: str) -> Iterator[str]:
    """A migrated database that the tests of a file share."""
    with migrated_database(database_url) as made:
        yield made
