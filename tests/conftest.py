"""Fixtures that more than one kind of test needs: real backends under a name of their own."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "webhook"))

from tests.support.backends import PREFIX
from tests.support.backends import backends as site_backends


@dataclass(frozen=True)
class ObjectStore:
    """Where the S3 server of the tests answers, and a bucket name of this session's own."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """PostgreSQL, Redis and S3: those the environment names, or a site's embedded ones for this session."""
    if f"{PREFIX}DATABASE_URL" in os.environ:
        yield {key: value for key, value in os.environ.items() if key.startswith(PREFIX)}
        return
    with site_backends(tmp_path_factory.mktemp("wht-int")) as found:
        yield found


@pytest.fixture(scope="session")
def database_url(backends: dict[str, str]) -> str:
    """A superuser's URL of a real PostgreSQL; tests make databases of their own in it."""
    return backends["WEBHOOK_TEST_DATABASE_URL"]


@pytest.fixture(scope="session")
def redis_url(backends: dict[str, str]) -> str:
    """URL of a real Redis with append-only file."""
    return backends["WEBHOOK_TEST_REDIS_URL"]


@pytest.fixture(scope="session")
def s3(backends: dict[str, str]) -> ObjectStore:
    """A real S3 server."""
    return ObjectStore(
        endpoint=backends["WEBHOOK_TEST_S3_ENDPOINT"],
        access_key=backends["WEBHOOK_TEST_S3_ACCESS_KEY"],
        secret_key=backends["WEBHOOK_TEST_S3_SECRET_KEY"],
        bucket=f"test-{uuid.uuid4().hex[:12]}",
    )
