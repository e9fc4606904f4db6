"""What is measured: processes with a database of their own, started and stopped by the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from nacl.signing import SigningKey
from webhook_api import db
from webhook_api.auth.signing import public_jwks
from webhook_api.migrate import migrate

from bench.intake import signed
from bench.intake.backends import Backends
from tests.support.apiservice import PACKAGE, free_port
from tests.support.databases import fresh_database

REPO = Path(__file__).resolve().parents[2]
WORKERS = 2
MOST = 9_000
"""Requests a second that are signed for a run without a rate. Who answers more ends early."""


@dataclass
class Target:
    """A running target."""

    name: str
    address: str
    database_url: str
    roots: list[int]
    """Processes that make it up, with all their children."""
    key: SigningKey
    extra: dict[str, str] = field(default_factory=dict)
    """Headers beside the signed ones."""

    def send(self, work: Path, connections: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
        """Sign fresh requests, send them, and compare what was answered with what is stored."""
        before = self.rows()
        file = work / f"{self.name}.requests"
        count = round(seconds * (rate or min(MOST, 2_500 * connections))) + connections
        signed.write(file, self.key, count, {"Host": "bench", **self.extra})
        command = [sys.executable, "-m", "bench.intake.load", self.address, str(file), "--seconds", str(seconds),
                   "--connections", str(connections)]  # fmt: skip
        if rate:
            command += ["--rate", str(rate)]
        environment = {**os.environ, "PYTHONPATH": f"{PACKAGE}:{REPO}"}
        used = self.cpu_seconds()
        run = subprocess.run(command, capture_output=True, check=True, env=environment, cwd=REPO)
        file.unlink()
        result: dict[str, Any] = json.loads(run.stdout)
        # Of the target's own processes, not of PostgreSQL: it hardly depends on what else the machine does.
        result["cpu_us"] = round((self.cpu_seconds() - used) / max(1, result["taken"]) * 1e6)
        stored = self.rows() - before
        if stored < result["taken"]:
            raise AssertionError(f"{self.name}: {result['taken']} answered with 200, {stored} stored")
        return result

    def rows(self) -> int:
        """Rows in the inbox."""
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute("select count(*) from webhook.deliveries").fetchone()
        return int(row[0]) if row else 0

    def cpu_seconds(self) -> float:
        """Processor time of the whole process tree so far."""
        ticks = 0
        for process in self._processes():
            fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _processes(self) -> list[int]:
        return [process for root in self.roots for process in _tree(root)]

    def memory(self) -> dict[str, float]:
        """PSS and RSS of the whole process tree in MB."""
        pss = rss = 0
        for process in self._processes():
            fields = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            )
            pss += int(fields["Pss"].split()[0])
            rss += int(fields["Rss"].split()[0])
        return {"pss_mb": round(pss / 1024, 1), "rss_mb": round(rss / 1024, 1)}


@contextmanager
def service(
    backends: Backends,
    work: Path,
    extra: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
    name: str = "service",
) -> Iterator[Target]:
    """Our service: one instance with two worker processes."""
    key, port = SigningKey.generate(), free_port()
    jwks = work / f"{name}.jwks"
    jwks.write_text(json.dumps(public_jwks(key)))
    with migrated(backends) as url:
        environment = {
            "DATABASE_URL": url, "REDIS_URL": backends.redis_url, **backends.s3, "FAL_JWKS_FILE": str(jwks),
            "FAL_ACCOUNT_IDS": signed.ACCOUNT, "ENVIRONMENT": "production", "HOST": "127.0.0.1", "PORT": str(port),
            "WEBHOOK_WORKERS": str(WORKERS), "INSTANCE_ID": name, "TMPDIR": str(work), **(extra or {}),
        }  # fmt: skip
        command = [sys.executable, "-m", "webhook_api", "serve"]
        with _process(command, environment, work / f"{name}.log") as process:
            yield ready(Target(name, f"127.0.0.1:{port}", url, [process.pid], key, headers or {}), work)


@contextmanager
def reference(backends: Backends, work: Path) -> Iterator[Target]:
    """The reference application with as many workers."""
    key, port = SigningKey.generate(), free_port()
    with migrated(backends) as url:
        environment = {
            "REFERENCE_DATABASE_URL": url, "REFERENCE_PUBLIC_KEY": bytes(key.verify_key).hex(),
            "REFERENCE_ACCOUNT": signed.ACCOUNT,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "uvicorn", "bench.reference.app:app", "--host", "127.0.0.1", "--port", str(port),
            "--workers", str(WORKERS), "--loop", "uvloop", "--http", "httptools", "--no-access-log",
            "--log-level", "warning",
        ]  # fmt: skip
        with _process(command, environment, work / "reference.log") as process:
            yield ready(Target("reference", f"127.0.0.1:{port}", url, [process.pid], key), work)


@contextmanager
def migrated(backends: Backends) -> Iterator[str]:
    """A database with the schema."""
    with fresh_database(backends.database_url) as url:
        with db.connect(url, "bench") as connection:
            migrate(connection)
        yield url


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{PACKAGE}:{REPO}", **environment}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, cwd=REPO)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                for child in _tree(process.pid):
                    os.kill(child, signal.SIGKILL)
                process.wait(10)


def _tree(process: int) -> list[int]:
    return [process, *(found for child in children(process) for found in _tree(child))]


def children(process: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ready(target: Target, work: Path) -> Target:
    """Wait until it takes deliveries."""
    deadline = time.monotonic() + 30
    while True:
        try:
            if target.send(work, 8, 0.2)["taken"]:
                return target
        except subprocess.CalledProcessError:
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"{target.name} does not answer:\n{_end(work / (target.name + '.log'))}")
        time.sleep(0.2)


def _end(log: Path) -> str:
    return log.read_text()[-3000:] if log.exists() else ""
