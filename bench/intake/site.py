"""A site of the run's own: nginx, two instances and PostgreSQL in containers, as `make up` makes them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nacl.signing import SigningKey

from bench.intake.targets import Target, ready
from tests.support.sites import Site

NUMBER = 8
PORTS = {"backends_postgres_port": 20832, "backends_redis_port": 20879, "backends_s3_port": 20890}


@contextmanager
def edge_and_instance(work: Path) -> Iterator[list[Target]]:
    """nginx before both instances, and one instance alone. The worker is stopped: only the intake is measured."""
    site = Site("wht-bench", work / "site", NUMBER, dict(PORTS))
    try:
        site.site().must_pass()
        _docker("stop", f"{site.name}-worker")
        key = SigningKey(bytes.fromhex(site.secret("fal_dev_key")))
        url = f"postgresql://postgres:{site.secret('postgres_password')}@127.0.0.1:{PORTS['backends_postgres_port']}/aisha"
        first, second = (_pid(f"{site.name}-api-{number}") for number in (1, 2))
        edge, alone = site.settings["site_http_port"], site.settings["site_api_ports"][0]
        yield [
            ready(Target("nginx, 2 instances", f"127.0.0.1:{edge}", url, [first, second], key), work),
            ready(Target("1 instance", f"127.0.0.1:{alone}", url, [first], key), work),
        ]
    finally:
        site.teardown()


def _pid(container: str) -> int:
    return int(_docker("inspect", "--format", "{{.State.Pid}}", container))


def _docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], check=True, capture_output=True, text=True).stdout.strip()
