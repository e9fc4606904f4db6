"""PostgreSQL, Redis and S3 for tests: a site's embedded backends, under a name and ports of the tests' own.

As a program it lets a command find them: `python -m tests.support.backends pytest tests/integration -n 3`. All
processes of that command then share one site; without it every session of pytest makes its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.sites import Site

PREFIX = "WEBHOOK_TEST_"


@contextmanager
def backends(directory: Path, name: str = "wht-int", number: int = 9) -> Iterator[dict[str, str]]:
    """Make a site; yields where its backends are, as environment variables. Takes it down afterwards.

    `number` picks ports and subnets, as in `Site`: PostgreSQL at 20032, Redis at 20079, S3 at 20090, plus 100 each.
    """
    postgres, redis, s3 = (20000 + 100 * number + port for port in (32, 79, 90))
    ports = {"backends_postgres_port": postgres, "backends_redis_port": redis, "backends_s3_port": s3}
    site = Site(name, directory, number, ports)
    try:
        site.site("--tags", "engine,base_image,secrets,backends").must_pass()
        yield {
            f"{PREFIX}DATABASE_URL": f"postgresql://postgres:{site.secret('postgres_password')}@127.0.0.1:{postgres}/postgres",
            f"{PREFIX}REDIS_URL": f"redis://:{site.secret('redis_password')}@127.0.0.1:{redis}/0",
            f"{PREFIX}S3_ENDPOINT": f"127.0.0.1:{s3}",
            f"{PREFIX}S3_ACCESS_KEY": site.secret("minio_access_key"),
            f"{PREFIX}S3_SECRET_KEY": site.secret("minio_secret_key"),
        }
    finally:
        site.teardown()
        assert not _listens(postgres), "the tests' PostgreSQL is still there after the teardown"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main(command: list[str]) -> int:
    """Run a command with backends; returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="wht-int-") as directory, backends(Path(directory)) as found:
        return subprocess.run(command, env={**os.environ, **found}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
