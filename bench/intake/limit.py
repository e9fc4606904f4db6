"""The limit: pgbench with the same INSERT, one transaction a row, 16 clients."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from bench.intake.backends import Backends
from bench.intake.targets import migrated

SCRIPT = """\
\\set a random(1, 9000000000000000)
\\set b random(1, 9000000000000000)
insert into webhook.deliveries as d (
    source, request_id, dedup_key, status, gateway_request_id, account_id, body, body_sha256, headers)
values ('fal', 'r' || :a || '-' || :b, 'completed:0123456789abcdef0123456789abcdef', 'completed', 'g' || :a,
    'aisha-dev', '{body}'::bytea, repeat('0123456789abcdef', 4),
    '{{"content-type": "application/json", "x-fal-webhook-request-id": "r", "x-fal-webhook-timestamp": "1"}}')
on conflict on constraint deliveries_identity do update
    set attempts = d.attempts + 1, last_seen_at = greatest(d.last_seen_at, now())
returning d.id, d.xmax = 0 as created;
"""


def pgbench(backends: Backends, work: Path, body: bytes, seconds: float, clients: int = 16) -> float | None:
    """Transactions a second, or None when pgbench is neither here nor in the database's container."""
    command = _command()
    if command is None:
        return None
    script = SCRIPT.format(body="\\\\x" + body.hex()).replace("\\\\x", "\\x")
    with migrated(backends) as url:
        parts = urlsplit(url)
        (work / "insert.sql").write_text(script)
        output = subprocess.run(
            [*command, "-n", "-M", "prepared", "-c", str(clients), "-j", "2", "-T", str(max(1, round(seconds))),
             "-f", str(work / "insert.sql"), url],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    found = re.search(r"tps = ([0-9.]+) \(without", output.stdout) or re.search(
        r"tps = ([0-9.]+)", output.stdout
    )
    if found is None:
        raise AssertionError(f"pgbench at {parts.hostname}: {output.stderr[-500:]}")
    return float(found[1])


def _command() -> list[str] | None:
    found = shutil.which("pgbench")
    return [found] if found else None
