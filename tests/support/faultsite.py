"""PostgreSQL, Redis and an S3 server of the fault tests' own, which may be killed: the embedded backends of a site."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg

from tests.support.sites import Site

SOAK = bool(os.environ.get("FAULTS_SOAK"))
NAME, NUMBER = ("wht-soak", 4) if SOAK else ("wht-faults", 6)
"""Of the site: picks subnets and ports that no other site of the tests has. A soak stands beside a `make test`."""
POSTGRES_PORT, REDIS_PORT, S3_PORT, SMALL_PORT = (20_000 + 100 * NUMBER + n for n in (61, 62, 63, 64))


def docker(*arguments: str, check: bool = True, timeout: float = 120) -> str:
    """Output of a docker command. Raises AssertionError with its error text."""
    run = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    assert not check or run.returncode == 0, f"docker {' '.join(arguments)}: {run.stderr}"
    return run.stdout.strip()


@dataclass(frozen=True)
class Server:
    """One backend in its container."""

    container: str
    port: int

    def kill(self) -> None:
        """SIGKILL, as the kernel sends when memory is out. The engine does not start it again."""
        docker("kill", "--signal", "KILL", self.container)

    def start(self) -> None:
        """Start after a kill."""
        docker("start", self.container)

    def restart(self) -> None:
        """An orderly restart, as an update does."""
        docker("restart", "--time", "30", self.container)

    def pause(self) -> None:
        """Stop its processes in the middle of whatever they do."""
        docker("pause", self.container)

    def unpause(self) -> None:
        """Let them go on."""
        docker("unpause", self.container)

    @property
    def state(self) -> str:
        """running, exited, paused …"""
        return docker("inspect", "--format", "{{.State.Status}}", self.container)

    def heal(self) -> None:
        """Make it run, whatever a test has done to it."""
        if self.state == "paused":
            self.unpause()
        if self.state != "running":
            self.start()


@dataclass(frozen=True)
class FaultSite:
    """The servers and what is needed to use them."""

    home: Path
    postgres: Server
    redis: Server
    s3: Server
    postgres_image: str

    def secret(self, name: str) -> str:
        """A generated secret."""
        return (self.home / "secrets" / name).read_text().strip()

    def superuser(self, database: str = "postgres", port: int = 0) -> str:
        """URL of the superuser, straight to a server."""
        password = quote(self.secret("postgres_password"), safe="")
        return f"postgresql://postgres:{password}@127.0.0.1:{port or self.postgres.port}/{database}"

    def heal(self) -> None:
        """Bring all servers back and wait until they answer."""
        for server in (self.postgres, self.redis, self.s3):
            server.heal()
        wait_postgres(self.superuser())


def wait_postgres(url: str, seconds: float = 60) -> None:
    """Wait until a server takes statements."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with psycopg.connect(url, connect_timeout=2) as connection:
                connection.execute("select 1")
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, f"PostgreSQL does not answer within {seconds:.0f} s"
            time.sleep(0.1)


@contextlib.contextmanager
def fault_site(directory: Path) -> Iterator[FaultSite]:
    """A site's backends for a session; all of it is removed at the end."""
    ports = {
        "backends_postgres_port": POSTGRES_PORT, "backends_redis_port": REDIS_PORT, "backends_s3_port": S3_PORT
    }  # fmt: skip
    with _alone():
        yield from _fault_site(Site(NAME, directory, NUMBER, ports))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """A second run would take the site down under the first one."""
    with (Path(tempfile.gettempdir()) / f"{NAME}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AssertionError(f"another run of the fault tests uses {NAME} on this machine") from None
        yield


def _fault_site(site: Site) -> Iterator[FaultSite]:
    try:
        site.site("--tags", "engine,base_image,secrets,backends").must_pass()
        yield FaultSite(
            site.home,
            Server(f"{NAME}-postgres", POSTGRES_PORT),
            Server(f"{NAME}-redis", REDIS_PORT),
            Server(f"{NAME}-s3", S3_PORT),
            docker("inspect", "--format", "{{.Config.Image}}", f"{NAME}-postgres"),
        )
    finally:
        site.teardown()


@dataclass(frozen=True)
class SmallPostgres:
    """A PostgreSQL whose disk can be filled: its volume is a small tmpfs, kept mounted by a second container."""

    server: Server
    keeper: str

    def fill(self) -> None:
        """Take all the space that is left."""
        run = docker(
            "exec", self.keeper, "sh", "-c", "cat /dev/zero > /volume/ballast 2>&1; df -k /volume | tail -1"
        )
        assert " 0 100%" in run, f"the disk is not full: {run}"

    def free(self) -> None:
        """Give the space back."""
        docker("exec", self.keeper, "rm", "-f", "/volume/ballast")


@contextlib.contextmanager
def small_postgres(site: FaultSite, megabytes: int = 160) -> Iterator[SmallPostgres]:
    """A second PostgreSQL of the same image with the same secrets, on a disk of `megabytes`."""
    name = f"{NAME}-small-{uuid.uuid4().hex[:6]}"
    keeper = f"{name}-keeper"
    docker(
        "volume", "create", "--driver", "local", "--opt", "type=tmpfs", "--opt", "device=tmpfs",
        "--opt", f"o=size={megabytes}m,uid=10011,gid=10011,mode=0700", name,
    )  # fmt: skip
    try:
        docker(
            "run", "--detach", "--name", keeper, "--network", "none", "--user", "10011:10011", "--entrypoint", "sleep",
            "--volume", f"{name}:/volume", site.postgres_image, "infinity",
        )  # fmt: skip
        docker(
            "run", "--detach", "--name", name, "--restart", "unless-stopped", "--publish", f"127.0.0.1:{SMALL_PORT}:5432",
            "--volume", f"{name}:/var/lib/postgresql", "--volume", f"{site.home}/secrets/postgres:/run/secrets:ro",
            "--tmpfs", "/run/postgresql:uid=10011,gid=10011,mode=0700", "--shm-size", "128m",
            site.postgres_image, "-c", "max_wal_size=32MB", "-c", "min_wal_size=32MB", "-c", "max_connections=100",
        )  # fmt: skip
        wait_postgres(site.superuser(port=SMALL_PORT))
        yield SmallPostgres(Server(name, SMALL_PORT), keeper)
    finally:
        docker("rm", "--force", "--volumes", name, keeper, check=False)
        docker("volume", "rm", "--force", name, check=False)
