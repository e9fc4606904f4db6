"""Measures how fast the worker drains deliveries without files, with an empty table and a full one.

PostgreSQL, Redis and S3 are real (those that `WEBHOOK_TEST_*` names, or a site of the run's own) and share the machine
with the workers. The deliveries stand in the inbox when the workers start; counted is from the first that is finished
to the last. Prints a table and keeps the figures as JSON in `bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.intake.backends import backends
from bench.table.fill import fill
from bench.worker.place import Place, place, wait_empty

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
GOAL = 1000.0
_MAIN = """
import sys
from pathlib import Path
from webhook_api.config import NEEDS_WORKER, load_settings
from webhook_api.jsonlog import configure
from webhook_api.worker import run
configure("INFO")
sys.exit(run(load_settings(needs=NEEDS_WORKER), Path(sys.argv[1])))
"""


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("--events", type=int, default=20_000, help="of one measurement")
    parser.add_argument(
        "--finished", type=int, nargs="+", default=[0, 1_000_000], help="rows that stand there before"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the workers")
    parser.add_argument("--profile", metavar="FILE", help="have py-spy record the first worker")
    parser.add_argument("--name", default="worker", help="of the file in bench/results/")
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    result = run(options)
    show(result)
    if not options.no_keep:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{options.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nkept in {path}")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one run."""
    extra = dict(item.split("=", 1) for item in options.env)
    rows: list[dict[str, Any]] = []
    with backends() as servers:
        for finished in options.finished:
            with place(servers) as here, tempfile.TemporaryDirectory() as directory:
                if finished:
                    with here.connect() as connection:
                        fill(connection, finished, lambda line: print(f"  {line}", flush=True))  # type: ignore[arg-type]
                for workers in options.workers:
                    for _ in range(options.rounds):
                        measured = measure(
                            here, workers, options.events, extra, Path(directory), options.profile
                        )
                        rows.append({"finished_before": finished, "workers": workers, **measured})
                        print(f"  {rows[-1]}", flush=True)
    return {
        "bench": "worker",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "events": options.events,
        "rows": rows,
    }


def measure(
    here: Place, workers: int, events: int, extra: dict[str, str], directory: Path, profile: str | None
) -> dict[str, Any]:
    """One drain. Fails when anything is missing or there twice."""
    before = here.entries()
    here.feed(events)
    load = os.getloadavg()[0]
    with here.connect() as connection:
        since = _one(connection.execute("select clock_timestamp()"))
        wal = _one(connection.execute("select pg_current_wal_lsn()"))
        commands = [_process(here, number, extra, directory) for number in range(workers)]
        with ExitStack() as stack:
            running = [stack.enter_context(subprocess.Popen(*each[0], **each[1])) for each in commands]
            if profile:
                spy = subprocess.Popen(
                    [
                        "py-spy",
                        "record",
                        "-d",
                        "20",
                        "-r",
                        "200",
                        "-t",
                        "-f",
                        "raw",
                        "-o",
                        profile,
                        "--pid",
                        str(running[0].pid),
                    ]
                )
                stack.callback(spy.wait)
            try:
                wait_empty(here, events, 120 + events / 50)
            finally:
                cpu = sum(_cpu_seconds(process.pid) for process in running)
                for process in running:
                    process.terminate()
        first, last, done = connection.execute(
            "select min(done_at), max(done_at), count(*) from webhook.deliveries where done_at >= %s",
            (since,),
        ).fetchone() or (None, None, 0)
        opening = _one(
            connection.execute("select count(*) from webhook.deliveries where done_at = %s", (first,))
        )
        wal_bytes = _one(connection.execute("select pg_current_wal_lsn() - %s::pg_lsn", (wal,)))
        wrong = _one(
            connection.execute(
                "select count(*) from webhook.deliveries d where done_at >= %s and 4 <> (select count(*) "
                "from webhook.effects e where e.delivery_id = d.id and e.state in ('done', 'skipped'))",
                (since,),
            )
        )
    added = here.entries() - before
    if done != events or added != events or wrong:
        raise SystemExit(
            f"{events} deliveries: {done} finished, {added} entries, {wrong} with an effect missing"
        )
    seconds = (last - first).total_seconds()
    return {
        "events_per_second": round((events - opening) / seconds, 1),
        "seconds": round(seconds, 2),
        "worker_cpu_ms_per_event": round(cpu * 1000 / events, 3),
        "wal_bytes_per_event": round(float(wal_bytes) / events),
        "load_before": round(load, 2),
    }


def _one(cursor: Any) -> Any:
    row = cursor.fetchone()
    return row[0]


def _process(
    here: Place, number: int, extra: dict[str, str], directory: Path
) -> tuple[tuple[list[str]], dict[str, Any]]:
    command = [sys.executable, "-c", _MAIN, str(directory / f"heartbeat-{number}")]
    environ = {
        **os.environ, "PYTHONPATH": str(ROOT / "webhook"), **here.environ(), "INSTANCE_ID": f"bench-{number}", **extra
    }  # fmt: skip
    return (command,), {"env": environ, "stderr": (directory / f"log-{number}").open("wb")}


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(result: dict[str, Any]) -> None:
    """The table."""
    print(f"\n{result['events']} events without files a measurement; goal {GOAL:.0f}/s")
    print(
        f"{'rows before':>12} {'workers':>8} {'events/s':>10} {'CPU ms/event':>13} {'WAL/event':>10} {'load':>6}"
    )
    for row in result["rows"]:
        print(
            f"{row['finished_before']:>12,} {row['workers']:>8} {row['events_per_second']:>10,.0f} "
            f"{row['worker_cpu_ms_per_event']:>13.2f} {row['wal_bytes_per_event']:>10,} {row['load_before']:>6.1f}"
        )


if __name__ == "__main__":
    main()
