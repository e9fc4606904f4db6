"""A PostgreSQL of the benchmark's own: the image, settings and memory limit of the embedded one.

It is filled without fsync (nobody's data), and started again as in production before anything is measured.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from pathlib import Path

import psycopg

PRODUCT = ("-c", "shared_buffers=256MB", "-c", "max_connections=200")
"""As role `backends` starts it."""
FILLING = (
    "-c", "shared_buffers=1GB", "-c", "max_connections=50", "-c", "fsync=off", "-c", "full_page_writes=off",
    "-c", "wal_level=minimal", "-c", "max_wal_senders=0", "-c", "max_wal_size=8GB", "-c", "autovacuum=off",
    "-c", "maintenance_work_mem=1GB", "-c", "max_parallel_maintenance_workers=0", "-c", "synchronous_commit=off",
)  # fmt: skip
MEMORY = "1024m"
START_SECONDS = 300.0


class Server:
    """One container and its volume, both called `name`. Others' containers are never touched."""

    def __init__(self, name: str, image: str, port: int, directory: Path) -> None:
        self.name = name
        self.image = image
        self.port = port
        self._secrets = directory / f"{name}.secrets"

    @property
    def url(self) -> str:
        """A superuser's URL."""
        password = (self._secrets / "postgres_password").read_text()
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/postgres"

    def start(self, *, filling: bool) -> None:
        """Start it on its volume, in the place of a former one, and wait until it answers."""
        self._write_secrets()
        self.stop()
        limits = ["--cpu-shares", "128"] if filling else ["--memory", MEMORY]
        _docker(
            "run", "--detach", "--name", self.name, *limits, "--shm-size", "256m",
            "--publish", f"127.0.0.1:{self.port}:5432",
            "--volume", f"{self.name}:/var/lib/postgresql", "--volume", f"{self._secrets}:/run/secrets:ro",
            self.image, *(FILLING if filling else PRODUCT),
        )  # fmt: skip
        self._wait()

    def stop(self) -> None:
        """Stop it in good order and put everything on the disk; the volume stays."""
        if self._exists():
            _docker("stop", "--time", "300", self.name)
            _docker("rm", self.name)
            os.sync()

    def remove(self) -> None:
        """Take container, volume and passwords away."""
        self.stop()
        subprocess.run(["docker", "volume", "rm", self.name], capture_output=True, check=False)
        for path in self._secrets.glob("*"):
            path.unlink()
        if self._secrets.is_dir():
            self._secrets.rmdir()

    def _exists(self) -> bool:
        found = _docker("ps", "--all", "--quiet", "--filter", f"name=^{self.name}$")
        return bool(found.strip())

    def _write_secrets(self) -> None:
        self._secrets.mkdir(parents=True, exist_ok=True)
        for name in ("postgres_password", "postgres_bot_password", "postgres_webhook_password"):
            path = self._secrets / name
            if not path.exists():
                path.write_text(secrets.token_hex(24))

    def _wait(self) -> None:
        ends = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=3).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > ends:
                    raise RuntimeError(f"{self.name} does not answer: {error}") from error
                time.sleep(0.5)
            else:
                return


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"docker {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
