"""PostgreSQL, Redis and S3 of a run: those that ``WEBHOOK_TEST_*`` names, or an embedded site of the run's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.backends import PREFIX
from tests.support.backends import backends as site_backends


@dataclass(frozen=True)
class Backends:
    """Where they answer."""

    database_url: str
    """A superuser's; runs make databases of their own in it."""
    redis_url: str
    s3: dict[str, str]


@contextmanager
def backends() -> Iterator[Backends]:
    """Real servers for the length of a run."""
    names = ("DATABASE_URL", "REDIS_URL", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY")
    with ExitStack() as stack:
        found: Mapping[str, str] = os.environ
        if f"{PREFIX}DATABASE_URL" not in os.environ:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            found = stack.enter_context(site_backends(Path(directory), "wht-bench", 8))
        yield _backends(**{name: found[PREFIX + name] for name in names})


def _backends(
    DATABASE_URL: str,
    REDIS_URL: str,
    S3_ENDPOINT: str,
    S3_ACCESS_KEY: str,
    S3_SECRET_KEY: str,
) -> Backends:
    return Backends(
        DATABASE_URL,
        REDIS_URL,
        {"MINIO_ENDPOINT": S3_ENDPOINT, "MINIO_ACCESS_KEY": S3_ACCESS_KEY, "MINIO_SECRET_KEY": S3_SECRET_KEY},
    )
